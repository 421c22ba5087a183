"""Files of text: which they are, their bytes decompressed, decoded and checked, and where each line stands."""

from __future__ import annotations

import glob
import gzip
import io
import json
import lzma
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar

import zstandard

from transllm_jax.choices import Controls, OnBadRows
from transllm_jax.errors import UserError

T = TypeVar("T")

# Category Cc without tab and line feed. Zero-width and other format characters (Cf) are text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LONGEST_LINE = 64 << 20  # bytes: a file without line ends must not fill the memory
_NOTED = 100_000  # bad rows of a shard that are kept to be written, and how much of each
_NOTED_CHARACTERS = 2000
_TOLD_LINES = 2000  # lines between two tellings of how far a file is read
_BLOCK = 1 << 12  # bytes that are decompressed at a time
_ZST_WINDOW = 1 << 31  # bytes: what `zstd --long=31` writes, as large corpora are
COMPRESSED = (".gz", ".xz", ".zst")


class Place(NamedTuple):
    """Where an item stands: its file and its first line, or its row or record where there are no lines; from 1."""

    path: str
    line: int
    unit: Literal["line", "row", "record"] = "line"

    def __str__(self) -> str:
        return f"{self.path}:{'' if self.unit == 'line' else self.unit + ' '}{self.line}"


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


class BadRow(UserError):
    """What is wrong with one row of a source, and with nothing else of it.

    reason: short, one of few, to count by. row: the row itself, where it is known.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.row: Any = None

    def __reduce__(self) -> Any:  # from a process that read a part of a source
        return BadRow, (str(self), self.reason), {"row": self.row}


def attempt(make: Callable[..., T], row: Any, *arguments: Any) -> T | BadRow:
    """`make(row, *arguments)`, or what is wrong with the row."""
    try:
        return make(row, *arguments)
    except BadRow as error:
        error.row = row
        return error


def refusing(rows: Iterable[tuple[T | BadRow, Place]]) -> Iterator[tuple[T, Place]]:
    """The rows, all of which must be good. Raises BadRow."""
    for row, place in rows:
        if isinstance(row, BadRow):
            raise row
        yield row, place


class Collector:
    """Checks texts, normalises them to NFC and counts: one `take` for each item, or one `add`, which keeps it too.

    on_bad_rows: whether `bad` raises what is wrong with a row, or notes it.
    """

    def __init__(self, controls: Controls, on_bad_rows: OnBadRows = "refuse") -> None:
        self.on_bad_rows = on_bad_rows
        # The rows that were skipped, as they are written; reason -> how many there were.
        self.bad_rows: list[dict[str, Any]] = []
        self.skipped: Counter[str] = Counter()
        if controls not in ("refuse", "remove"):
            raise UserError(f"controls is {controls!r}: it must be 'refuse' or 'remove'")
        self.controls = controls
        self.items: list[Any] = []
        self.places: list[Place] = []
        self.documents = 0
        self.characters = self.bytes = self.normalised = self.removed = 0
        # Fields of records that nobody reads -> in how many records.
        self.ignored: Counter[str] = Counter()

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
        raise BadRow(f"{place} has {what} at column {found.start() + 1}: {mend}", "control character")

    def bad(self, error: BadRow, place: Place) -> None:
        """Refuse a bad row, or note and skip it, as was asked for. Raises BadRow."""
        if self.on_bad_rows == "refuse":
            raise BadRow(f"{error}; or leave such rows out (on_bad_rows: skip)", error.reason) from error
        self.skipped[error.reason] += 1
        if len(self.bad_rows) < _NOTED:
            row = error.row.decode("utf-8", "backslashreplace") if isinstance(error.row, bytes) else error.row
            row = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
            # Halves of surrogate pairs, which may be what is wrong, cannot be written.
            row = row[:_NOTED_CHARACTERS].encode("utf-8", "backslashreplace").decode()
            fault = str(error).encode("utf-8", "backslashreplace").decode()
            self.bad_rows.append({"place": str(place), "reason": error.reason, "fault": fault, "row": row})

    def take(self, item: T) -> T:
        """The item in NFC, counted and not kept."""
        clean = map_texts(item, _nfc)
        self.documents += 1
        self.normalised += clean != item
        for text in texts_of(clean):
            self.characters += len(text)
            self.bytes += len(text) if text.isascii() else len(text.encode())
        return clean

    def add(self, item: Any, place: Place) -> None:
        """Take an item, and keep it and its place for `finish`."""
        self.items.append(self.take(item))
        self.places.append(place)

    @property
    def report(self) -> SourceReport:
        """What was taken so far."""
        return SourceReport(self.documents, self.characters, self.bytes, self.normalised, self.removed)

    def finish(self, path: str | Path, what: str) -> Loaded[Any]:
        """The items that were added. Raises UserError that names the path where there is none."""
        if not self.items:
            raise no_items(path, what)
        return Loaded(self.items, self.places, self.report)


def no_items(path: str | Path, what: str) -> UserError:
    """The error for a source without documents, pairs, ..."""
    return UserError(f"{path} has no {what}: give a file with text in it, or leave it out")


def _nfc(text: str) -> str:
    # Nearly all text is NFC already, and to see that is several times as fast as to make it so.
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


# White space, and what has no width: soft hyphens, joiners, direction marks, byte order marks.
_INVISIBLE = re.compile(r"[\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff]*")


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen."""
    return _INVISIBLE.fullmatch(text) is not None


