"""Where text comes from, how much of it is read, and what is left out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from transllm_jax.choices import Container, Content, Controls, OnBadRows, Recovery, Separator
from transllm_jax.config.section import Location, Positive, Section, Share, without_limit


class Cleaning(Section):
    """Which items (documents, pairs, conversations) of a source are left out of training.

    The stage's manifest counts each kind.
    """

    exact_duplicates: bool = True
    """Leave out items equal to an earlier one, apart from case and spaces."""
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = None
    """Leave out items whose estimated Jaccard similarity with an earlier one is at least this, such as 0.8 (MinHash).
    By default similarity is not estimated.
    """
    contamination: bool = True
    """Leave out items that contain at least half of any text of the evaluation sets."""
    min_characters: Annotated[int, Field(ge=0)] = 0
    """Leave out items with fewer characters (in pairs: on either side)."""
    max_characters: Positive | None = None
    """Leave out items with more characters (in pairs: on either side). By default there is no limit."""
    min_script_share: Share = 0.0
    """Leave out items in which the share of letters in the target language's script is below this (in pairs: on the
    target side). Conversations are not judged by it.
    """

    @model_validator(mode="after")
    def _leaves_something(self) -> Cleaning:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(f"max_characters {self.max_characters} is below min_characters {self.min_characters}")
        return self


class Source(Section):
    """Text, translation pairs or conversations, in files or in a dataset of `datasets` or TFDS.

    `weight`, `tokens` and `cleaning` are for what is trained on: the `sources` of a training stage.
    """

    newer: ClassVar[tuple[str, ...]] = ("chains", "recovery", "in_chat")

    path: Location
    """A file or a glob (.gz, .xz and .zst are decompressed). For `container: datasets`, a local directory or a hub
    name; for `container: tfds`, NAME, NAME/CONFIG or NAME:VERSION.
    """
    format: Content = "text"
    """What the items are: documents (`text`), sentences in English and the target language (`pairs`), or
    `conversations`.
    """
    container: Container | None = None
    """How the items are stored. By default by the file's suffix: .jsonl (or .ndjson, .json), .parquet, else lines."""
    fields: list[str] = []
    """For records: the field of a text (`text` by default), or the two fields of a pair, English first. `a.b` is b
    inside a. Other fields are not read. Conversations are recognised by their form: `conversations`, `messages`, or
    `instruction`, `input` and `output`; other fields are read, refused or, if they do not affect training, counted by
    name.
    """
    target_path: Location | None = None
    """For pairs in two files, line by line: the file of the target language; `path` is then the English file."""
    split: str = "train"
    """For `datasets` and `tfds`: the split that is read."""
    data_dir: str | None = None
    """For `datasets`: the directory inside the dataset. For `tfds`: where datasets are prepared, by default TFDS's own
    directory.
    """
    separator: Separator = "blank line"
    """For text in lines: what separates two documents."""
    controls: Controls = "refuse"
    """Control characters: refuse them, with their position, or remove and count them."""
    on_bad_rows: OnBadRows = "refuse"
    """A bad row (an empty side, a third column, two questions in a row, a special token) either stops the run or is
    skipped: left out, counted and written to bad_rows.jsonl in the stage's directory.
    """
    max_bad_share: Share = 0.01
    """For `on_bad_rows: skip`: at most this share of the source's rows may be skipped, or ten rows if that is more."""
    chains: bool = False
    """For conversations: the answers are laid out as the run's own chains, and hold its markers. Otherwise a marker in
    a text is a fault.
    """
    in_chat: bool = False
    """For text in training: each document is an answer in the model's chat template, to an empty question, as in
    instruction continual pre-training (arXiv 2405.20175). A longer document is split; each piece has the template.
    """
    recovery: Recovery = "sequence"
    """For English text or conversations in training: their text is learned (`sequence`), or each token is held to what
    the original model would say there (`token`: KL divergence over the base vocabulary; the text itself is not
    learned), or both. It keeps the model's English as it was. `transfer.recovery` is the same for the English answers
    of stage `recover`.
    """
    weight: float | None = Field(default=None, gt=0)
    """Share of the rows in the mixture, relative to the other sources. Give all sources a weight or none; without
    weights the shares are those of the sources' sizes.
    """
    max_bytes: Positive | None = None
    """For text, read only the start of the source: at most this many UTF-8 bytes of its documents (the first line or
    record is always read).
    """
    max_items: Positive | None = None
    """Read only the start of the source: at most this many documents, pairs or conversations."""
    tokens: Positive | None = None
    """Train on at most this many tokens of the source: items are chosen at random, by the run's seed."""
    cleaning: Cleaning = Cleaning()
    """Which items are left out of training."""

    @model_validator(mode="before")
    @classmethod
    def _has_no_limit(cls, given: Any) -> Any:
        """`limit` was removed: it meant bytes for text but a number of items for the others, and was misread."""
        kind = given.get("format", "text") if isinstance(given, dict) else "text"
        text = "bytes of text: name it max_bytes (or max_items, to count documents)"
        return without_limit(given, text if kind == "text" else f"{kind}: name it max_items")

    @model_validator(mode="after")
    def _has_no_idle_key(self) -> Source:
        if self.format != "text" and self.max_bytes is not None:
            raise ValueError(f"max_bytes is for text; for {self.format}, use max_items")
        if self.format != "text" and self.separator != "blank line":
            raise ValueError("separator is for text; pairs and conversations are one per line, so remove it")
        if self.chains and self.format != "conversations":
            raise ValueError(f"chains is for conversations; for {self.format}, remove it")
        if self.in_chat and (self.format != "text" or self.recovery != "sequence"):
            raise ValueError("in_chat is for text whose recovery is sequence; remove one of the two")
        if self.recovery != "sequence" and self.format == "pairs":
            raise ValueError(
                f"recovery: {self.recovery} is for English text and conversations; of pairs the original model knows "
                "only half, so remove it"
            )
        if self.target_path is not None and (self.format != "pairs" or self.container not in (None, "lines")):
            raise ValueError("target_path is for pairs in two files of lines; add `format: pairs`, or remove it")
        if self.container in ("datasets", "tfds"):
            if self.target_path is not None:
                raise ValueError("target_path is for pairs in two files; name both fields")
        elif self.data_dir is not None or self.split != "train":
            raise ValueError("split and data_dir are for container: datasets or tfds; remove them")
        if self.on_bad_rows == "refuse" and self.max_bad_share != 0.01:
            raise ValueError("max_bad_share is for on_bad_rows: skip; add that, or remove it")
        wanted = {"text": (0, 1), "pairs": (0, 2), "conversations": (0,)}[self.format]
        if len(self.fields) not in wanted:
            raise ValueError(f"{self.format} has {' or '.join(map(str, wanted))} fields, not {len(self.fields)}")
        return self


def _unweighted(source: Source) -> Source:
    """Check a source that is not part of a mixture. Keys without effect are errors."""
    for key in ("weight", "tokens"):
        if getattr(source, key) is not None:
            raise ValueError(f"{key} means nothing here: this source is not part of a mixture; remove it")
    if source.recovery != "sequence" or source.in_chat:
        name = "in_chat" if source.in_chat else "recovery"
        raise ValueError(f"{name} means nothing here: this source is not trained on; remove it")
    if source.cleaning != Cleaning():
        raise ValueError("cleaning means nothing here: this source is not trained on; remove it")
    return source


def _pairs(source: Source) -> Source:
    if source.format != "pairs":
        raise ValueError("pairs are needed here; add `format: pairs`")
    return source


def _texts(source: Source) -> Source:
    if source.format == "conversations":
        raise ValueError("text or pairs are needed here, not conversations")
    return source


WholeSource = Annotated[Source, AfterValidator(_unweighted)]
PairSource = Annotated[WholeSource, AfterValidator(_pairs)]
TextSource = Annotated[WholeSource, AfterValidator(_texts)]
