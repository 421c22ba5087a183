"""Readers of text, pairs and records that fit in memory.

Every reader returns a `Loaded` list, which keeps the file and line of each item, so that a fault that is found later
(such as a marker inside a text) is reported with its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transllm_jax.choices import Controls, Separator
from transllm_jax.data.read.files import (
    BadRow,
    Collector,
    Loaded,
    Place,
    catch_bad_row,
    is_blank,
    map_texts,
    raise_bad_rows,
    read_lines,
    resolve,
    texts_of,
)
from transllm_jax.data.read.headers import is_header
from transllm_jax.data.read.parquet import iter_rows
from transllm_jax.data.read.records import check_surrogates, iter_json, require
from transllm_jax.errors import UserError


def read_documents(
    path: str | Path,
    *,
    max_bytes: int | None = None,
    separator: Separator = "blank line",
    controls: Controls = "refuse",
) -> Loaded[str]:
    """Documents of plain UTF-8 text.

    path: a file (.xz, .gz and .zst are decompressed) or a glob; a document ends with its file at the latest.
    separator: what separates documents; with a blank line, the line ends inside a document are kept. max_bytes: read at
    most this many UTF-8 bytes from the start, cut at a line end (but at least one line). controls: whether control
    characters other than tab and line feed are refused, or removed and counted. Texts are normalised to NFC and
    counted. Raises UserError with file and line for an empty file, bytes that are not UTF-8, control characters, and a
    path that matches no file.
    """
    collector = Collector(controls)
    for text, place in iter_documents(path, collector, separator=separator, max_bytes=max_bytes):
        collector.add(text, place)
    return collector.finish(path, "documents")


def iter_documents(
    path: str | Path | Sequence[Path],
    collector: Collector,
    *,
    separator: Separator = "blank line",
    max_bytes: int | None = None,
    longest: int | None = None,
    on_read: Callable[[int], None] | None = None,
) -> Iterator[tuple[str | None, Place]]:
    """The documents of `read_documents` one at a time, with their places; not kept and not normalised.

    collector: refuses control characters, or removes and counts them. longest: a document of more UTF-8 bytes is given
    as None, and is never in memory as a whole. on_read: see `files.read_lines`. Raises UserError as `read_documents`
    does, but not for a path without documents.
    """
    return raise_bad_rows(
        document_rows(path, collector, separator=separator, max_bytes=max_bytes, longest=longest, on_read=on_read),
    )


def document_rows(
    path: str | Path | Sequence[Path],
    collector: Collector,
    *,
    separator: Separator = "blank line",
    max_bytes: int | None = None,
    longest: int | None = None,
    on_read: Callable[[int], None] | None = None,
) -> Iterator[tuple[str | BadRow | None, Place]]:
    """As `iter_documents`, with a BadRow in place of a bad document."""
    if separator not in ("blank line", "line"):
        raise UserError(f"separator is {separator!r}: it must be 'blank line' or 'line'")
    lines: list[str] = []  # of the current document; empty once it is longer than `longest`
    size, start = 0, Place("", 0)  # its UTF-8 bytes, and its place
    fault: BadRow | None = None  # its first bad line
    given = False  # whether a document was yielded already

    def document() -> str | BadRow | None:
        if fault is not None:
            fault.row = "\n".join(lines)
            return fault
        return "\n".join(lines) if lines else None

    room = max_bytes if max_bytes is not None else float("inf")
    for found, place in read_lines(path, collector, on_read):
        bad = isinstance(found, BadRow)
        line = found if isinstance(found, str) else found.row.decode("utf-8", "backslashreplace").rstrip("\n")
        blank = not bad and not line.strip()
        if size and (blank or separator == "line" or place.path != start.path):
            yield document(), start
            size, given, fault = 0, True, None
            lines.clear()
        if isinstance(found, BadRow):
            fault = fault or found
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
        yield document(), start


def read_pairs(path: str | Path, *, limit: int | None = None, controls: Controls = "refuse") -> Loaded[tuple[str, str]]:
    """Pairs (English, target language) from tab-separated lines; white space around a side is removed.

    limit: read at most this many pairs from the start. controls: as in `read_documents`. Raises UserError with file and
    line for an empty side, a line without exactly one tab, column names in the first line, and for what
    `read_documents` refuses.
    """
    collector = Collector(controls)
    for sides, place in iter_pairs(path, collector):
        if limit is not None and len(collector.items) >= limit:
            break
        collector.add(sides, place)
    return collector.finish(path, "pairs")


def iter_pairs(path: str | Path | Sequence[Path], collector: Collector) -> Iterator[tuple[tuple[str, str], Place]]:
    """The pairs of `read_pairs` one at a time, with their places; not kept and not normalised."""
    return raise_bad_rows(pair_rows(path, collector))


def pair_rows(
    path: str | Path | Sequence[Path], collector: Collector
) -> Iterator[tuple[tuple[str, str] | BadRow, Place]]:
    """As `iter_pairs`, with a BadRow in place of a bad pair."""
    for line, place in read_lines(path, collector):
        yield (line if isinstance(line, BadRow) else catch_bad_row(_pair_of_line, line, place)), place


def _pair_of_line(line: str, place: Place) -> tuple[str, str]:
    sides = line.split("\t")
    if len(sides) != 2:
        message = f"{place} has {len(sides) - 1} tabs: write English, one tab, the translation"
        raise BadRow(message, "not one tab")
    return _pair((sides[0], sides[1]), place, place)


def aligned_rows(english: Path, target: Path, collector: Collector) -> Iterator[tuple[tuple[str, str] | BadRow, Place]]:
    """Pairs from two files: each line of `english` with the same line of `target`; the place is that in `english`.

    White space around a side is removed. A bad pair, such as one with an empty line, is given as a BadRow. Raises
    UserError if one file has more lines than the other.
    """
    last = Place(str(english), 0)
    for one, other in zip_longest(read_lines([english], collector), read_lines([target], collector)):
        if one is None or other is None:
            short, long = (english, target) if one is None else (target, english)
            raise UserError(
                f"{short} has {last.line} lines and {long} has more: line n of one file must be the translation of "
                "line n of the other"
            )
        last = one[1]
        bad = next((line for line, _ in (one, other) if isinstance(line, BadRow)), None)
        yield (catch_bad_row(_pair, (one[0], other[0]), one[1], other[1]) if bad is None else bad), one[1]


def _pair(sides: tuple[str, str], place: Place, target_place: Place) -> tuple[str, str]:
    english, target = (side.strip() for side in sides)
    if is_blank(english):
        raise BadRow(f"{place} has an empty English side: fill it in or remove the line", "empty side")
    if is_blank(target):
        raise BadRow(f"{target_place} has an empty target-language side: fill it in or remove the line", "empty side")
    if place.line == 1 and is_header(english, target):
        raise BadRow(
            f"{place} names the columns ({english[:40]!r} and {target[:40]!r}) and is not a pair: remove the line",
            "header line",
        )
    return english, target


def read_jsonl(
    path: str | Path,
    required: Sequence[str] | Mapping[str, type] = ("instruction",),
    *,
    limit: int | None = None,
    controls: Controls = "refuse",
) -> Loaded[dict[str, Any]]:
    """Records from JSON (an object per line, or one list of them) or parquet; all fields are kept.

    required: names of fields that must hold a non-empty string, or name -> type for other types (a list must not be
    empty either). limit: read at most this many records from the start. controls: as in `read_documents`. Raises
    UserError with file and line for a broken line, a missing or empty field, a wrong type, a control character, and for
    what `read_documents` refuses.
    """
    fields = required if isinstance(required, Mapping) else dict.fromkeys(required, str)
    collector = Collector(controls)
    for record, place in _records(path, tuple(fields), collector):
        if limit is not None and len(collector.items) >= limit:
            break
        for name, kind in fields.items():
            require(record, name, kind, place)
        check_surrogates(record, place)
        collector.add(map_texts(record, partial(collector.check, place=place)), place)
    return collector.finish(path, "records")


def _records(path: str | Path, fields: tuple[str, ...], collector: Collector) -> Iterator[tuple[dict[str, Any], Place]]:
    for file in resolve(path):
        if file.suffix.lower() == ".parquet":
            yield from iter_rows(file, fields, None)
        else:
            yield from raise_bad_rows(iter_json(file, collector, fields=fields))


def check_no_special(
    texts: Iterable[Any], find_special: Callable[[str], str | None], where: str | Path | None = None
) -> None:
    """Raise UserError for a special token or marker inside user data, which the tokenizer would encode as one token.

    texts: a `Loaded`, whose file:line the message gives, or any iterable of strings, pairs or records, which the
    message calls `where`. find_special: returns the first special token in a text, or None, as a tokenizer's method.
    """
    places = texts.places if isinstance(texts, Loaded) else None
    for index, item in enumerate(texts):
        at = f"{where or 'the data'}, item {index + 1}" if places is None else places[index]
        refuse_special(item, find_special, at)


def refuse_special(item: Any, find_special: Callable[[str], str | None], at: Place | str) -> None:
    """`check_no_special` for one item from the place `at`."""
    for text in texts_of(item):
        special = find_special(text)
        if special is None:
            continue
        if isinstance(at, Place) and at.unit == "line" and isinstance(item, str):
            # A document has several lines; a record or pair is on one.
            at = at._replace(line=at.line + text[: text.find(special)].count("\n"))
        message = f"{at} contains the special token {special}: remove it or write it in another way"
        raise BadRow(message, "special token")
