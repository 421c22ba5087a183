"""Reads sheets back as annotators leave them: what is clear counts, what is not is a problem with its file and cell."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transllm_jax.errors import UserError
from transllm_jax.evaluation.people.files import read_sheet
from transllm_jax.evaluation.people.sheet import BETTER, CODE, RATING_A, RATING_B, TEXTS, TIE, Form, same

_COLUMNS = (CODE, *TEXTS, BETTER, RATING_A, RATING_B)


@dataclass(frozen=True)
class Judgement:
    """What one person says of one pair of answers.

    won: 1 if the first system of the pair is better, 0 if the second is, ½ for a tie. side: what was chosen, A, B or
    tie. ratings: of the first and of the second system; None if the sheet asks for none or one is missing.
    """

    annotator: int
    pair: int
    id: str
    won: float
    side: str
    ratings: tuple[int, int] | None = None


@dataclass(frozen=True)
class Problem:
    """Something in a sheet that has no clear meaning. cell: such as E7; empty if it is of the whole row or file."""

    file: str
    row: int
    cell: str
    what: str

    def __str__(self) -> str:
        where = f"{self.file}: row {self.row}" + (f", cell {self.cell}" if self.cell else "")
        return f"{where}: {self.what}"


@dataclass
class Returned:
    """What came back.

    unfinished: for each file, the rows in which no choice was made. missing: for each person, how many rows of theirs
    are in no file.
    """

    judgements: list[Judgement] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unfinished: dict[str, list[int]] = field(default_factory=dict)
    missing: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    """A row of a file with a known code. side: A, B or tie; empty if no choice was made."""

    file: str
    row: int
    cell: str
    code: str
    side: str
    ratings: tuple[int, int] | None

    @property
    def said(self) -> tuple[str, tuple[int, int] | None]:
        """What is compared between two files."""
        return self.side, self.ratings


def read_sheets(paths: Sequence[Path], key: Mapping[str, Any], words: Mapping[str, str]) -> Returned:
    """The judgements in the files, in the order of the key.

    key: of `write_sheets`. words: what else annotators wrote, and whether it means A, B or tie. Rows with a problem are
    left out. Several files may hold the same row, such as a person's xlsx and csv: an empty choice beside a choice is
    none, and two different choices are a problem. Raises UserError for a file that cannot be read.
    """
    returned = Returned()
    form = Form(**key["form"])
    meant = {"a": "A", "b": "B", TIE: TIE, _folded(form.tie): TIE}
    meant |= {_folded(word): meaning for word, meaning in words.items()}
    by_code: dict[str, list[_Found]] = {}
    faulty: set[str] = set()
    for path in paths:
        for code, row in _rows(path, key["rows"], form, meant, returned.problems):
            if row is None:
                faulty.add(code)
            else:
                by_code.setdefault(code, []).append(row)
    # Of a person's xlsx and csv, the one that is filled in is the one that is not finished.
    used = Counter(row.file for rows in by_code.values() for row in rows if row.side)
    for code, sent in key["rows"].items():
        rows = by_code.get(code, [])
        chosen = [row for row in rows if row.side]
        if code in faulty:
            continue
        if not rows:
            returned.missing[sent["annotator"]] = returned.missing.get(sent["annotator"], 0) + 1
        elif not chosen:
            empty = max(rows, key=lambda row: used[row.file])
            returned.unfinished.setdefault(empty.file, []).append(empty.row)
        elif other := next((row for row in chosen if row.said != chosen[0].said), None):
            what = f"differs from {chosen[0].file}, cell {chosen[0].cell}, which is the same row; correct one of them"
            returned.problems.append(Problem(other.file, other.row, other.cell, what))
        else:
            returned.judgements.append(_judgement(chosen[0], sent, key["pairs"][sent["pair"]]["first"]))
    return returned


def _judgement(row: _Found, sent: Mapping[str, Any], first: str) -> Judgement:
    is_a = sent["a"] == first
    won = 0.5 if row.side == TIE else float(is_a == (row.side == "A"))
    ratings = row.ratings if row.ratings is None or is_a else (row.ratings[1], row.ratings[0])
    return Judgement(sent["annotator"], sent["pair"], sent["id"], won, row.side, ratings)


def _rows(
    path: Path, known: Mapping[str, Any], form: Form, meant: Mapping[str, str], problems: list[Problem]
) -> Iterator[tuple[str, _Found | None]]:
    """Each row of a file that has a known code, by it; None for a row with a problem."""
    rows, name = read_sheet(path), path.name
    places, top = _places(rows, form, name, problems)
    if places is None:
        return
    # A row whose texts are those of another one was sorted apart from its code.
    owners = {(row["annotator"], same(text)): code for code, row in known.items() for text in row["texts"]}
    seen: dict[str, int] = {}
    for number, cells in rows:
        if number <= top:
            continue

        def at(column: str, cells: Sequence[Any] = cells) -> Any:
            place = places.get(column)
            return cells[place] if place is not None and place < len(cells) else None

        def cell(column: str, number: int = number) -> str:
            return f"{_letter(places[column])}{number}"

        def problem(column: str, what: str, number: int = number) -> None:
            problems.append(Problem(name, number, cell(column), what))

        filled = any(not _is_empty(at(column)) for column in (BETTER, RATING_A, RATING_B))
        code = _folded(at(CODE))
        if not code:
            if filled or not _is_empty(at(TEXTS[0])):
                problem(CODE, "the code is missing; copy it from the sheet as it was sent")
            continue
        if code not in known:
            problem(CODE, f"the code {at(CODE)!r} is in no sheet of this key; copy it from the sheet as it was sent")
            continue
        if code in seen:
            problem(CODE, f"the code {code} is in row {seen[code]} as well; remove one of the two")
            yield code, None
            continue
        seen[code] = number
        row = known[code]
        before = len(problems)
        changed = next(
            (
                (column, at(column))
                for column, text in zip(TEXTS, row["texts"], strict=True)
                if column in places and same(_text(at(column))) != same(text)
            ),
            None,
        )
        if changed is not None:
            column, text = changed
            owner = owners.get((row["annotator"], same(_text(text))), code)
            problem(
                column,
                f"this is not the text of code {code}; copy it from the sheet as it was sent"
                if owner == code
                else f"this text belongs to code {owner}: were some columns sorted without the others? Sort whole rows",
            )
            yield code, None
            continue
        side = meant.get(_folded(at(BETTER)))
        if side is None and not _is_empty(at(BETTER)):
            problem(BETTER, _unclear(at(BETTER), form))
        ratings = None
        if form.rating is not None:
            given = [_rating(at(column), form.rating) for column in (RATING_A, RATING_B)]
            started = filled and (side is not None or any(not _is_empty(at(one)) for one in (RATING_A, RATING_B)))
            if started and side is None and _is_empty(at(BETTER)):
                problem(BETTER, f"rated and not compared; write {_listed(form)}")
            for column, value in zip((RATING_A, RATING_B), given, strict=True):
                if started and value is None:
                    problem(column, f"{_shown(at(column))} is no whole number from 1 to {form.rating}")
            if given[0] is not None and given[1] is not None:
                ratings = given[0], given[1]
        wrong = len(problems) > before
        yield code, None if wrong else _Found(name, number, cell(BETTER), code, side or "", ratings)


def _places(
    rows: Sequence[tuple[int, Sequence[Any]]], form: Form, name: str, problems: list[Problem]
) -> tuple[dict[str, int] | None, int]:
    """Where each column is (from 0), and the row of the headings; None, with a problem, if a column is not there."""
    wanted = [CODE, BETTER, *(() if form.rating is None else (RATING_A, RATING_B))]
    for number, cells in rows:
        headings = [_folded(value) for value in cells]
        if CODE not in headings:
            continue
        places: dict[str, int] = {}
        for place, heading in enumerate(headings):
            # "better (A, B or tie)": a heading is known by how it begins.
            for column in _COLUMNS:
                if heading == column.casefold() or heading.startswith(f"{column.casefold()} ("):
                    if column in places:
                        where = f"{_letter(place)}{number}"
                        problems.append(Problem(name, number, where, f"there is a column {column!r} already"))
                        return None, number
                    places[column] = place
        missing = [column for column in wanted if column not in places]
        if missing:
            problems.append(Problem(name, number, "", f"there is no column {missing[0]!r}; name it so again"))
            return None, number
        return places, number
    problems.append(Problem(name, 1, "", f"there is no column {CODE!r}; is this a sheet of people's judgements?"))
    return None, 0


def _unclear(value: Any, form: Form) -> str:
    if isinstance(value, str) and value.startswith("="):
        return f"a formula, {value!r}; write {_listed(form)}"
    return f"{_shown(value)} is not {_listed(form)}; correct it, or say what it means: --word {_shown(value)}=tie"


def _listed(form: Form) -> str:
    return f"A, B or {form.tie}"


def _rating(value: Any, highest: int) -> int | None:
    try:
        number = float(unicodedata.normalize("NFKC", value)) if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number in range(1, highest + 1) and not isinstance(value, bool) else None


def _shown(value: Any) -> str:
    return "an empty cell" if _is_empty(value) else f"'{_text(value)}'"


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _folded(value: Any) -> str:
    """Text without differences of case, of width, and of spaces around it."""
    return unicodedata.normalize("NFKC", _text(value)).strip().casefold()


def _letter(place: int) -> str:
    """The name of a column, counted from 0: A, B, ... Z, AA."""
    name = ""
    place += 1
    while place:
        place, rest = divmod(place - 1, 26)
        name = chr(ord("A") + rest) + name
    return name


def rows_of(numbers: Iterable[int]) -> str:
    """Numbers of rows as text: 3, 7 to 12."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)


def parse_words(given: Iterable[str]) -> dict[str, str]:
    """`WORD=A`, `WORD=B` or `WORD=tie` of the command line. Raises UserError for anything else."""
    words = {}
    for text in given:
        word, _, meaning = text.rpartition("=")
        found = {"a": "A", "b": "B", TIE: TIE}.get(_folded(meaning))
        if not word.strip() or found is None:
            raise UserError(f"--word {text}: write WORD=A, WORD=B or WORD=tie")
        words[word] = found
    return words
