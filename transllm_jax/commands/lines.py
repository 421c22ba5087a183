"""Text that grows, in lines as wide as the terminal, in any script.

A terminal alone would cut lines in the middle of words. rich counts columns correctly, but it takes the Thai vowel ำ,
and consonants that Hindi writes as one, for characters of their own (rich 15). `regex` knows what readers take for one
character (Unicode's extended grapheme clusters), and which scripts write no spaces. Where words end in these, only a
dictionary can tell: icu4py's, if it is installed. Without it, a line may end after any whole character of them.
"""

from __future__ import annotations

from collections.abc import Callable

import regex
from rich.cells import cell_len
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType, Segment, Segments
from rich.style import Style

from transllm_jax.evaluation.page.measures import clean

_CHARACTER = regex.compile(r"\X")
# Scripts without spaces between words (Thai, Lao, Khmer, Burmese; and what is two columns wide: Chinese, Japanese): a
# line may end before and after their characters ...
_WITHOUT_SPACES = regex.compile(r"[\p{LB=SA}\p{EA=W}\p{EA=F}]")
# ... but not before these: closing punctuation, small kana, vowels and signs that follow a Thai or Lao consonant;
_NEVER_FIRST = regex.compile(r"[\p{LB=CL}\p{LB=CP}\p{LB=NS}\p{LB=CJ}\p{LB=EX}\p{LB=IS}\p{Pf}\p{Lm}ะาๅฯະາ]")
# and not after these: opening punctuation, and the vowels that are written before a Thai or Lao consonant.
_NO_BREAK_SPACES = "\u00a0\u202f"
_NEVER_LAST = regex.compile(r"[\p{LB=OP}\p{Pi}\p{Logical_Order_Exception}]$")


def units(text: str) -> list[str]:
    """A text in pieces that no line break may divide; spaces belong to the piece before them."""
    found: list[str] = []
    for character in _CHARACTER.findall(text):
        if found and not _may_divide(found[-1], character):
            found[-1] += character
        else:
            found.append(character)
    return found


def _may_divide(before: str, after: str) -> bool:
    if after.isspace():
        return False
    if before[-1].isspace():
        return before[-1] not in _NO_BREAK_SPACES
    if _NEVER_FIRST.match(after) or _NEVER_LAST.search(before):
        return False
    return bool(_WITHOUT_SPACES.match(after) or _WITHOUT_SPACES.match(_CHARACTER.findall(before)[-1]))


def words(text: str) -> list[str]:
    """`units`, by ICU's dictionaries. Raises ImportError where icu4py is not installed."""
    from icu4py.breakers import LineBreaker

    # The language changes only details of Japanese and Chinese.
    return list(LineBreaker(text, "en"))


def divider() -> tuple[Callable[[str], list[str]], int]:
    """What cuts a growing text into pieces, and how many of the last ones more text may change."""
    try:
        words("")
    except ImportError:
        return units, 1
    # Where a word of Thai ends depends on the words after it.
    return words, 3


class Lines:
    """Writes a growing text to a terminal. Control characters, which could do anything there, become U+FFFD."""

    def __init__(self, console: Console, divide: tuple[Callable[[str], list[str]], int] | None = None) -> None:
        """divide: as `divider` returns it, for tests."""
        self._console = console
        self._divide, self._open = divide or divider()
        self._pending, self._style = "", ""
        self._column, self._spaces = 0, ""
        # What was put into lines since the last space.
        self._run = ""
        # What was put into lines, but not yet sent to the terminal; whether a sign is there that something is awaited.
        self._lines, self._waiting = "", False

    def wait(self) -> None:
        """Show that text will come. The sign disappears with the first text."""
        self._print("…", "dim")
        self._waiting = True

    def write(self, text: str, style: str = "") -> None:
        """More text. What may belong to a longer word is written with the next text, or at the end."""
        if style != self._style:
            self._flush()
            self._send()
            self._style, self._run = style, ""
        self._pending += clean(text.replace("\r", "")).replace("\t", "    ")
        *lines, rest = self._pending.split("\n")
        for line in lines:
            self._put(self._cut(line))
            self._break()
            self._run = ""
        pieces = self._cut(rest)
        self._put(pieces[: -self._open])
        self._pending = "".join(pieces[-self._open :])
        self._send()

    def end(self) -> None:
        """Write the rest, and end the line."""
        self._flush()
        self._break()
        self._send()

    def _flush(self) -> None:
        pieces, self._pending = self._cut(self._pending), ""
        self._put(pieces)

    def _cut(self, text: str) -> list[str]:
        """The pieces of a text, given the text before it: where a word of Thai ends depends on that, too."""
        found, place = [], -len(self._run)
        for piece in self._divide(self._run + text):
            place += len(piece)
            if place > 0:
                found.append(piece[-place:])
        return found

    def _put(self, pieces: list[str]) -> None:
        # Nothing before a space matters.
        self._run = regex.split(r"\s", self._run + "".join(pieces))[-1]
        for piece in pieces:
            word = piece.rstrip(" ")
            width = cell_len(word)
            if word and self._column and self._column + len(self._spaces) + width > self._console.width:
                self._break()
            gap, self._spaces = (self._spaces if word else ""), ("" if word else self._spaces)
            if word:
                self._emit(gap)
                self._emit_word(word)
            self._spaces += piece[len(word) :]

    def _emit_word(self, word: str) -> None:
        """A word; one that is longer than a line is divided between its characters."""
        if self._column + cell_len(word) <= self._console.width:
            return self._emit(word)
        part = ""
        for character in _CHARACTER.findall(word):
            if self._column + cell_len(part + character) > self._console.width:
                self._emit(part)
                self._break()
                part = ""
            part += character
        return self._emit(part)

    def _break(self) -> None:
        """End the line, without the spaces at its end."""
        self._lines += "\n"
        self._column, self._spaces = 0, ""

    def _emit(self, text: str) -> None:
        self._lines += text
        self._column += cell_len(text)

    def _send(self) -> None:
        if not self._lines:
            return
        if self._waiting:
            self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
            self._waiting = False
        self._print(self._lines, self._style)
        self._lines = ""

    def _print(self, text: str, style: str) -> None:
        self._console.print(Segments([Segment(text, Style.parse(style) if style else None)]), end="", crop=False)


class Plain:
    """Writes a growing text as it is, to a file or a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def wait(self) -> None:
        """Nothing: a file waits for nothing."""

    def write(self, text: str, style: str = "") -> None:
        """More text."""
        if text:
            self._console.print(Segments([Segment(text)]), end="", crop=False)

    def end(self) -> None:
        """End the line."""
        self.write("\n")
