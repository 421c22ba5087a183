"""Readers of text, pairs and records: the only place that knows file formats.

Every reader returns a `Loaded` list, which remembers the file and line of each item, so that whatever is
found wrong later (a marker inside a text, say) is reported where its author can mend it.
"""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar

from transllm_jax.errors import UserError

T = TypeVar("T")
Controls = Literal["refuse", "remove"]
Separator = Literal["blank line", "line"]

# Category Cc without tab and line feed. Zero-width and other format characters (Cf) are text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LONGEST_LINE = 64 << 20  # bytes: a file without line ends must not fill the memory
_TOLD_LINES = 2000  # lines between two tellings of how far a file is read
_SURROGATE = re.compile("[\ud800-\udfff]")
_TYPE_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "an object", int: "a number"}


class Place(NamedTuple):
    """Where an item stands: its file and its first line, counted from 1."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class SourceReport:
    """What a source gave: items, characters and UTF-8 bytes of their text.

    normalised: items that had to be made NFC. removed: control characters taken out (with controls="remove").
    """

    documents: int
    characters: int
    bytes: int
    normalised: int
    removed: int = 0


class Loaded(list[T]):
    """The items of a source, as a list, with `places` (one for each item) and a `report`.

    A slice or sorted copy of it is a plain list, which knows no places.
    """

    def __init__(self, items: Iterable[T], places: Sequence[Place], report: SourceReport) -> None:
        super().__init__(items)
        if len(self) != len(places):
            raise ValueError(f"{len(self)} items with {len(places)} places")
        self.places = list(places)
        self.report = report


class Collector:
    """Checks texts, normalises them to NFC and counts; one `add` for each item."""

    def __init__(self, controls: Controls) -> None:
        if controls not in ("refuse", "remove"):
            raise UserError(f"controls is {controls!r}: it must be 'refuse' or 'remove'")
        self.controls = controls
        self.items: list[Any] = []
        self.places: list[Place] = []
        self.characters = self.bytes = self.normalised = self.removed = 0

    def check(self, text: str, place: Place) -> str:
        """The text without control characters: refused or removed, as was asked for."""
        found = _CONTROL.search(text)
        if found is None:
            return text
        if self.controls == "remove":
            text, removed = _CONTROL.subn("", text)
            self.removed += removed
            return text
        code = ord(found[0])
        what = "a carriage return (U+000D)" if code == 0x0D else f"the control character U+{code:04X}"
        mend = "save the file with Unix line ends" if code == 0x0D else "remove it"
        mend += ", or have it removed (controls: remove; --remove-controls)"
        raise UserError(f"{place} has {what} at column {found.start() + 1}: {mend}")

    def add(self, item: Any, place: Place) -> None:
        clean = _map_texts(item, lambda text: unicodedata.normalize("NFC", text))
        self.normalised += clean != item
        for text in _texts(clean):
            self.characters += len(text)
            self.bytes += len(text.encode())
        self.items.append(clean)
        self.places.append(place)

    def finish(self, path: str | Path, what: str) -> Loaded[Any]:
        if not self.items:
            raise UserError(f"{path} has no {what}: give a file with text in it, or leave it out")
        report = SourceReport(len(self.items), self.characters, self.bytes, self.normalised, self.removed)
        return Loaded(self.items, self.places, report)


def _texts(item: Any) -> Iterator[str]:
    """Every string value inside a string, tuple, list or dict (keys are not text)."""
    if isinstance(item, str):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _texts(value)
    elif isinstance(item, list | tuple):
        for value in item:
            yield from _texts(value)


def _map_texts(item: Any, function: Callable[[str], str]) -> Any:
    """The same item with `function` applied to every string value."""
    if isinstance(item, str):
        return function(item)
    if isinstance(item, Mapping):
        return {key: _map_texts(value, function) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(_map_texts(value, function) for value in item)
    return item


def resolve(path: str | Path) -> list[Path]:
    """The files that a path or glob means, sorted by name. UserError for none and for a directory."""
    exact = Path(path)
    if exact.is_file():
        return [exact]
    if exact.is_dir():
        raise UserError(f"{path} is a directory: name its files, for instance {exact / '*.txt'}")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"no file matches {path}: check the path, relative to where the command was started")
    return found


def _open(stream: IO[bytes], suffix: str) -> IO[bytes] | gzip.GzipFile:
    if suffix == ".xz":
        return lzma.open(stream, "rb")
    if suffix == ".gz":
        return gzip.open(stream, "rb")
    return stream


def _lines(
    path: str | Path, collector: Collector, at: Callable[[int], None] | None = None
) -> Iterator[tuple[str, Place]]:
    """Lines of all files that `path` means, without line ends; encoding and control characters are checked.

    Only U+000A ends a line (the others, such as U+2028, occur inside texts). A byte order mark at the start
    of a file is no part of the text. at: is told now and then how many bytes of the file have been read (of a
    compressed one, compressed bytes).
    """
    for file in resolve(path):
        offset = 0
        place = Place(str(file), 1)
        try:
            with file.open("rb") as whole, _open(whole, file.suffix) as stream:
                for number, raw in enumerate(iter(partial(stream.readline, _LONGEST_LINE), b""), 1):
                    place = Place(str(file), number)
                    if len(raw) == _LONGEST_LINE and not raw.endswith(b"\n"):
                        raise UserError(f"{place} is longer than {_LONGEST_LINE >> 20} MiB: break the line")
                    yield collector.check(_decode(raw, place, offset), place), place
                    offset += len(raw)
                    if at is not None and number % _TOLD_LINES == 0:
                        at(whole.tell())
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"{place} cannot be decompressed ({error}): the file is damaged, fetch it again") from error
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
        if offset == 0:
            raise UserError(f"{file} is empty: give a file with text in it, or leave it out")


def _decode(raw: bytes, place: Place, offset: int) -> str:
    try:
        line = raw.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start} of "
            "the file; save it as UTF-8 (compressed files are known by their suffix, .xz or .gz)"
        ) from error
    return line.removeprefix("\ufeff") if place.line == 1 else line


def read_documents(
    path: str | Path,
    *,
    limit: int | None = None,
    separator: Separator = "blank line",
    controls: Controls = "refuse",
) -> Loaded[str]:
    """Documents of plain UTF-8 text.

    path: a file (.xz and .gz are decompressed) or a glob; a document never runs over the end of its file.
    separator: what stands between documents; with a blank line, the line ends inside a document are kept.
    limit: at most this many UTF-8 bytes from the start, cut at a line end (at least one line is taken).
    controls: control characters other than tab and line feed are refused, or removed and counted. Texts are
    normalised to NFC and counted. Raises UserError with file and line for an empty file, bytes that are not
    UTF-8, control characters, and a path without a file.
    """
    collector = Collector(controls)
    for text, place in iter_documents(path, collector, separator=separator, limit=limit):
        collector.add(text, place)
    return collector.finish(path, "documents")


def iter_documents(
    path: str | Path,
    collector: Collector,
    *,
    separator: Separator = "blank line",
    limit: int | None = None,
    longest: int | None = None,
    at: Callable[[int], None] | None = None,
) -> Iterator[tuple[str | None, Place]]:
    """The documents of `read_documents` one at a time, with their places; none is kept, and none normalised.

    collector: refuses or removes control characters, and counts those. longest: a document of more UTF-8 bytes is
    given as None, and is never in memory whole. at: see `_lines`. Raises UserError as `read_documents` does, but not
    for a path without documents.
    """
    if separator not in ("blank line", "line"):
        raise UserError(f"separator is {separator!r}: it must be 'blank line' or 'line'")
    lines: list[str] = []
    size, given, start = 0, False, Place("", 0)
    room = limit if limit is not None else float("inf")
    for line, place in _lines(path, collector, at):
        blank = not line.strip()
        if size and (blank or separator == "line" or place.path != start.path):
            yield ("\n".join(lines) if lines else None), start
            size, given = 0, True
            lines.clear()
        if blank:
            continue
        more = len(line.encode()) + bool(size)
        room -= more
        if room < 0 and (size or given):
            break
        if not size:
            start = place
        size += more
        if longest is not None and size > longest:
            lines.clear()
        else:
            lines.append(line)
    if size:
        yield ("\n".join(lines) if lines else None), start


def read_pairs(path: str | Path, *, limit: int | None = None, controls: Controls = "refuse") -> Loaded[tuple[str, str]]:
    """Pairs (English, target language) from tab-separated lines; space around a side is removed.

    limit: at most this many pairs from the start. controls: as in `read_documents`. Raises UserError with
    file and line for an empty side or another number of tabs than one, and for what `read_documents` refuses.
    """
    collector = Collector(controls)
    for line, place in _lines(path, collector):
        if limit is not None and len(collector.items) >= limit:
            break
        sides = tuple(side.strip() for side in line.split("\t"))
        if len(sides) != 2:
            raise UserError(f"{place} has {len(sides) - 1} tabs: write English, one tab, the translation")
        for name, side in zip(("English", "target-language"), sides, strict=True):
            if not side:
                raise UserError(f"{place} has an empty {name} side: fill it in or remove the line")
        collector.add(sides, place)
    return collector.finish(path, "pairs")


def read_jsonl(
    path: str | Path,
    required: Sequence[str] | Mapping[str, type] = ("instruction",),
    *,
    limit: int | None = None,
    controls: Controls = "refuse",
) -> Loaded[dict[str, Any]]:
    """Records, one JSON object a line (blank lines are passed over); other fields than `required` are kept.

    required: names of fields that must hold a non-empty string, or name -> type for other types (a list must
    not be empty either). limit: at most this many records from the start. controls: as in `read_documents`.
    Raises UserError with file and line for a broken line, a missing or empty field, a wrong type, a control
    character, and for what `read_documents` refuses.
    """
    fields = required if isinstance(required, Mapping) else dict.fromkeys(required, str)
    collector = Collector(controls)
    for line, place in _lines(path, collector):
        if limit is not None and len(collector.items) >= limit:
            break
        if not line.strip():
            continue
        record = _record(line, fields, place)
        collector.add(_map_texts(record, partial(collector.check, place=place)), place)
    return collector.finish(path, "records")


def _record(line: str, fields: Mapping[str, type], place: Place) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}): write one complete object a line") from error
    if not isinstance(record, dict):
        raise UserError(f"{place} is JSON but not an object: write {{{', '.join(f'{f!r}: ...' for f in fields)}}}")
    for name, kind in fields.items():
        if name not in record:
            raise UserError(f"{place} has no field {name!r} (it has: {', '.join(map(str, record)) or 'none'}): add it")
        value = record[name]
        # bool is an int to Python, not to whoever writes a number
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = _TYPE_NAMES.get(kind, kind.__name__)
            raise UserError(f"{place}: field {name!r} must be {wanted}, not {json.dumps(value)[:40]}")
        if (isinstance(value, str) and not value.strip()) or value in ([], {}):
            raise UserError(f"{place}: field {name!r} is empty: fill it in or remove the line")
    for text in _texts(record):
        if _SURROGATE.search(text):
            raise UserError(f"{place} has half of a surrogate pair (\\ud800 to \\udfff): write the whole character")
    return record


def check_no_special(
    texts: Iterable[Any], find_special: Callable[[str], str | None], where: str | Path | None = None
) -> None:
    """Refuse special tokens and markers inside user data, which the tokenizer would parse as what they name.

    texts: a `Loaded`, or any iterable of strings, pairs or records (then `where` says in the message what it
    is). find_special: the tokenizer's; gives the first special token in a text, or None. Raises UserError
    with file:line.
    """
    places = texts.places if isinstance(texts, Loaded) else None
    for index, item in enumerate(texts):
        for text in _texts(item):
            special = find_special(text)
            if special is None:
                continue
            if places is not None:
                place = places[index]
                # a document runs over several lines; records and pairs stand on one
                below = text[: text.find(special)].count("\n") if isinstance(item, str) else 0
                at = str(Place(place.path, place.line + below))
            else:
                at = f"{where or 'the data'}, item {index + 1}"
            raise UserError(f"{at} contains the special token {special}: remove it or write it in another way")
