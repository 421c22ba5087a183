"""Records: JSON objects, one per line or in a list, and the texts in the fields of any record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transllm_jax.data.read.files import (
    BadRow,
    Collector,
    Place,
    catch_bad_row,
    is_blank,
    raise_bad_rows,
    read_lines,
    texts_of,
)
from transllm_jax.errors import UserError

Record = Mapping[str, Any]

_LARGEST = 64 << 20  # characters of an object: one that never ends must not fill the memory
_SURROGATE = re.compile("[\ud800-\udfff]")
_TYPE_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "an object", int: "a number"}
# What delimits objects in a list: whole strings, brackets, and the start of a string that does not end on its line.
_MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]')


def parse_object(text: str, place: Place, fields: Sequence[str] = ()) -> dict[str, Any]:
    """Parse a text as a JSON object. fields: the fields of a good one, for the message.

    Raises BadRow with the place if the text is not JSON or not an object.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number with too many digits is a ValueError, too
        raise BadRow(f"{place} is not JSON ({error}): write one complete object a line", "not JSON") from error
    if not isinstance(record, dict):
        wanted = ", ".join(f"{field!r}: ..." for field in fields)
        raise BadRow(f"{place} is JSON but not an object: write {{{wanted}}}", "not an object")
    return record


def check_surrogates(item: Any, place: Place | str) -> None:
    """Raise BadRow for half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    for text in texts_of(item):
        if not text.isascii() and _SURROGATE.search(text):
            raise BadRow(
                f"{place} has half of a surrogate pair (\\ud800 to \\udfff): write the whole character",
                "half a surrogate pair",
            )


def require(record: Record, name: str, kind: type, place: Place) -> Any:
    """The value of a field. Raises BadRow with the place if it is missing, of another type, or empty."""
    if name not in record:
        raise missing_field(record, name, place)
    return require_type(record[name], name, kind, place)


def missing_field(record: Iterable[str], name: str, place: Place | str) -> BadRow:
    """The error for a field that a record (or table) with these fields lacks."""
    there = ", ".join(map(str, record)) or "none"
    message = f"{place} has no field {name!r} (it has: {there}): add it, or ask for a field that is there"
    return BadRow(message, "missing field")


def require_type(value: Any, name: str, kind: type, place: Place) -> Any:
    """The value of the field `name`. Raises BadRow with the place if it is of another type or empty."""
    # In Python a bool is an int; in a record it is not a number.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = _TYPE_NAMES.get(kind, kind.__name__)
        shown = json.dumps(value, default=str)[:40]
        raise BadRow(f"{place}: field {name!r} must be {wanted}, not {shown}", "field of another type")
    if (isinstance(value, str) and is_blank(value)) or value in ([], {}):
        raise BadRow(f"{place}: field {name!r} is empty: fill it in or remove the {place.unit}", "empty field")
    return value


def text_of_field(record: Record, field: str, place: Place, collector: Collector) -> str:
    """The text of a field, checked as by `require_text`.

    field: a name, or names joined by dots, which reach into objects ("translation.en"). Raises BadRow with the place.
    """
    value: Any = record
    for name in [field] if field in record else field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise missing_field(record, field, place)
        value = value[name]
    return require_text(value, field, place, collector)


def require_text(value: Any, name: str, place: Place, collector: Collector) -> str:
    """A field's value as a text without control characters (see `Collector.check`).

    Raises BadRow if it is not a string, empty, or holds half of a surrogate pair.
    """
    if isinstance(value, str):
        check_surrogates(value, place)
        value = collector.check(value, place)
    text: str = require_type(value, name, str, place)
    return text


def iter_json(
    file: Path, collector: Collector, on_read: Callable[[int], None] | None = None, fields: Sequence[str] = ()
) -> Iterator[tuple[dict[str, Any] | BadRow, Place]]:
    """The JSON objects of a file: one per line (blank lines are skipped), or in one list over any number of lines.

    A bad object is given as a BadRow. Only one object at a time is in memory. on_read: see `files.read_lines`. fields:
    see `parse_object`. Raises UserError with file and line for a malformed or incomplete list.
    """
    begun = False
    lines = read_lines([file], collector, on_read, windows=True)
    for line, place in lines:
        if isinstance(line, BadRow):
            yield line, place
        elif not begun and line.lstrip().startswith("["):
            yield from _in_list(line, place, raise_bad_rows(lines))
        elif line.strip():
            yield catch_bad_row(parse_object, line, place, fields), place
        begun = begun or isinstance(line, BadRow) or bool(line.strip())


def _in_list(
    line: str, place: Place, lines: Iterator[tuple[str, Place]]
) -> Iterator[tuple[dict[str, Any] | BadRow, Place]]:
    """The objects of a JSON list that begins on this line. They are found by their brackets, then parsed."""
    depth, size = 0, 0
    between = ""  # the text since the end of the last object
    wanted = "["
    start, parts = place, [""]
    while True:
        cut = 0
        for found in _MARK.finditer(line):
            mark = found[0]
            if mark == '"':
                raise UserError(f"{place} is not JSON (a string has no end): write a list of complete objects")
            if mark in "[{":
                if depth == 1:
                    between += line[: found.start()][cut:]
                    _check_between(between, wanted, place)
                    between, wanted, start, parts, size, cut = "", ",", place, [], 0, found.start()
                elif depth < 1 and (between or line[cut : found.start()].strip()):
                    raise UserError(f"{place} begins another list: write one list of objects")
                depth += 1
            elif mark in "]}":
                depth -= 1
                if depth == 1:
                    parts.append(line[cut : found.end()])
                    cut = found.end()
                    yield catch_bad_row(_parse_item, "\n".join(parts), start), start
        if depth > 1:
            parts.append(line[cut:])
            size += len(line) - cut
            if size > _LARGEST:
                raise UserError(
                    f"{start} has an object of more than {_LARGEST >> 20} MiB: close it, or make it smaller"
                )
        else:
            between += line[cut:].strip()
            if len(between) > 99:
                _check_between(between, wanted, place)
        following = next(lines, None)
        if following is None:
            break
        line, place = following
    if depth > 0:
        raise UserError(f"{start if depth > 1 else place} is not JSON (a list has no end): write the whole list")
    _check_between(between, "]" if wanted == "," else "[]", place)


def _check_between(between: str, wanted: str, place: Place) -> None:
    found = "".join(between.split())
    if found != wanted:
        raise UserError(
            f"{place} is not a list of objects ({found[:40]!r} where {wanted!r} belongs): write [{{...}}, ...]"
        )


def _parse_item(text: str, start: Place) -> dict[str, Any]:
    try:
        return parse_object(text, start)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, json.JSONDecodeError):
            # The place of the fault, not of the object's beginning.
            place = start._replace(line=start.line + cause.lineno - 1)
            raise BadRow(f"{place} is not JSON ({cause.msg} at column {cause.colno}): fix it", "not JSON") from cause
        raise
