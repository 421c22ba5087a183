"""A source of training data and its shards: one interface over all formats.

A shard is a plain value that can be sent to another process. Its items depend only on its key. They are streamed:
memory does not grow with a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from transllm_jax.choices import Container, Content, Controls, OnBadRows, Separator
from transllm_jax.data.read import catalog, hub
from transllm_jax.data.read.conversations import FIELDS, Form, conversation, form_of
from transllm_jax.data.read.files import (
    COMPRESSED,
    BadRow,
    Collector,
    Place,
    catch_bad_row,
    no_items,
    raise_bad_rows,
    resolve,
)
from transllm_jax.data.read.parquet import iter_rows
from transllm_jax.data.read.records import Record, iter_json, text_of_field
from transllm_jax.data.read.sources import aligned_rows, document_rows, pair_rows
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chat import Message

Item = str | tuple[str, str] | list[Message]

_FORMAT = 2  # of the items: raised when a change of the code makes other items of the same files
_CONTAINERS: dict[str, Container] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
PLURAL = {"text": "documents", "pairs": "pairs", "conversations": "conversations"}


@dataclass(frozen=True)
class Reading:
    """A source: where it is and how it is read. Plain values, which can be pickled and written as JSON.

    path: a file or glob; for `datasets` a local directory or OWNER/NAME[/CONFIG][@REVISION] on the hub; for `tfds`
    NAME[/CONFIG][:VERSION]. container: None chooses by the files' suffix (.jsonl and .json, .parquet, else lines).
    fields: of a record, the field that holds a text ("text" by default), or the two that hold a pair, English first;
    dots reach into objects. target_path: a file of lines in the target language, which makes pairs with the English
    lines of `path`. separator: what separates documents in a file of lines. max_bytes, max_items: read at most this
    many UTF-8 bytes of text (but at least one line or record), or this many items, from the start. on_bad_rows: see
    `data.read.files.Collector`. split, data_dir: for `datasets` and `tfds`.
    """

    path: str
    content: Content = "text"
    container: Container | None = None
    fields: tuple[str, ...] = ()
    target_path: str | None = None
    separator: Separator = "blank line"
    controls: Controls = "refuse"
    on_bad_rows: OnBadRows = "refuse"
    max_bytes: int | None = None
    max_items: int | None = None
    split: str = "train"
    data_dir: str | None = None


class Shard(Protocol):
    """A part of a source that is read in one go.

    name: for messages and file names. key: changes exactly when the shard's items may change. size: bytes on disk, 0 if
    unknown.
    """

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def size(self) -> int: ...

    def items(self, collector: Collector) -> Iterator[tuple[Item, Place]]:
        """The items in order, checked and in NFC, each with its place; the collector counts them.

        The collector refuses or skips a bad row. Raises UserError with file and line (row, record) for a fault, and if
        there are no items.
        """


def shards(reading: Reading, hash_of: Callable[[Path], str]) -> list[Shard]:
    """The shards of a source: one per file, in the order of their names, or the shards of a dataset.

    With max_bytes or max_items there is a single one, as these count from the start of the source. hash_of: returns a
    file's SHA-256. Raises UserError for settings that do not go together, for missing files, and for datasets that
    cannot be opened.
    """
    reading = resolved(reading)
    parts = _parts(reading, hash_of)
    form: Form | None = None
    first = parts[0].origin
    if reading.content == "conversations" and len(parts) > 1 and isinstance(first, _JsonFile | _ParquetFile):
        # Each shard is read on its own, so the first good record of the first file decides the form of all.
        for record, place in first.records(Collector(reading.controls)):
            found = record if isinstance(record, BadRow) else catch_bad_row(form_of, record, place)
            if not isinstance(found, BadRow):
                form = found
                break
            if reading.on_bad_rows == "refuse":
                raise found
    # The user cannot fix an empty shard of somebody else's dataset.
    may_be_empty = reading.container == "datasets" and len(parts) > 1
    groups = [[part] for part in parts] if reading.max_bytes is None and reading.max_items is None else [parts]
    return [_Shard.of(reading, group, form, may_be_empty and len(group) == 1) for group in groups]


class _Records(Protocol):
    """Something that records are read from."""

    def records(self, collector: Collector) -> Iterator[tuple[Record | BadRow, Place]]: ...


@dataclass(frozen=True)
class _LineFile:
    """A file of lines; for pairs in two files also that of the translations, `target`."""

    path: str
    target: str | None

    def pairs(self, collector: Collector) -> Iterator[tuple[tuple[str, str] | BadRow, Place]]:
        if self.target is not None:
            return aligned_rows(Path(self.path), Path(self.target), collector)
        return pair_rows([Path(self.path)], collector)


@dataclass(frozen=True)
class _JsonFile:
    path: str

    def records(
        self, collector: Collector, on_read: Callable[[int], None] | None = None
    ) -> Iterator[tuple[Record | BadRow, Place]]:
        return iter_json(Path(self.path), collector, on_read)


@dataclass(frozen=True)
class _ParquetFile:
    path: str
    fields: tuple[str, ...]
    optional: tuple[str, ...]

    def records(
        self, collector: Collector, on_read: Callable[[int], None] | None = None
    ) -> Iterator[tuple[Record, Place]]:
        ignored = collector.ignored if self.optional else None
        return iter_rows(Path(self.path), self.fields, self.optional, on_read, ignored)


@dataclass(frozen=True)
class _Part:
    """The smallest part of a source. key: of its whole content, however much of it is read."""

    name: str
    key: str
    size: int
    origin: _LineFile | _Records


@dataclass(frozen=True)
class _Shard:
    """See `Shard`. form: of all conversations of the source, if the shard alone cannot decide it."""

    reading: Reading
    name: str
    key: str
    size: int
    origins: tuple[_LineFile | _Records, ...]
    form: Form | None
    may_be_empty: bool

    @staticmethod
    def of(reading: Reading, parts: Sequence[_Part], form: Form | None, may_be_empty: bool) -> _Shard:
        options: list[Any] = [_FORMAT, reading.content, reading.container, reading.controls, reading.on_bad_rows]
        options += [reading.max_bytes, reading.max_items]
        # Every setting here changes the items; one that would not (such as a separator of records) is refused.
        options += [reading.separator, *reading.fields, *(part.key for part in parts)]
        name = parts[0].name if len(parts) == 1 else f"{parts[0].name}+{len(parts) - 1}"
        return _Shard(
            reading,
            name,
            hashlib.sha256(json.dumps(options).encode()).hexdigest(),
            sum(part.size for part in parts),
            tuple(part.origin for part in parts),
            form,
            may_be_empty,
        )

    def items(self, collector: Collector) -> Iterator[tuple[Item, Place]]:
        empty, before = True, len(collector.bad_rows)
        good = self._good(collector)
        if self.reading.max_bytes is not None and not self._of_lines:
            good = _first_bytes(good, self.reading.max_bytes)
        for item, place in islice(good, self.reading.max_items):
            empty = False
            yield collector.take(item), place
        if empty and len(collector.bad_rows) > before:
            first = collector.bad_rows[before]["fault"]
            raise UserError(f"{self.name} has no row that can be read, the first: {first}")
        if empty and not self.may_be_empty:
            raise no_items(self.name, PLURAL[self.reading.content])

    def _good(self, collector: Collector) -> Iterator[tuple[Item, Place]]:
        """The good items, not yet in NFC. The only place where bad rows are given to the collector."""
        for row, place in self._rows(collector):
            if isinstance(row, BadRow):
                collector.refuse_or_skip(row, place)
            else:
                yield row, place

    @property
    def _of_lines(self) -> bool:
        return isinstance(self.origins[0], _LineFile)

    def _rows(self, collector: Collector) -> Iterator[tuple[Item | BadRow, Place]]:
        """The rows of all files, a BadRow in place of a bad one; of text in lines, `max_bytes` at most."""
        reading, form = self.reading, self.form
        files = [origin for origin in self.origins if isinstance(origin, _LineFile)]
        if files and reading.content == "text":
            paths, budget = [Path(file.path) for file in files], reading.max_bytes
            for text, place in document_rows(paths, collector, separator=reading.separator, max_bytes=budget):
                yield text or "", place
            return
        for origin in self.origins:
            if isinstance(origin, _LineFile):
                yield from origin.pairs(collector)
                continue
            for record, place in origin.records(collector):
                if isinstance(record, BadRow):
                    yield record, place
                    continue
                if reading.content == "conversations" and form is None:
                    found = catch_bad_row(form_of, record, place)
                    if isinstance(found, BadRow):
                        yield found, place
                        continue
                    form = found
                yield catch_bad_row(self._item, record, form, place, collector), place

    def _item(self, record: Record, form: Form | None, place: Place, collector: Collector) -> Item:
        """A record's text, pair or conversation."""
        fields = self.reading.fields
        if self.reading.content == "text":
            return text_of_field(record, fields[0], place, collector)
        if self.reading.content == "pairs":
            english, target = (text_of_field(record, field, place, collector).strip() for field in fields)
            return english, target
        assert form is not None
        return conversation(record, form, place, collector)


