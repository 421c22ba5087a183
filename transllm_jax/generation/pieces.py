"""An English text as the sentences that are translated, and everything between them, which stays as it is.

A translation model is trained on sentences. A long answer is cut into them, all sentences of all answers are translated
together, and the answer is put together again with its lines, list markers, headings, tables and code blocks.

The rule for the end of a sentence is our own, for English alone: Unicode's rule (UAX #29, in ICU) also cuts after
"Dr.", "fig." and the number of a list item. Where it is in doubt (an abbreviation before a capital) nothing is cut: a
piece of two sentences is translated better than half a sentence.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

# What a translation must hold as its source does.
Kept = Literal["code", "urls", "numbers", "markup"]


class Piece(NamedTuple):
    """A part of a text. translate: it is a sentence; if not, it is copied."""

    text: str
    translate: bool


_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_FORMULA = re.compile(r"\s*(\$\$|\\\[|\\begin\{)")
_FORMULA_END = {"$$": "$$", r"\[": r"\]", r"\begin{": r"\end{"}
# Quotes, headings, bullets, numbers and letters of lists, and boxes to tick, at the start of a line.
_PREFIX = re.compile(
    r"\s*(?:>\s*)*(?:#{1,6}\s+)?(?:(?:[-*+•–]|\(?(?:\d+|[A-Za-z]|[ivxIVX]+)[.)])\s+)?(?:\[[ xX]\]\s+)?"
)
_CELL = re.compile(r"((?<!\\)\|)")
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)|\\\(.+?\\\)")
_URL = re.compile(r"(?:https?://|ftp://|www\.)[^\s<>\"'`]*[\w/#=&]|[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.ASCII)
_NUMBER = re.compile(r"\d+(?:[.,\u066b\u066c]\d+)*")
_BOLD = re.compile(r"\*\*|__")
# A heading in bold, alone or before a text: **Step 1:** ...
_BOLD_HEAD = re.compile(r"(\*\*|__)(?=\S)((?:(?!\1).)+?)(\1(?:\s*[:.–-](?=\s|$))?)(\s*)")
_CLOSERS = "\"'”’)\\]*_"
_STOP = re.compile(rf"[.!?…]+[{_CLOSERS}]*(?=\s)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:(?:[A-Za-z]\.)*[A-Za-z]|Mrs?|Mx|Ms|Drs?|Profs?|Rev|Hon|Sr|Jr|St|Mt|Gen|Col|Lt|Sgt|Capt|Cmdr|"
    r"Sen|Rep|Gov|Pres|vs|etc|cf|al|ca|approx|est|dept|Inc|Ltd|Co|Corp|Bros|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|"
    r"Dec)\.$"
)
# Abbreviations only before a number: "No." is also an answer.
_BEFORE_NUMBER = re.compile(r"(?:^|[\s(])(?:[Nn]os?|[Ff]igs?|[Vv]ols?|pp?|[Ss]ecs?|[Cc]h|[Ee]qs?|[Aa]rts?)\.$")
_I = re.compile(r"(?:^|[\s(\"'“‘])I\.$")


def cut(text: str) -> list[Piece]:
    """The pieces of an English text, in order; joined, they are the text."""
    found: list[Piece] = []
    for piece in _pieces(text):
        if not piece.text:
            continue
        if piece.translate and not any(map(str.isalpha, piece.text)):
            piece = Piece(piece.text, False)
        if found and not piece.translate and not found[-1].translate:
            found[-1] = Piece(found[-1].text + piece.text, False)
        else:
            found.append(piece)
    return found


def join(pieces: Sequence[Piece], translations: Sequence[str], between: str = " ") -> str:
    """The text with the translation of each sentence in its place.

    translations: one for each piece that is translated, in order. between: what separates two sentences on a line in
    the target language.
    """
    given = iter(translations)
    found: list[str] = []
    for number, piece in enumerate(pieces):
        if piece.translate:
            found.append(" ".join(next(given).split()))
        elif piece.text == " " and 0 < number < len(pieces) - 1:
            found.append(between)
        else:
            found.append(piece.text)
    return "".join(found)


def lost(source: str, translation: str, kinds: Sequence[Kept]) -> list[str]:
    """What a source holds and its translation does not, of these kinds: code, addresses, numbers, marks of bold text.

    A number may be written with other digits or separators (1,500 as ๑.๕๐๐), but not in words.
    """
    found: list[str] = []
    if "code" in kinds:
        found += [code for code in _spans(_CODE, source) if code not in translation]
    if "urls" in kinds:
        found += [url for url in _spans(_URL, source) if url not in translation]
    if "numbers" in kinds:
        found += list((Counter(_numbers(source)) - Counter(_numbers(translation))).elements())
    if "markup" in kinds:
        marks = Counter(_BOLD.findall(source))
        marks.subtract(_BOLD.findall(translation))
        found += [mark for mark, count in marks.items() if count]
    return found


def _spans(pattern: re.Pattern[str], text: str) -> list[str]:
    return [match[0] for match in pattern.finditer(text)]


def _numbers(text: str) -> list[str]:
    return [
        "".join(str(unicodedata.digit(letter)) for letter in number if letter.isdigit())
        for number in _NUMBER.findall(text)
    ]


def _pieces(text: str) -> Iterator[Piece]:
    end: str | None = None  # what ends the block of code or the formula that the line is in
    for line in text.splitlines(keepends=True):
        body = line.rstrip()
        rest = line[len(body) :]
        if end is not None:
            yield Piece(line, False)
            if end in body if end[0] in "$\\" else body.strip().startswith(end):
                end = None
            continue
        fence, formula = _FENCE.match(body), _FORMULA.match(body)
        if fence is not None:
            end = fence[1]
            yield Piece(line, False)
        elif formula is not None:
            closing = _FORMULA_END[formula[1]]
            end = None if closing in body[formula.end() :] else closing
            yield Piece(line, False)
        else:
            prefix = _PREFIX.match(body)
            start = prefix.end() if prefix is not None else 0
            yield Piece(body[:start], False)
            yield from _line(body[start:])
            yield Piece(rest, False)


def _line(text: str) -> Iterator[Piece]:
    """The pieces of a line without its prefix. A row of a table is cut into its cells."""
    cells = _CELL.split(text) if text.startswith("|") else [text]
    for cell in cells:
        if cell == "|":
            yield Piece(cell, False)
        else:
            yield from _between_spaces(cell, _headed)


def _headed(text: str) -> Iterator[Piece]:
    """The pieces of a text that may begin with a heading in bold."""
    head = _BOLD_HEAD.match(text)
    if head is None:
        yield from _sentences(text)
        return
    mark, inside, closing, space = head.groups()
    rest = text[head.end() :]
    if rest and closing == mark and inside[-1] not in ":.!?":
        yield from _sentences(text)  # a word that is emphasised in its sentence
        return
    yield Piece(mark, False)
    yield from _sentences(inside)
    yield Piece(closing + space, False)
    yield from _sentences(rest)


def _sentences(text: str) -> Iterator[Piece]:
    fixed = [match.span() for pattern in (_CODE, _URL) for match in pattern.finditer(text)]
    start = 0
    for stop in _STOP.finditer(text):
        end = stop.end()
        if _ends_sentence(text, start, stop) and not any(first < end < last for first, last in fixed):
            yield from _between_spaces(text[start:end], _without_end)
            start = end
    yield from _between_spaces(text[start:], _without_end)


def _ends_sentence(text: str, start: int, stop: re.Match[str]) -> bool:
    following = text[stop.end() :].lstrip()
    first = following.lstrip("\"'“‘([*_`")[:1]
    if not first or first.islower():
        return False
    if not stop[0].startswith("."):
        return True
    before = text[start : stop.start() + 1]
    if _ABBREVIATION.search(before) and not _I.search(before):
        return False
    return not (first.isdigit() and _BEFORE_NUMBER.search(before))


def _without_end(sentence: str) -> Iterator[Piece]:
    """A sentence; code or an address that follows a colon at its end is copied."""
    for pattern in (_CODE, _URL):
        for match in pattern.finditer(sentence):
            before, after = sentence[: match.start()], sentence[match.end() :]
            head = before.rstrip()
            if head.endswith(":") and not any(map(str.isalnum, after)):
                yield Piece(head, True)
                yield Piece(before[len(head) :] + match[0] + after, False)
                return
    yield Piece(sentence, not _is_fixed(sentence))


def _is_fixed(text: str) -> bool:
    """Whether nothing but code and addresses is in a text."""
    return not any(map(str.isalpha, _URL.sub("", _CODE.sub("", text))))


def _between_spaces(text: str, pieces_of: Callable[[str], Iterator[Piece]]) -> Iterator[Piece]:
    """The pieces of a text, with the white space around it copied."""
    inner = text.strip()
    if not inner:
        yield Piece(text, False)
        return
    start = text.index(inner)
    yield Piece(text[:start], False)
    yield from pieces_of(inner)
    yield Piece(text[start + len(inner) :], False)
