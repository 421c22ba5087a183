"""What a sheet for an annotator holds: its columns, its words, and its texts as spreadsheets keep them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

CODE, QUESTION, ANSWER_A, ANSWER_B = "code", "question", "answer A", "answer B"
BETTER, RATING_A, RATING_B, COMMENT = "better", "rating A", "rating B", "comment"
TEXTS = (QUESTION, ANSWER_A, ANSWER_B)

# The word for a tie that each sheet accepts, besides the one that was chosen for it.
TIE = "tie"
NO_ANSWER = "(no answer)"

# The most UTF-16 units in a cell of Excel.
CELL = 32_767
_CUT = " [cut: longer than a cell]"


@dataclass(frozen=True)
class Row:
    """A pair of answers to a question. code: what it is known by, which says nothing about the systems."""

    code: str
    question: str
    answer_a: str
    answer_b: str

    @property
    def texts(self) -> tuple[str, str, str]:
        """In the order of `TEXTS`."""
        return self.question, self.answer_a, self.answer_b


@dataclass(frozen=True)
class Form:
    """What annotators fill in. tie: the word for a tie. rating: the best rating of each answer; None without any."""

    tie: str = TIE
    rating: int | None = None
    instructions: str = ""

    @property
    def columns(self) -> list[str]:
        """The headings, in order."""
        ratings = [] if self.rating is None else [self._heading(RATING_A), self._heading(RATING_B)]
        return [CODE, *TEXTS, self._heading(BETTER), *ratings, COMMENT]

    @property
    def choices(self) -> list[str]:
        """What the column `better` may hold."""
        return ["A", "B", self.tie]

    def _heading(self, column: str) -> str:
        return f"{column} (A, B or {self.tie})" if column == BETTER else f"{column} (1 to {self.rating})"

    @property
    def text(self) -> str:
        """The instructions."""
        rating = "" if self.rating is None else f" Rate each answer from 1 (bad) to {self.rating} (good)."
        return self.instructions or (
            "Each row has a question and two answers to it, by systems that change places from row to row. Say which "
            f"answer is better for somebody who asks this: A, B or {self.tie}.{rating} Judge each row by itself, and "
            "do not talk about it with others before all are done. Leave out what you cannot judge, and say why in the "
            "comment. Rows may be sorted and columns added; please leave the codes and the texts as they are."
        )


def conversation(texts: Sequence[str]) -> str:
    """The turns of a question, or of an answer, as the text of one cell."""
    texts = [text.strip() or NO_ANSWER for text in texts]
    whole = texts[0] if len(texts) == 1 else "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))
    return _fitting(_printable(whole))


def same(text: str) -> str:
    """A text without what spreadsheets change: spaces, line ends, and apostrophes before it (one marks a text)."""
    return " ".join(unicodedata.normalize("NFC", text).split()).lstrip("' ")


def is_right_to_left(text: str) -> bool:
    """Whether a text begins in a script that is written from right to left."""
    for letter in text:
        direction = unicodedata.bidirectional(letter)
        if direction in ("L", "R", "AL"):
            return direction != "L"
    return False


def needs_mark(text: str) -> bool:
    """Whether a spreadsheet that opens a csv would make something else of this text: a formula, a number, a date."""
    return bool(re.match(r"[=+\-@\t\r]", text)) or (len(text) <= 30 and any(letter.isdigit() for letter in text))


def _printable(text: str) -> str:
    """Without what XML, which an xlsx is made of, cannot hold."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(
        letter
        if letter in "\n\t" or (unicodedata.category(letter) not in ("Cc", "Cs") and letter not in "\ufffe\uffff")
        else "\ufffd"
        for letter in text
    )


def _fitting(text: str) -> str:
    data = text.encode("utf-16-le")
    if len(data) <= 2 * CELL:
        return text
    return data[: 2 * (CELL - len(_CUT))].decode("utf-16-le", errors="ignore") + _CUT
