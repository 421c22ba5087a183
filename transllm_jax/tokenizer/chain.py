"""The translation chain of thought: how an answer is laid out, built, read back and completed.

    a question in the target language:  <EN>question<RESPONSE>answer in English<TH>answer in the target language
    a question in English:              <RESPONSE>answer in English
    a translation instruction:          <TH>translation      (or <EN>translation)

The markers are single special tokens, directly followed by their text. So the text after a marker has exactly the ids
that the original model gives it at the start of an answer, which is what is to be recovered, and no token is spent on a
lone space. Everything here also reads markers with spaces around them.
Source: TransLLM, arXiv 2405.13923.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from transllm_jax.errors import UserError


@dataclass(frozen=True)
class Markers:
    """The markers before an English text, a text in the target language, and an English answer."""

    english: str = "<EN>"
    target: str = "<TH>"
    response: str = "<RESPONSE>"

    @classmethod
    def for_language(cls, language: str) -> Markers:
        """The markers for the ISO code of a target language: `th` -> `<TH>`."""
        return cls(target=f"<{language.upper()}>")

    @property
    def language(self) -> str:
        """The ISO code of the target language: `<TH>` -> `th`."""
        return self.target.strip("<>").lower()

    def in_order(self) -> tuple[str, str, str]:
        """The three markers in the order of a chain: before the question, the answer, the translated answer."""
        return (self.english, self.response, self.target)


MARKERS = Markers()


@dataclass(frozen=True)
class Chain:
    """A whole chain: the question in English, the answer in English, the answer in the target language."""

    question_en: str
    answer_en: str
    answer_target: str


def _clean(text: str, what: str, markers: Markers) -> str:
    found = _pattern(markers).search(text)
    if found:
        raise UserError(f"{what} contains the marker {found.group()}: remove it from the text {text[:60]!r}")
    text = text.strip()
    if not text:
        raise UserError(f"{what} is empty: a chain needs text after every marker; drop this row")
    return text


def _pattern(markers: Markers) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(m) for m in markers.in_order()))


def build_chain(question_en: str, answer_en: str, answer_target: str, markers: Markers = MARKERS) -> str:
    """The whole chain as text. Raises UserError for an empty side or a marker inside a side."""
    question = _clean(question_en, "the English question", markers)
    answer = _clean(answer_en, "the English answer", markers)
    target = _clean(answer_target, "the answer in the target language", markers)
    return f"{markers.english}{question}{markers.response}{answer}{markers.target}{target}"


def build_english_answer(answer: str, markers: Markers = MARKERS) -> str:
    """The answer to an English question. Raises UserError for an empty answer or a marker inside it."""
    return f"{markers.response}{_clean(answer, 'the English answer', markers)}"


def build_translation(text: str, marker: str, markers: Markers = MARKERS) -> str:
    """A translation after `marker`, the English or the target one.

    Raises UserError for another marker, an empty text or a marker inside the text.
    """
    if marker not in (markers.english, markers.target):
        raise UserError(f"{marker!r} is not a language marker: use {markers.english} or {markers.target}")
    return f"{marker}{_clean(text, 'the translation', markers)}"


def parse(text: str, markers: Markers = MARKERS) -> Chain | None:
    """Parses a whole chain; None if it is malformed.

    Well-formed means: the three markers once each, in order, nothing before the first one, text after each.
    """
    if tuple(m.group() for m in _pattern(markers).finditer(text)) != markers.in_order():
        return None
    before, *parts = (part.strip() for part in _pattern(markers).split(text))
    if before or not all(parts):
        return None
    return Chain(*parts)


def missing_marker(text: str, markers: Markers = MARKERS) -> str | None:
    """The marker to append so that generation continues a chain that stopped early.

    It is the one that follows the last marker present, or the first one if there is none; None if the last one is the
    target marker, after which no other follows.
    """
    order = markers.in_order()
    found = _pattern(markers).findall(text)
    if not found:
        return order[0]
    position = order.index(found[-1])
    return order[position + 1] if position + 1 < len(order) else None


# How an answer is laid out. chain: the three markers once each, in order, with text after each. english: an answer in
# English. translation: a text after a language's marker. plain: no marker. broken: anything else.
Form = Literal["chain", "english", "translation", "plain", "broken"]


@dataclass(frozen=True)
class Parts:
    """What an answer holds, well-formed or not: what it says that the question is, and the answer, in English; and the
    answer that the user sees. A part that is not there is empty."""

    question_en: str = ""
    answer_en: str = ""
    answer: str = ""
    form: Form = "plain"


def read(text: str, markers: Markers = MARKERS, *, whole: bool = True) -> Parts:
    """The parts of an answer, or, if not `whole`, of the beginning of one. No text makes it fail.

    A part is the text after its marker, up to the next marker, stripped. The text after a marker that is repeated or
    out of order is ignored. The user sees the answer in the target language; before it, as paragraphs, a text before
    the first marker and an English answer without an English question. If nothing in the target language was begun, the
    user also sees the English answer of a chain, or else a translation into English, but only once the answer is whole.

    The parts of a beginning are beginnings of the parts of any longer text; but a translation into English is at first
    taken for a question. For this, the first characters of a marker at the end of a beginning are ignored.
    """
    order = markers.in_order()
    if not whole:
        text = without_begun_marker(text, markers)
    found = [order.index(match.group()) for match in _pattern(markers).finditer(text)]
    before, *texts = (part.strip() for part in _pattern(markers).split(text))
    taken: dict[int, str] = {}
    for rank, part in zip(found, texts, strict=True):
        if not taken or rank > max(taken):
            taken[rank] = part
    question, answer_en, target = (taken.get(rank, "") for rank in range(3))
    shown = [before]
    if 1 in taken and 0 not in taken:
        shown.append(answer_en)
    if 2 in taken:
        shown.append(target)
    elif whole and 0 in taken:
        shown.append(answer_en if 1 in taken else question)
    return Parts(
        "" if whole and found == [0] else question,
        answer_en if 0 in taken else "",
        "\n\n".join(filter(None, shown)),
        _form(found, before, texts),
    )


def _form(found: list[int], before: str, texts: list[str]) -> Form:
    if not found:
        return "plain"
    if before or not all(texts):
        return "broken"
    forms: dict[tuple[int, ...], Form] = {
        (0, 1, 2): "chain",
        (1,): "english",
        (0,): "translation",
        (2,): "translation",
    }
    return forms.get(tuple(found), "broken")


def without_begun_marker(text: str, markers: Markers = MARKERS) -> str:
    """The text without the first characters of a marker at its end, which more text may complete."""
    for size in range(max(map(len, markers.in_order())) - 1, 0, -1):
        if any(len(marker) > size and text.endswith(marker[:size]) for marker in markers.in_order()):
            return text[:-size]
    return text


def visible(text: str, markers: Markers = MARKERS) -> str:
    """What the user sees of a whole answer; see `read`."""
    return read(text, markers).answer