def texts_of(item: Any) -> Iterator[str]:
    """Every string value inside a string, tuple, list or dict (keys are not text)."""
    if isinstance(item, str):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from texts_of(value)
    elif isinstance(item, list | tuple):
        for value in item:
            yield from texts_of(value)


def map_texts(item: Any, function: Callable[[str], str]) -> Any:
    """The same item with `function` applied to every string value."""
    if isinstance(item, str):
        return function(item)
    if isinstance(item, Mapping):
        return {key: map_texts(value, function) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(map_texts(value, function) for value in item)
    return item


def resolve(path: str | Path) -> list[Path]:
    """The files that a path or glob means, which may begin with ~, by name. UserError for none and for a directory."""
    path = os.path.expanduser(path)
    exact = Path(path)
    if exact.is_file():
        return [exact]
    if exact.is_dir():
        raise UserError(f"{path} is a directory: name its files, for instance {exact / '*.txt'}")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"no file matches {path}: check the path, relative to where the command was started")
    return found


class _Frames(io.RawIOBase):
    """The content of a compressed file of any number of frames, one behind the other. One cut off is an EOFError.

    begin: what decompresses the next frame. padding: the byte that may stand between two frames. Python's own reader of
    .xz takes whatever does not begin as a frame for the end of the file: behind padding, which xz allows, or a damaged
    byte the rest would be missing, and nobody told.
    """

    def __init__(self, stream: IO[bytes], begin: Callable[[], Any], padding: bytes = b"") -> None:
        self._stream, self._begin, self._padding = stream, begin, padding
        self._rest = memoryview(b"")  # decompressed, and not read yet
        self._next = b""  # compressed, behind the end of a frame
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            data, self._next = self._next or self._stream.read(_BLOCK), b""
            if not data and self._frame is None:
                return 0
            if not data:
                raise EOFError("it ends inside a frame")
            if self._frame is None:
                data = data.lstrip(self._padding)
                if not data:
                    continue
                self._frame = self._begin()
            self._rest = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._next, self._frame = self._frame.unused_data, None
        given = self._rest[: len(buffer)]
        buffer[: len(given)] = given
        self._rest = self._rest[len(given) :]
        return len(given)


def _open(stream: IO[bytes], suffix: str) -> IO[bytes] | gzip.GzipFile | io.BufferedReader:
    if suffix == ".xz":
        return io.BufferedReader(_Frames(stream, lzma.LZMADecompressor, padding=b"\0"), 1 << 17)
    if suffix == ".gz":
        return gzip.open(stream, "rb")
    if suffix == ".zst":
        begin = zstandard.ZstdDecompressor(max_window_size=_ZST_WINDOW).decompressobj
        return io.BufferedReader(_Frames(stream, begin), 1 << 17)
    return stream


def read_lines(
    path: str | Path | Sequence[Path], collector: Collector, at: Callable[[int], None] | None = None
) -> Iterator[tuple[str | BadRow, Place]]:
    """Lines of all files that `path` means (or of these files), without line ends.

    Encoding and control characters are checked; a line that is bad is given as what is wrong with it. Only U+000A ends
    a line (the others, such as U+2028, occur inside texts). A byte order mark at the start of a file is no part of the
    text. at: is told now and then how many bytes of the file have been read (of a compressed one, compressed bytes).
    """
    for file in resolve(path) if isinstance(path, str | Path) else path:
        offset = 0
        place = Place(str(file), 1)
        try:
            with file.open("rb") as whole, _open(whole, file.suffix.lower()) as stream:
                for number, raw in enumerate(iter(partial(stream.readline, _LONGEST_LINE), b""), 1):
                    place = Place(str(file), number)
                    if len(raw) == _LONGEST_LINE and not raw.endswith(b"\n"):
                        raise UserError(f"{place} is longer than {_LONGEST_LINE >> 20} MiB: break the line")
                    yield attempt(_line, raw, collector, place, offset), place
                    offset += len(raw)
                    if at is not None and number % _TOLD_LINES == 0:
                        at(whole.tell())
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
            raise UserError(f"{place} cannot be decompressed ({error}): the file is damaged, fetch it again") from error
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
        if offset == 0:
            raise UserError(f"{file} is empty: give a file with text in it, or leave it out")


def _line(raw: bytes, collector: Collector, place: Place, offset: int) -> str:
    return collector.check(_decode(raw, place, offset), place)


def _decode(raw: bytes, place: Place, offset: int) -> str:
    try:
        line = raw.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        fault = (
            f"{place} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start} of "
            "the file; save it as UTF-8 (compressed files are known by their suffix, .xz, .gz or .zst)"
        )
        # A file that begins so is in another encoding, or no text; in the midst of one it is a line's fault.
        raise (UserError(fault) if place.line == 1 else BadRow(fault, "not UTF-8")) from error
    return line.removeprefix("\ufeff") if place.line == 1 else line