def _first_bytes(found: Iterator[tuple[Item, Place]], max_bytes: int) -> Iterator[tuple[Item, Place]]:
    """Whole texts from the start of at most `max_bytes` together; at least the first."""
    room, given = max_bytes, False
    for text, place in found:
        assert isinstance(text, str)
        room -= len(text.encode())
        if room < 0 and given:
            return
        yield text, place
        given = True


def resolved(reading: Reading) -> Reading:
    """The reading with its container and fields filled in. Raises UserError for settings that do not go together."""
    container = reading.container or container_of(resolve(reading.path))
    lines, records = container == "lines", container != "lines"
    fields = reading.fields or (("text",) if records and reading.content == "text" else ())
    wanted = {"text": 1, "pairs": 2, "conversations": 0}[reading.content] if records else 0
    faults = {
        "lines hold no conversations: set container to jsonl or parquet": lines and reading.content == "conversations",
        "fields are for records, not for lines: remove fields": lines and fields,
        f"{container} of pairs need fields: name two, the English one first": wanted == 2 and len(fields) != 2,
        f"fields are {', '.join(fields)}: name the one of the text": wanted == 1 and len(fields) != 1,
        "conversations have fields of their own: remove fields": records and wanted == 0 and fields,
        "target_path makes pairs of two files of lines: remove it": (
            reading.target_path is not None and (records or reading.content != "pairs")
        ),
        "separator is for text in lines: remove it": (
            reading.separator != "blank line" and (records or reading.content != "text")
        ),
        "split and data_dir are for datasets and tfds: remove them": (
            container not in ("datasets", "tfds") and (reading.split != "train" or reading.data_dir is not None)
        ),
        "max_bytes is for text: set max_items": reading.max_bytes is not None and reading.content != "text",
        **{
            f"{name} is {value}: it must be at least 1": value is not None and value < 1
            for name, value in (("max_bytes", reading.max_bytes), ("max_items", reading.max_items))
        },
    }
    if found := [fault for fault, is_one in faults.items() if is_one]:
        raise UserError(f"{reading.path}: {'; '.join(found)}")
    return replace(reading, container=container, fields=tuple(fields))


