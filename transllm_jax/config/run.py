"""The typed description of a run."""

from __future__ import annotations

import datetime
from typing import Any, Literal

import yaml
from pydantic import Field, field_serializer, field_validator, model_validator

from transllm_jax.choices import Attention
from transllm_jax.config.section import Location, Section
from transllm_jax.config.sections import (
    ChatModel,
    Evaluation,
    Export,
    Language,
    Lora,
    MarkerNames,
    Mesh,
    Prompts,
    Recover,
    Vocabulary,
)
from transllm_jax.config.training import Pretraining, Transfer


class Config(Section):
    """The config of a run."""

    title: str
    workdir: Location
    seed: int = Field(default=0, ge=0, lt=2**31)
    # The date (YYYY-MM-DD) for chat templates that write one. By default the day on which the run began, which is kept
    # in run.yaml and used again when the run is resumed.
    date: datetime.date | None = None
    language: Language = Language()
    markers: MarkerNames = MarkerNames()
    model: ChatModel
    vocabulary: Vocabulary
    # The adapters; or `none` for full fine-tuning, to compare with: copies of all weights of the layers train.
    lora: Lora | None = Lora()
    # Which vocabulary rows train: those of new tokens, or also copies of the base model's (V x D more values, twice
    # that for untied embeddings, and their moments), or none. All three keep the original chat model intact inside the
    # new one. Base rows without a token never train.
    embeddings: Literal["new", "all", "none"] = "new"
    prompts: Prompts = Prompts()
    pretrain: Pretraining
    translate: Pretraining
    recover: Recover
    transfer: Transfer
    evaluation: Evaluation
    export: Export = Export()
    mesh: Mesh = Mesh()
    # The attention kernel in training: splash (TPU only; lengths that are multiples of 128), plain (our own), or auto
    # (splash where possible).
    attention: Attention = "auto"
    # A directory for tokenised text, which several runs can share; by default in the work directory.
    token_cache: Location | None = None

    @field_validator("lora", mode="before")
    @classmethod
    def _may_be_none(cls, given: Any) -> Any:
        if given is None:
            raise ValueError("it has no value; write `none` for full fine-tuning, or remove the key")
        return None if given == "none" else given

    @field_serializer("lora", when_used="json")
    def _is_written_as_none(self, value: Lora | None) -> Any:
        return "none" if value is None else value.model_dump(mode="json")

    @model_validator(mode="after")
    def _trains_something(self) -> Config:
        if self.lora is None and self.vocabulary.adapter is not None:
            raise ValueError("lora is none, but vocabulary.adapter brings adapters; remove one of the two")
        return self

    @property
    def target_marker(self) -> str:
        """The target language's marker, `<TH>` for Thai."""
        return self.markers.target or f"<{self.language.code.upper()}>"

    def to_yaml(self) -> str:
        """The resolved config, as `run.yaml` keeps it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
