"""Whether answers to checkable questions are right, and what went wrong in a chain that ends in a wrong one.

Everything here looks at texts alone; `evaluation/asked.py` asks the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from transllm_jax.data.clean.whole_words import number_of, numbers, spelled, word_places, words

# Why an answer in a chain is wrong: no well-formed chain, or one that was cut off; another question was understood; the
# English answer is wrong; it is right and its translation is wrong; or the file does not say what is right in English.
Reason = Literal["form", "misread", "english", "translation", "unknown"]
REASONS: tuple[Reason, ...] = ("form", "misread", "english", "translation", "unknown")

_SIGNS = {"*": "×", "/": "÷", "%": "percent"}

# An accepted text as it is compared: a number in digits by its value, another text as it is spelled.
_Form = str | Decimal


@dataclass(frozen=True)
class Checkable:
    """A question with the texts that are accepted as its answer, in one language. kind: the user's name of its kind."""

    question: str
    accepted: Sequence[str]
    kind: str = ""


class Judge:
    """Says whether an answer is right.

    It is, if it holds an accepted text as whole words (`data/clean/whole_words.py`), in any case. A number in digits is
    compared by its value. What occurs only inside a longer accepted text of the file does not count: "ใช่" in "ไม่ใช่",
    "four" in "twenty four", "Mexico" in "Mexico City".

    Some questions offer a choice: those of a kind with only two answers to more questions, such as yes and no, and
    those in which the accepted text occurs together with one of another question ("Which is larger, 5 or 7?"). There,
    the answer is what is named most often, and of two that are named equally often, what is named first.
    """

    def __init__(self, questions: Iterable[Checkable]) -> None:
        self._questions = list(questions)
        self._accepted = [frozenset(_form(text) for text in question.accepted) for question in self._questions]
        self._by_kind: dict[str, list[frozenset[_Form]]] = {}
        # Each accepted text, with the answers that it belongs to.
        self._texts: dict[_Form, set[frozenset[_Form]]] = {}
        for question, accepted in zip(self._questions, self._accepted, strict=True):
            if accepted:
                self._by_kind.setdefault(question.kind, []).append(accepted)
            for text in accepted:
                self._texts.setdefault(text, set()).add(accepted)

    def is_right(self, number: int, answer: str) -> bool:
        """Whether this is a right answer to question `number`, counted from 0."""
        accepted, found = self._accepted[number], self._found(spelled(answer))
        mine = [start for start, form in found if form in accepted]
        if not mine:
            return False
        for other in self._others(number):
            theirs = [start for start, form in found if form in other]
            if theirs and (len(theirs), -theirs[0]) > (len(mine), -mine[0]):
                return False
        return True

    def _others(self, number: int) -> set[frozenset[_Form]]:
        """The other answers that a question offers; none if it offers no choice."""
        question, accepted = self._questions[number], self._accepted[number]
        of_kind = self._by_kind.get(question.kind, [])
        others = set(of_kind) - {accepted}
        if len(others) == 1 and len(of_kind) > 2:
            return others
        offered = {form for _, form in self._found(spelled(question.question))}
        if not offered & accepted:
            return set()
        return {other for form in offered for other in self._texts[form] if not other & accepted}

    def _found(self, text: str) -> list[tuple[int, _Form]]:
        """Where accepted texts of any question occur in a `spelled` text, in order; not those inside a longer one."""
        spans: list[tuple[int, int, _Form]] = [(start, end, value) for start, end, value in numbers(text)]
        for form in self._texts:
            if isinstance(form, str) and form in text:
                spans += [(start, start + len(form), form) for start in word_places(text, form)]
        # By length: what is inside a longer one comes after it.
        spans.sort(key=lambda span: span[0] - span[1])
        kept: list[tuple[int, int, _Form]] = []
        for start, end, form in spans:
            inside = any(first <= start and end <= last and (first, last) != (start, end) for first, last, _ in kept)
            if form in self._texts and not inside:
                kept.append((start, end, form))
        return sorted(((start, form) for start, _, form in kept), key=lambda one: one[0])


def _form(text: str) -> _Form:
    text = spelled(text)
    value = number_of(text)
    return text if value is None else value


def is_understood(question: str, wordings: Iterable[str]) -> bool:
    """Whether a question in English is one of the wordings, apart from case, spaces and punctuation.

    Numbers are compared by their values, and the signs of sums are no punctuation.
    """
    return _bare(question) in {_bare(wording) for wording in wordings}


def _bare(question: str) -> str:
    text, parts, last = spelled(question), [], 0
    for start, end, value in numbers(text):
        # A letter, because a point would count as punctuation.
        parts += [text[last:start], f"{value:f}".replace(".", "p")]
        last = end
    text = re.sub(r"(?<=\d)( ?)([*/%])", lambda sign: sign[1] + _SIGNS[sign[2]], "".join(parts) + text[last:])
    # Between two numbers, a space tells them apart.
    return re.sub(r"(?<!\d) | (?!\d)", "", words(text))


def reason_of(*, in_form: bool, understood: bool | None, english_right: bool | None) -> Reason:
    """Why the answer of a chain is wrong.

    in_form: whether the chain is well-formed and whole. understood, english_right: whether its English question and
    answer are right; None if the file does not say what is.
    """
    if not in_form:
        return "form"
    if english_right:
        return "translation"
    if understood is None or english_right is None:
        return "unknown"
    return "english" if understood else "misread"


def count(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts by kind of question, in the order of the rows (the results of `asked.ask`).

    asked, right: in the target language. asked_in_english, right_in_english: in English. In chains also: understood and
    chain_english, of `asked_in_english`, and how many answers are wrong for each reason.
    """
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        own = counts.setdefault(row["kind"], {})
        found = {
            "asked": True,
            "right": row["right"],
            "asked_in_english": row["english"] is not None,
            "right_in_english": row["english"] is not None and row["english"]["right"],
        }
        if "chain" in row:
            found |= {"understood": bool(row["understood"]), "chain_english": bool(row["chain_english"])}
            found |= {reason: row["reason"] == reason for reason in REASONS}
        for name, holds in found.items():
            own[name] = own.get(name, 0) + bool(holds)
    return counts


def total(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The counts of all kinds together."""
    summed: dict[str, int] = {}
    for own in counts.values():
        for name, number in own.items():
            summed[name] = summed.get(name, 0) + number
    return summed
