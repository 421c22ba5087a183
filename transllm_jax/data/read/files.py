"""Text files: finds them, decompresses, decodes and checks them, and gives each line with its place."""

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
_NOTED = 100_000  # at most this many bad rows of a shard are kept,
_NOTED_CHARACTERS = 2000  # and this many characters of each
_LINES_PER_UPDATE = 2000  # lines between two calls of `on_read`
_BLOCK = 1 << 12  # bytes that are decompressed at a time
_ZST_WINDOW = 1 << 31  # bytes: the window of `zstd --long=31`, with which large corpora are compressed
COMPRESSED = (".gz", ".xz", ".zst")


class Place(NamedTuple):
    """Where an item comes from: its file and its first line (row or record in files without lines), from 1."""

    path: str
    line: int
    unit: Literal["line", "row", "record"] = "line"

    def __str__(self) -> str:
        return f"{self.path}:{'' if self.unit == 'line' else self.unit + ' '}{self.line}"


@dataclass(frozen=True)
class SourceReport:
    """What was read from a source: number of items, and characters and UTF-8 bytes of their text.

    normalised: items that were not in NFC. removed: control characters taken out (with controls="remove").
    """

    documents: int
    characters: int
    bytes: int
    normalised: int
    removed: int = 0


class Loaded(list[T]):
    """The items of a source, as a list, with `places` (one for each item) and a `report`.

    A slice or sorted copy of it is a plain list without places.
    """

    def __init__(self, items: Iterable[T], places: Sequence[Place], report: SourceReport) -> None:
        super().__init__(items)
        if len(self) != len(places):
            raise ValueError(f"{len(self)} items with {len(places)} places")
        self.places = list(places)
        self.report = report


class BadRow(UserError):
    """What is wrong with one row of a source; the other rows can still be read.

    reason: a short category, by which bad rows are counted. in_all_rows: whether the other rows most likely have it,
    too, so that leaving such rows out leaves nothing. row: the row itself, if known.
    """

    def __init__(self, message: str, reason: str, *, in_all_rows: bool = False) -> None:
        super().__init__(message)
        self.reason, self.in_all_rows = reason, in_all_rows
        self.row: Any = None

    def __reduce__(self) -> Any:  # pickled by a process that reads a part of a source
        return BadRow, (str(self), self.reason), {"row": self.row}


def catch_bad_row(make: Callable[..., T], row: Any, *arguments: Any) -> T | BadRow:
    """`make(row, *arguments)`, or the BadRow that it raised."""
    try:
        return make(row, *arguments)
    except BadRow as error:
        error.row = row
        return error


def raise_bad_rows(rows: Iterable[tuple[T | BadRow, Place]]) -> Iterator[tuple[T, Place]]:
    """The rows; raises the first BadRow among them."""
    for row, place in rows:
        if isinstance(row, BadRow):
            raise row
        yield row, place


class Collector:
    """Checks texts, normalises them to NFC and counts them: by `take` for each item, or by `add`, which also keeps it.

    on_bad_rows: whether `refuse_or_skip` raises a bad row or notes it.
    """

    def __init__(self, controls: Controls, on_bad_rows: OnBadRows = "refuse") -> None:
        self.on_bad_rows = on_bad_rows
        # The rows that were skipped, as they will be written; reason -> number of skipped rows.
        self.bad_rows: list[dict[str, Any]] = []
        self.skipped: Counter[str] = Counter()
        if controls not in ("refuse", "remove"):
            raise UserError(f"controls is {controls!r}: it must be 'refuse' or 'remove'")
        self.controls = controls
        self.items: list[Any] = []
        self.places: list[Place] = []
        self.documents = 0
        self.characters = self.bytes = self.normalised = self.removed = 0
        # Name of a field that is not read -> number of records that have it.
        self.ignored: Counter[str] = Counter()

    def check(self, text: str, place: Place) -> str:
        """The text without control characters, which are removed, or refused with BadRow, as `controls` says."""
        found = _CONTROL.search(text)
        if found is None:
            return text
        if self.controls == "remove":
            text, removed = _CONTROL.subn("", text)
            self.removed += removed
            return text
        code = ord(found[0])
        what = "a carriage return (U+000D)" if code == 0x0D else f"the control character U+{code:04X}"
        fix = "save the file with Unix line ends" if code == 0x0D else "remove it"
        fix += ", or have it removed (controls: remove; --remove-controls)"
        # A file with other line ends has all of its rows so.
        raise BadRow(
            f"{place} has {what} at column {found.start() + 1}: {fix}", "control character", in_all_rows=code == 0x0D
        )

    def refuse_or_skip(self, error: BadRow, place: Place) -> None:
        """Raise a BadRow, or note it so that the row is skipped, as `on_bad_rows` says."""
        if self.on_bad_rows == "refuse":
            skip = "" if error.in_all_rows else "; or leave such rows out (on_bad_rows: skip)"
            raise BadRow(f"{error}{skip}", error.reason) from error
        self.skipped[error.reason] += 1
        if len(self.bad_rows) < _NOTED:
            row = error.row.decode("utf-8", "backslashreplace") if isinstance(error.row, bytes) else error.row
            row = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
            # A half of a surrogate pair, which may be the fault, cannot be written as UTF-8.
            row = row[:_NOTED_CHARACTERS].encode("utf-8", "backslashreplace").decode()
            fault = str(error).encode("utf-8", "backslashreplace").decode()
            self.bad_rows.append({"place": str(place), "reason": error.reason, "fault": fault, "row": row})

    def take(self, item: T) -> T:
        """Count an item, and return it in NFC."""
        clean = map_texts(item, _nfc)
        self.documents += 1
        self.normalised += clean != item
        for text in texts_of(clean):
            self.characters += len(text)
            self.bytes += len(text) if text.isascii() else len(text.encode())
        return clean

    def add(self, item: Any, place: Place) -> None:
        """Count an item, and keep it and its place for `finish`."""
        self.items.append(self.take(item))
        self.places.append(place)

    @property
    def report(self) -> SourceReport:
        """The counts so far."""
        return SourceReport(self.documents, self.characters, self.bytes, self.normalised, self.removed)

    def finish(self, path: str | Path, what: str) -> Loaded[Any]:
        """The items that were added. Raises UserError with the path if there are none."""
        if not self.items:
            raise no_items(path, what)
        return Loaded(self.items, self.places, self.report)


