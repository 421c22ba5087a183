"""Where text comes from, how much of it is taken, and what is left out."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from transllm_jax.choices import Container, Content, Controls, OnBadRows, Separator
from transllm_jax.config.section import Location, Positive, Section, Share, without_limit


class Cleaning(Section):
    """What is left out of a source before it is trained on; each is counted in the stage's manifest."""

    # Items (documents, pairs, conversations) that are equal to an earlier one, but for case and spaces.
    exact_duplicates: bool = True
    # Items whose estimated Jaccard similarity with an earlier one is at least this, such as 0.8 (MinHash); null is off.
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = None
    # Items that hold at least half of some text of the evaluation sets.
    contamination: bool = True
    min_characters: Annotated[int, Field(ge=0)] = 0
    max_characters: Positive | None = None
    # The least share of letters that are of the target language's script (of pairs: of the target side).
    min_script_share: Share = 0.0

    @model_validator(mode="after")
    def _leaves_something(self) -> Cleaning:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(f"max_characters {self.max_characters} is below min_characters {self.min_characters}")
        return self


class Source(Section):
    """Text, translation pairs or conversations, in files, or in a dataset of `datasets` or TFDS."""

    # A file or a glob (.gz, .xz and .zst are read as they are); for `datasets` a local directory or a hub name; for
    # `tfds` NAME, NAME/CONFIG or NAME:VERSION.
    path: Location
    # What is in it. pairs: English and the target language.
    format: Content = "text"
    # How it is stored; by default what the file's suffix says: .jsonl (or .ndjson, .json), .parquet, else lines.
    container: Container | None = None
    # Of records: the field of a text (`text` by default), or the two of a pair, English first. `a.b` is b inside of a.
    # What else a record has is not read. Conversations are known by their form: `conversations`, `messages`, or
    # `instruction`, `input` and `output`; fields beside these are read, refused or, where they say nothing of the
    # training, counted by name.
    fields: list[str] = []
    # Of pairs in two files, line by line: the target language's; `path` is then the English one.
    target_path: Location | None = None
    # Of `datasets` and `tfds`.
    split: str = "train"
    data_dir: str | None = None
    # Of text in lines: what stands between two documents.
    separator: Separator = "blank line"
    # Control characters: refused with their place, or removed and counted.
    controls: Controls = "refuse"
    # A row that cannot be read (an empty side, a third column, two questions in a row, a special token in it) stops the
    # run, or is left out, counted and written to bad_rows.jsonl in the stage's directory.
    on_bad_rows: OnBadRows = "refuse"
    # At most this share of a source's rows may be skipped; ten may be in any case, for small files.
    max_bad_share: Share = 0.01
    # Share of the rows in the mixture, relative to the other sources'; all or none. Without: by size.
    weight: float | None = Field(default=None, gt=0)
    # Read only so much from the start: at most so many UTF-8 bytes of a text's documents (the first line or record is
    # always taken), or so many documents, pairs or conversations.
    max_bytes: Positive | None = None
    max_items: Positive | None = None
    # Train on at most so many tokens: items are chosen at random, by the run's seed.
    tokens: Positive | None = None
    cleaning: Cleaning = Cleaning()

    @model_validator(mode="before")
    @classmethod
    def _has_no_limit(cls, given: Any) -> Any:
        """`limit` meant bytes of text and a number of anything else, so it was taken for what it was not."""
        kind = given.get("format", "text") if isinstance(given, dict) else "text"
        text = "bytes of text: name it max_bytes (or max_items, to count documents)"
        return without_limit(given, text if kind == "text" else f"{kind}: name it max_items")

    @model_validator(mode="after")
    def _has_no_idle_key(self) -> Source:
        if self.format != "text" and self.max_bytes is not None:
            raise ValueError(f"max_bytes is for text; of {self.format}, max_items are taken from the start")
        if self.format != "text" and self.separator != "blank line":
            raise ValueError("separator is for text; pairs and conversations stand one a line, so remove it")
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
    """A source that is no part of a mixture. A key that nobody reads is an error."""
    for key in ("weight", "tokens"):
        if getattr(source, key) is not None:
            raise ValueError(f"{key} means nothing here, where no mixture is made; remove it")
    if source.cleaning != Cleaning():
        raise ValueError("cleaning means nothing here, where nothing is trained on; remove it")
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
