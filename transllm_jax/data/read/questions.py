"""Reads checkable questions: each with the answers that are accepted, in the target language and in English."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transllm_jax.data.read.files import Loaded, Place
from transllm_jax.data.read.records import require_type
from transllm_jax.data.read.sources import read_jsonl, refuse_special
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chat import Message


@dataclass(frozen=True)
class Question:
    """One question, with the texts that are accepted as its answer and the turns before it.

    wordings: the question in English; the first is asked. It has one if and only if there are `answers_en`. history_en
    has the turns of `history`; it is empty if the question has no English wording.
    """

    question: str
    answers: tuple[str, ...]
    kind: str = ""
    history: tuple[Message, ...] = ()
    wordings: tuple[str, ...] = ()
    answers_en: tuple[str, ...] = ()
    history_en: tuple[Message, ...] = ()

    @property
    def asked(self) -> list[Message]:
        """The conversation in the target language that ends with the question."""
        return [*self.history, {"role": "user", "content": self.question}]

    @property
    def asked_in_chains(self) -> list[Message]:
        """The same as a model that answers in chains sees it: it remembers earlier turns in English."""
        return [*(self.history_en or self.history), {"role": "user", "content": self.question}]

    @property
    def asked_in_english(self) -> list[Message]:
        """The conversation in English; only for a question with an English wording."""
        return [*self.history_en, {"role": "user", "content": self.wordings[0]}]


def read_questions(path: str | Path, find_special: Callable[[str], str | None] = lambda text: None) -> Loaded[Question]:
    """All questions of a jsonl file. Other fields than those of the docs (docs/config.md) are ignored.

    find_special: finds a special token in a text. Raises UserError with file and line for a record that is not as
    described, an empty text, and a text with a special token.
    """
    rows = read_jsonl(path, {"question": str, "answers": list})
    found = []
    for row, place in zip(rows, rows.places, strict=True):
        question = _question(row, place)
        read = [question.question, *question.answers, *question.wordings, *question.answers_en]
        read += [message["content"] for message in (*question.history, *question.history_en)]
        refuse_special(read, find_special, place)
        found.append(question)
    return Loaded(found, rows.places, rows.report)


def _question(row: dict[str, Any], place: Place) -> Question:
    given = row.get("question_en")
    wordings = _texts([given] if isinstance(given, str) else given, "question_en", place)
    answers_en = _texts(row.get("answers_en"), "answers_en", place)
    if bool(wordings) != bool(answers_en):
        has, lacks = ("question_en", "answers_en") if wordings else ("answers_en", "question_en")
        raise UserError(f"{place} has {has} but no {lacks}: give both or neither")
    history, history_en = (_turns(row.get(name), name, place) for name in ("history", "history_en"))
    roles, roles_en = ([message["role"] for message in turns] for turns in (history, history_en))
    if (history_en or wordings) and roles != roles_en:
        raise UserError(
            f"{place}: history has {len(history)} messages and history_en {len(history_en)}: give the same turns in "
            "both languages"
            if len(roles) != len(roles_en)
            else f"{place}: the roles of history_en differ from those of history: give the same turns in both languages"
        )
    kind = row.get("kind")
    return Question(
        question=row["question"].strip(),
        answers=_texts(row["answers"], "answers", place),
        kind="" if kind is None else require_type(kind, "kind", str, place).strip(),
        history=history,
        wordings=wordings,
        answers_en=answers_en,
        history_en=history_en,
    )


def _texts(given: Any, name: str, place: Place) -> tuple[str, ...]:
    """The texts of an optional list. Raises UserError for an empty list or text and another type."""
    if given is None:
        return ()
    return tuple(require_type(text, name, str, place).strip() for text in require_type(given, name, list, place))


def _turns(given: Any, name: str, place: Place) -> tuple[Message, ...]:
    """The earlier turns: messages of the user and the assistant by turns, maybe after a system message."""
    if given is None or given == []:
        return ()
    messages: list[Message] = []
    for entry in require_type(given, name, list, place):
        fields = require_type(entry, name, dict, place)
        role, content = (require_type(fields.get(key), f"{name}.{key}", str, place) for key in ("role", "content"))
        messages.append({"role": role, "content": content.strip()})
    turns = messages[messages[0]["role"] == "system" :]
    wanted = [("user", "assistant")[number % 2] for number in range(len(turns))]
    if [message["role"] for message in turns] != wanted or len(turns) % 2:
        raise UserError(
            f"{place}: the roles of {name} must be user and assistant by turns, the last the assistant's, "
            "at most after a system message"
        )
    return tuple(messages)