def container_of(files: Sequence[Path]) -> Container:
    """How files are read, by their suffixes. Raises UserError for files of several kinds, and for CSV."""
    found = {_suffixes(file)[0]: file for file in files}
    if ".csv" in found:
        raise UserError(
            f"{found['.csv']} is CSV, which is not read: make it jsonl or parquet, or for pairs lines of "
            "English<TAB>target (.tsv), or set container"
        )
    kinds = {_CONTAINERS.get(suffix, "lines"): file for suffix, file in found.items()}
    if len(kinds) > 1:
        what = ", ".join(f"{file} ({kind})" for kind, file in kinds.items())
        raise UserError(f"one source has files of several kinds, {what}: make each kind a source, or set container")
    return next(iter(kinds))


def _suffixes(file: Path) -> tuple[str, str]:
    """The suffix of a file's content, and that of its compression, in lower case."""
    name = Path(file.name.lower())
    outer = name.suffix if name.suffix in COMPRESSED else ""
    return Path(name.name.removesuffix(outer)).suffix, outer


def _parts(reading: Reading, hash_of: Callable[[Path], str]) -> list[_Part]:
    """The parts of a resolved reading."""
    if reading.container in ("datasets", "tfds"):
        parts_of = hub.parts_of if reading.container == "datasets" else catalog.parts_of
        found = parts_of(reading.path, reading.split, reading.data_dir, hash_of)
        return [_Part(part.name, part.key, part.size, part) for part in found]
    files = resolve(reading.path)
    targets = resolve(reading.target_path) if reading.target_path is not None else []
    if targets and len(targets) != len(files):
        raise UserError(
            f"{reading.path} means {len(files)} files and {reading.target_path} {len(targets)}: give one file of "
            "translations for each file, in the order of their names"
        )
    parts = []
    for index, file in enumerate(files):
        both = [file, *targets[index : index + 1]]
        # The suffix decides how a file is decompressed, so it is part of the key.
        key = json.dumps([[hash_of(one), _suffixes(one)[1]] for one in both])
        parts.append(_Part(file.name, key, sum(one.stat().st_size for one in both), _origin(reading, *both)))
    return parts


