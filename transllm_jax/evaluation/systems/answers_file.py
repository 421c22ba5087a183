"""Answers that are in a file already, whoever gave them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transllm_jax.data.read.records import check_surrogates
from transllm_jax.disk import sha256_of
from transllm_jax.errors import UserError
from transllm_jax.evaluation.systems.system import Asked, Turn

# The fields in which a row may have its id, its question, and its answer; the first two in the order in which they are
# looked for.
_IDS = ("id", "question_id")
_QUESTIONS = ("question", "instruction", "prompt")
_ANSWERS = ("answers", "answer", "output", "text", "visible", "turns", "choices")
# Fields that only tools write which keep what a row had before, such as accepted answers: what `transllm generate`
# writes with its text, and our suites with the visible answer.
_WRITTEN = {"finish_reason": "text", "visible": "visible"}
_PARTS = {"question_en", "answer_en", "answer"}


class AnswersFile:
    """A file of answers, a JSON object a line (or one JSON list of them).

    A row belongs to a question by its id (`id` or `question_id`), or else by the question's text (`question`,
    `instruction` or `prompt`). Its answer is a text or a list of texts, one a turn, in `answer`, `answers`, `output` or
    `text`; FastChat's `choices`, what `transllm generate` writes, and the answers.jsonl of our suites are read as well.
    """

    def __init__(self, name: str, path: Path) -> None:
        """Raises UserError with file and line for a row that is no answer, and for two rows of one question."""
        self.name, self._path = name, path
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a file of answers after answers:")
        # Now, because the file may change.
        self.identity: Mapping[str, Any] = {"kind": "answers", "sha256": sha256_of(path)}
        self._by_id: dict[str, _Row] = {}
        self._by_text: dict[str, _Row] = {}
        for place, row in _rows(path):
            self._add(place, row)

    def answers(
        self, asked: Sequence[Asked], between: Callable[[], None] = lambda: None, *, at_once: int | None = None
    ) -> Iterator[tuple[Asked, list[Turn]]]:
        """As `System.answers`; a question without an answer in the file is a turn with an error.

        Raises UserError for a row with the id of one question and the text of another, and if no row answers any.
        """
        self._require_some(asked)
        for one in asked:
            row = self._row_of(one)
            if row is not None and not row.may_answer(one):
                raise UserError(
                    f"{row.place}: question {one.id} is {_short(one.turns[0])!r}, and here {_short(row.question)!r}; "
                    "correct the ids, or remove them to go by the texts"
                )
            found = [] if row is None else row.turns
            turns = []
            for number, question in enumerate(one.turns):
                if number < len(found):
                    turns.append(found[number])
                else:
                    error = f"{self._path} has no answer to turn {number + 1} of question {one.id}"
                    turns.append(Turn([{"role": "user", "content": question}], "", "", error=error))
            yield one, turns

    def _row_of(self, asked: Asked) -> _Row | None:
        return self._by_id.get(asked.id) or self._by_text.get(_plain(asked.turns[0]))

    def _require_some(self, asked: Sequence[Asked]) -> None:
        if not asked or any(map(self._row_of, asked)):
            return
        theirs = ", ".join([*self._by_id, *self._by_text][:3]) or "none"
        raise UserError(
            f"{self._path} answers none of the {len(asked)} questions: it has {_short(theirs)}, and asked are "
            f"{', '.join(one.id for one in asked[:3])} ({_short(asked[0].turns[0])!r}, ...); give the file of these "
            "questions"
        )

    def _add(self, place: str, row: Any) -> None:
        if not isinstance(row, dict):
            raise UserError(f"{place} is no JSON object; give one for each answer")
        check_surrogates(row, place)
        field = _field(place, row)
        id = next((str(row[name]) for name in _IDS if name in row), None)
        question = next((row[name] for name in _QUESTIONS if isinstance(row.get(name), str)), None)
        if id is None and question is None:
            raise UserError(f"{place} names no question; give its id, or its text in the field question")
        asked = [question] if question is not None else []
        turns = [self._turn(place, one, asked if not number else []) for number, one in enumerate(_texts(row, field))]
        found = _Row(place, question or "", turns)
        if id is not None:
            if id in self._by_id:
                raise UserError(f"{place}: another row above has the id {id}; remove one of them")
            self._by_id[id] = found
        if question is not None:
            # Two questions may have one text, if what was said before differs; then their ids tell them apart.
            if id is None and _plain(question) in self._by_text:
                raise UserError(f"{place}: another row above has the same question; remove one, or give both an id")
            self._by_text.setdefault(_plain(question), found)

    def _turn(self, place: str, given: Any, asked: Sequence[str]) -> Turn:
        if isinstance(given, dict) and isinstance(given.get("visible"), str):
            chain = given.get("chain")
            if chain is not None and not (isinstance(chain, dict) and chain.keys() >= _PARTS):
                raise UserError(f"{place}: chain lacks one of {', '.join(sorted(_PARTS))}; correct it, or remove it")
            try:
                return Turn(**given)
            except TypeError:
                given = given["visible"]
        if not isinstance(given, str):
            raise UserError(f"{place}: an answer is a {type(given).__name__}; give a text, or a list of texts")
        text = given.strip()
        return Turn([{"role": "user", "content": question} for question in asked], given, text)


@dataclass(frozen=True)
class _Row:
    """What a row of the file says. question: its text; empty if the row has none."""

    place: str
    question: str
    turns: list[Turn]

    def may_answer(self, asked: Asked) -> bool:
        """Whether the row's text is that of a question, a part of it, or nothing that tells."""
        own, text = _plain(self.question), _plain(asked.turns[0])
        return own in text or text in own


def _plain(text: str) -> str:
    return " ".join(text.split())


def _short(text: str) -> str:
    text = _plain(text)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _field(place: str, row: Mapping[str, Any]) -> str:
    """The field that holds the answer."""
    written = next((field for mark, field in _WRITTEN.items() if mark in row and field in row), None)
    if written is not None:
        return written
    fields = [name for name in _ANSWERS if name in row]
    if not fields:
        raise UserError(f"{place} has no answer; put it into the field answer (a text, or a list: one a turn)")
    if len(fields) > 1:
        raise UserError(
            f"{place} has {' and '.join(fields)}, each of which could be the system's answer; keep the one that is"
        )
    return fields[0]


def _texts(row: Mapping[str, Any], field: str) -> list[Any]:
    value = row[field]
    if field == "choices":  # FastChat's: [{"index": 0, "turns": [...]}]
        value = value[0].get("turns") if isinstance(value, list) and value and isinstance(value[0], dict) else None
    return value if isinstance(value, list) else [value]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); correct it") from None
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); correct it") from None
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number} is not JSON ({error}); correct the line") from None
            yield f"{path}:{number}", row