def no_items(path: str | Path, what: str) -> UserError:
    """The error for a source without documents, pairs, ..."""
    return UserError(f"{path} has no {what}: give a file with text in it, or leave it out")


def _nfc(text: str) -> str:
    # Nearly all text is in NFC already, and checking is several times as fast as normalising.
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


# White space and characters without width: soft hyphens, joiners, direction marks, byte order marks.
_INVISIBLE = re.compile(r"[\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff]*")


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
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
    """The files that match a path or glob, sorted by name; ~ is expanded. Raises UserError for none and a directory."""
    path = os.path.expanduser(path)
    exact = Path(path)
    if exact.is_file():
        return [exact]
    if exact.is_dir():
        raise UserError(f"{path} is a directory: name its files, for instance '{exact / '*.txt'}'")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"no file matches {path}: check the path, relative to where the command was started")
    return found


class _Frames(io.RawIOBase):
    """The decompressed content of a file of any number of frames in sequence. Raises EOFError for a truncated frame.

    begin: makes the decompressor of the next frame. padding: the byte that may occur between two frames. Python's own
    .xz reader ends without an error at anything that is not the start of a frame, and so would lose what follows
    padding, which xz allows, or a damaged byte.
    """

    def __init__(self, stream: IO[bytes], begin: Callable[[], Any], padding: bytes = b"") -> None:
        self._stream, self._begin, self._padding = stream, begin, padding
        self._rest = memoryview(b"")  # decompressed, not read yet
        self._next = b""  # compressed, after the end of a frame
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
    path: str | Path | Sequence[Path],
    collector: Collector,
    on_read: Callable[[int], None] | None = None,
    *,
    windows: bool = False,
) -> Iterator[tuple[str | BadRow, Place]]:
    """Lines of all files that match `path` (or of these files), without line ends; a BadRow in place of a bad line.

    Encoding and control characters are checked. Only U+000A ends a line (others, such as U+2028, occur inside texts). A
    byte order mark at the start of a file is not part of the text. on_read: called now and then with the number of
    bytes of the file read so far (compressed bytes of a compressed file). windows: whether a line may also end with
    U+000D U+000A, as in JSON, where both are white space.
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
                    yield catch_bad_row(_line, raw, collector, place, offset, windows), place
                    offset += len(raw)
                    if on_read is not None and number % _LINES_PER_UPDATE == 0:
                        on_read(whole.tell())
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
            raise UserError(f"{place} cannot be decompressed ({error}): the file is damaged, fetch it again") from error
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
        if offset == 0:
            raise UserError(f"{file} is empty: give a file with text in it, or leave it out")


def _line(raw: bytes, collector: Collector, place: Place, offset: int, windows: bool) -> str:
    line = _decode(raw, place, offset)
    return collector.check(line.removesuffix("\r") if windows else line, place)


def _decode(raw: bytes, place: Place, offset: int) -> str:
    try:
        line = raw.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        fault = (
            f"{place} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start} of "
            "the file; save it as UTF-8 (compressed files are known by their suffix, .xz, .gz or .zst)"
        )
        # On its first line the whole file is in another encoding, or not text; later only the line is bad.
        raise (UserError(fault) if place.line == 1 else BadRow(fault, "not UTF-8")) from error
    return line.removeprefix("\ufeff") if place.line == 1 else line