def _origin(reading: Reading, file: Path, target: Path | None = None) -> _LineFile | _JsonFile | _ParquetFile:
    if reading.container == "lines":
        return _LineFile(str(file), None if target is None else str(target))
    if reading.container == "jsonl":
        return _JsonFile(str(file))
    if _suffixes(file)[1]:
        raise UserError(f"{file}: parquet has its own compression; decompress the file")
    return _ParquetFile(str(file), reading.fields, FIELDS if reading.content == "conversations" else ())


# --- files on a command line ----------------------------------------------------------------------------------------


def text_files(
    path: str | Path, *, separator: Separator = "blank line", controls: Controls = "refuse", field: str | None = None
) -> dict[Path, Reading]:
    """The text files that match a path or glob, and how each is read: `separator` is for lines, `field` for records.

    Raises UserError if none matches.
    """
    found = {}
    for file in resolve(path):
        lines = container_of([file]) == "lines"
        fields = () if lines or field is None else (field,)
        separated: Separator = separator if lines else "blank line"
        found[file] = resolved(Reading(str(file), fields=fields, separator=separated, controls=controls))
    return found


def iter_texts(
    file: Path,
    reading: Reading,
    collector: Collector,
    *,
    longest: int | None = None,
    on_read: Callable[[int], None] | None = None,
) -> Iterator[tuple[str | None, Place]]:
    """The texts of one of `text_files` one at a time, with their places, not normalised and not counted.

    longest: a text of more UTF-8 bytes is given as None; a document of lines is then never in memory as a whole.
    on_read: called now and then with the number of bytes of the file read so far. Raises UserError as a shard's `items`
    does, but not for a file without texts.
    """
    origin = _origin(reading, file)
    if isinstance(origin, _LineFile):
        found = document_rows([file], collector, separator=reading.separator, longest=longest, on_read=on_read)
        yield from raise_bad_rows(found)
        return
    for record, place in raise_bad_rows(origin.records(collector, on_read)):
        text = text_of_field(record, reading.fields[0], place, collector)
        yield (None if longest is not None and len(text.encode()) > longest else text), place
