"""The typed description of a run."""

from __future__ import annotations

import datetime
from typing import Any, Literal

import yaml
from pydantic import Field, field_serializer, field_validator, model_validator

from transllm_jax.choices import TRAININGS, Attention
from transllm_jax.config.marks import escaped
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


def _none_in_place_of_null(schema: dict[str, Any]) -> None:
    """Say in a field's JSON schema that the word `none` is what a config writes for None."""
    schema["anyOf"] = [
        {"const": "none", "type": "string"} if kind == {"type": "null"} else kind for kind in schema["anyOf"]
    ]


class Config(Section):
    """The config of a run."""

    title: str
    """A name for the run, for the reader: it heads the report."""
    workdir: Location
    """The work directory: everything that the run writes is in it. A directory, or `gs://BUCKET/PATH`. `--workdir` on
    the command line takes its place.
    """
    seed: int = Field(default=0, ge=0, lt=2**31)
    """What the run's random numbers follow from: initial rows and adapters, the order of the data, dropout."""
    date: datetime.date | None = None
    """The date for chat templates that write one. By default the day on which the run began, which is kept in run.yaml
    and used again when the run is resumed.
    """
    language: Language = Field(default_factory=Language)
    """The target language."""
    markers: MarkerNames = MarkerNames()
    """The special tokens of the translation chain."""
    model: ChatModel
    """The chat model that is moved."""
    vocabulary: Vocabulary
    """Stage 1: the new tokens and their rows."""
    lora: Lora | None = Field(default=Lora(), json_schema_extra=_none_in_place_of_null)
    """The adapters; or `none` for full fine-tuning, to compare with: copies of all weights of the layers train."""
    embeddings: Literal["new", "all", "none"] = "new"
    """Which vocabulary rows train: those of new tokens, or also copies of the base model's (V x D more values, twice
    that for untied embeddings, and their moments), or none. All three keep the original chat model intact inside the
    new one. Base rows without a token never train.
    """
    prompts: Prompts = Prompts()
    """Translation instructions."""
    pretrain: Pretraining
    """Stage 2: causal LM on text in the target language."""
    translate: Pretraining
    """Stage 3: causal LM on translation pairs in both directions, mixed with text."""
    recover: Recover
    """Stage 4, first half: the original chat model's answers, and their translations."""
    transfer: Transfer
    """Stage 4, second half: fine-tuning on translation chains and what is mixed with them."""
    evaluation: Evaluation
    """What each point of the run is measured on."""
    export: Export = Export()
    """The Hugging Face directory that the run writes at its end."""
    mesh: Mesh = Mesh()
    """How the work is divided among devices."""
    attention: Attention = "auto"
    """The attention kernel in training: `splash` (TPU only; lengths that are multiples of 128), `plain` (our own), or
    `auto` (splash where possible).
    """
    token_cache: Location | None = None
    """A directory for tokenised text, which several runs can share. By default it is in the work directory."""

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
        if self.lora is None and (where := self._taught_by_original()):
            raise ValueError(
                f"{where}: token and both compare with the original weights, which lora: none trains; take sequence"
            )
        if self.lora is None and self.vocabulary.adapter is not None:
            raise ValueError("lora is none, but vocabulary.adapter brings adapters; remove one of the two")
        return self

    def _taught_by_original(self) -> str | None:
        """The first key that has the original model teach a training; None if there is none."""
        for name in TRAININGS:
            section = getattr(self, name)
            if getattr(section, "recovery", "sequence") != "sequence":
                return f"{name}.recovery"
            for number, source in enumerate(section.sources):
                if source.recovery != "sequence":
                    return f"{name}.sources.{number}.recovery"
        return None

    @property
    def target_marker(self) -> str:
        """The target language's marker, `<TH>` for Thai."""
        return self.markers.target or f"<{self.language.code.upper()}>"

    def to_yaml(self) -> str:
        """The resolved config, as `run.yaml` keeps it: a config itself."""
        return escaped(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
