"""Records: JSON objects, one a line or in a list, and the texts in the fields of any record."""

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
    read_lines,
    refusing,
    texts_of,
)
from transllm_jax.errors import UserError

Record = Mapping[str, Any]

_LARGEST = 64 << 20  # bytes, nearly: an object that never ends must not fill the memory
_SURROGATE = re.compile("[\ud800-\udfff]")
_TYPE_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "an object", int: "a number"}
# What counts in a list of objects: whole strings, brackets, and the start of a string that does not end on its line.
_MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]')


def parse_object(text: str, place: Place, fields: Sequence[str] = (), first_line: int = 1) -> dict[str, Any]:
    """The JSON object that a text is. fields: what a good one has, for the message.

    Raises UserError with the place for what is not JSON, and not an object.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of very many digits is a ValueError, too
        raise BadRow(f"{place} is not JSON ({error}): write one complete object a line", "not JSON") from error
    if not isinstance(record, dict):
        wanted = ", ".join(f"{field!r}: ..." for field in fields)
        raise BadRow(f"{place} is JSON but not an object: write {{{wanted}}}", "not an object")
    return record


def check_surrogates(item: Any, place: Place) -> None:
    """Refuse halves of surrogate pairs, which JSON can spell and UTF-8 cannot. Raises UserError."""
    for text in texts_of(item):
        if not text.isascii() and _SURROGATE.search(text):
            raise BadRow(
                f"{place} has half of a surrogate pair (\\ud800 to \\udfff): write the whole character",
                "half a surrogate pair",
            )


def require(record: Record, name: str, kind: type, place: Place) -> Any:
    """The value of a field, which is there, of this type, and not empty. Raises UserError with the place."""
    if name not in record:
        raise missing_field(record, name, place)
    return of_kind(record[name], name, kind, place)


def missing_field(record: Iterable[str], name: str, place: Place | str) -> BadRow:
    """The error for a field that is not among those of a record (or of a table)."""
    there = ", ".join(map(str, record)) or "none"
    message = f"{place} has no field {name!r} (it has: {there}): add it, or ask for a field that is there"
    return BadRow(message, "missing field")


def of_kind(value: Any, name: str, kind: type, place: Place) -> Any:
    """The value of the field `name`, of this type, and not empty. Raises UserError with the place."""
    # bool is an int to Python, not to whoever writes a number
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = _TYPE_NAMES.get(kind, kind.__name__)
        shown = json.dumps(value, default=str)[:40]
        raise BadRow(f"{place}: field {name!r} must be {wanted}, not {shown}", "field of another type")
    if (isinstance(value, str) and is_blank(value)) or value in ([], {}):
        raise BadRow(f"{place}: field {name!r} is empty: fill it in or remove the {place.unit}", "empty field")
    return value


def text_at(record: Record, field: str, place: Place, collector: Collector) -> str:
    """The text of a field, checked: a string that is not empty.

    field: a name, or names with dots between them, which reach into objects ("translation.en").
    Raises UserError with the place.
    """
    value: Any = record
    for name in [field] if field in record else field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise missing_field(record, field, place)
        value = value[name]
    return checked(value, field, place, collector)


def checked(value: Any, name: str, place: Place, collector: Collector) -> str:
    """A field's value as a text without control characters (refused or removed), which is not empty."""
    if isinstance(value, str):
        check_surrogates(value, place)
        value = collector.check(value, place)
    text: str = of_kind(value, name, str, place)
    return text


def iter_json(
    file: Path, collector: Collector, at: Callable[[int], None] | None = None, fields: Sequence[str] = ()
) -> Iterator[tuple[dict[str, Any] | BadRow, Place]]:
    """The objects of a file, one a line (blank lines are passed over), or in one list over as many lines as it likes.

    In place of a bad one what is wrong with it is given. Only one object at a time is in memory. at: see
    `files.read_lines`. fields: see `parse_object`. Raises UserError with file and line for a list that is not whole.
    """
    begun = False
    lines = read_lines([file], collector, at)
    for line, place in lines:
        if isinstance(line, BadRow):
            yield line, place
        elif not begun and line.lstrip().startswith("["):
            yield from _in_list(line, place, refusing(lines))
        elif line.strip():
            yield catch_bad_row(parse_object, line, place, fields), place
        begun = begun or isinstance(line, BadRow) or bool(line.strip())


def _in_list(
    line: str, place: Place, lines: Iterator[tuple[str, Place]]
) -> Iterator[tuple[dict[str, Any] | BadRow, Place]]:
    """The objects of a JSON list that begins on this line. They are told apart by their brackets, then parsed."""
    depth, size = 0, 0
    between = ""  # what stands outside objects, since the last one
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
            # Where the fault is, not where the object begins.
            place = start._replace(line=start.line + cause.lineno - 1)
            raise BadRow(f"{place} is not JSON ({cause.msg} at column {cause.colno}): mend it", "not JSON") from cause
        raise
