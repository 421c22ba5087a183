"""One answer, whole or as far as it is known, and what of it is new."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from transllm_jax.tokenizer.chain import Chain, Form, Markers, Parts, parse, read, without_begun_marker

# How an answer was obtained: in a form of `tokenizer/chain.py`, or as a chain that had to be continued.
How = Literal[Form, "continued"]
# The parts of an answer in the order in which they come. Only the last one is for the user; the others lead to it.
Part = Literal["question_en", "answer_en", "answer"]
PARTS: tuple[Part, ...] = ("question_en", "answer_en", "answer")


@dataclass(frozen=True)
class Answer:
    """One answer, whole or as far as it is known.

    raw: the whole text. chain: None if the text is no well-formed chain. visible: what the user sees. continued:
    whether the fallback was used. cut_off: whether the limit of new tokens ended it, and not the model. parts: what
    could be read, also from a malformed text.
    """

    raw: str
    chain: Chain | None
    visible: str
    continued: bool
    cut_off: bool = False
    parts: Parts = field(default=Parts(), compare=False)  # what it holds follows from `raw`

    @property
    def question_en(self) -> str:
        """The question in English; empty if the text has none."""
        return self.parts.question_en

    @property
    def answer_en(self) -> str:
        """The answer in English before the one in the target language; empty if the text has none."""
        return self.parts.answer_en

    @property
    def answer(self) -> str:
        """The answer that the user sees."""
        return self.visible

    @property
    def how(self) -> How:
        """How it was obtained."""
        return "continued" if self.continued else self.parts.form

    @property
    def complete(self) -> bool:
        """Whether the model ended it, in one of the forms that it is trained to write, or without any marker."""
        return bool(self.visible) and not self.cut_off and self.parts.form != "broken"

    def recorded(self) -> dict[str, Any]:
        """What an evaluation keeps of it (JSON)."""
        chain = None if self.chain is None else vars(self.chain)
        return {"raw": self.raw, "visible": self.visible, "chain": chain, "cut_off": self.cut_off}


def answer_of(
    text: str, markers: Markers, *, continued: bool = False, cut_off: bool = False, whole: bool = True
) -> Answer:
    """The answer in a text; whole: False for the beginning of one (see `read` in `tokenizer/chain.py`)."""
    parts = read(text, markers, whole=whole)
    if not whole:
        text = without_begun_marker(text, markers)
    return Answer(text.strip(), parse(text, markers), parts.answer, continued, cut_off, parts)


class Delta(NamedTuple):
    """More text of one part of an answer."""

    part: Part
    text: str


class Deltas:
    """What a growing answer has more of each time, part by part: what a server sends.

    The texts of a part, put together, are this part; no text is taken back. The one exception is a translation into
    English: it comes as `question_en` while it grows, and at last, whole, as the answer.
    """

    def __init__(self) -> None:
        self._given = dict.fromkeys(PARTS, 0)

    def of(self, answer: Answer) -> list[Delta]:
        """What is new, given the answer as far as it is known now (`ChainChat.stream`)."""
        found = []
        for part in PARTS:
            text: str = getattr(answer, part)
            if len(text) > self._given[part]:
                found.append(Delta(part, text[self._given[part] :]))
                self._given[part] = len(text)
        return found
