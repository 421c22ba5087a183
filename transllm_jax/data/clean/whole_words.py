"""Finds whole words and numbers in text of any script.

Most scripts write spaces between words: there, a text is found only where no letter, mark or digit goes on with it.
Some write none (Thai, Lao, Khmer, Burmese, Chinese, Japanese): there, a text is found wherever it is, but not inside a
character with its marks. In Korean, endings are written on to a word; in Arabic, Hebrew and Amharic, short words such
as "in" are written before one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal

# Scripts without spaces between words, as ranges of code points: Thai and Lao, Burmese, Khmer, kana and Bopomofo, the
# ideographs, and the extensions of each.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u3005-\u3007\u3040-\u312f\u31a0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua980-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
_HANGUL = re.compile("[\uac00-\ud7af]")
# Burmese and Khmer: the letter after one of these is written below the letter before it.
_STACKING = "\u1039\u17d2"
# Marks that are left out in most texts: the vowels of Arabic and Hebrew, and the stretched line of Arabic.
_OPTIONAL = re.compile("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0640\u064b-\u0652\u0670]")
# Words that are written together with the next one, at the start of a word that has at least `_LONG` more characters.
_BEFORE = re.compile("(?:[وف]?(?:[بك]?ال|لل|[بكل])|[وف])|[והבכלמש]{1,3}|(?:የ|በ|ለ|ከ|ስለ|እንደ|ወደ|እስከ|እና){1,2}")
_LONG = 3
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# With , or . between thousands, or as in India, with the other before a fraction.
_THOUSANDS = re.compile(
    r"[1-9]\d{0,2}(?:(?:,\d{3})+(?:\.\d+)?|(?:\.\d{3})+(?:,\d+)?)|[1-9]\d?(?:,\d{2})*,\d{3}(?:\.\d+)?"
)
_MINUS = "-−"
# Spaces that only typography puts into a number, between its thousands.
_GROUPED = re.compile("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))")
# NFKC would make 102 of 10².
_RAISED = re.compile("(?<=\\d)(?=[\u00b2\u00b3\u00b9\u2070\u2074-\u2079])")


def spelled(text: str) -> str:
    """The form of a text in which texts are compared.

    NFKC, without case, invisible characters and optional vowel marks, with one space for white space; the digits of all
    scripts are 0 to 9, Arabic's separators in numbers are . and , . Narrow and no-break spaces between thousands are
    left out, and a raised number after another follows ^.
    """
    text = _RAISED.sub("^", _GROUPED.sub("", text))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = _OPTIONAL.sub("", text.replace("\u066b", ".").replace("\u066c", ","))
    kept = (_digit(letter) for letter in text if unicodedata.category(letter) != "Cf")
    return " ".join("".join(kept).split())


def word_places(text: str, part: str) -> Iterator[int]:
    """Where `part` begins in `text` as whole words; both `spelled`."""
    start = text.find(part)
    while start >= 0 and part:
        if _ends(text, start + len(part)) and _begins(text, start, len(part)):
            yield start
        start = text.find(part, start + 1)


def numbers(text: str) -> Iterator[tuple[int, int, Decimal]]:
    """The numbers in digits in a `spelled` text: start, end, value. 1,000 and 1.000 are a thousand, 0.125 an eighth.

    Digits after a letter (covid19) are no number.
    """
    for found in _NUMBER.finditer(text):
        start, value = found.start(), _value(found[0])
        before = text[start - 1 : start]
        if value is None or (_is_word(before) and not _UNSPACED.match(before)):
            continue
        if before and before in _MINUS and not _is_word(text[start - 2 : start - 1]):
            start, value = start - 1, -value
        yield start, found.end(), value


def number_of(text: str) -> Decimal | None:
    """The value of a `spelled` text that is a number in digits, else None."""
    found = list(numbers(text))
    return found[0][2] if len(found) == 1 and found[0][:2] == (0, len(text)) else None


def words(text: str) -> str:
    """The words and symbols of a text, `spelled`, each after one space; none in scripts that write none.

    A minus before a number is a symbol and not punctuation.
    """
    text = re.sub(rf"[{_MINUS}–](?=\s*\d)", "−", spelled(text))
    found = "".join(c if _is_word(c) or unicodedata.category(c)[0] == "S" else " " for c in text.replace("'", ""))
    joined = found.split()
    return "".join(
        word if not place or _UNSPACED.match(word[0]) or _UNSPACED.match(joined[place - 1][-1]) else f" {word}"
        for place, word in enumerate(joined)
    )


def _digit(letter: str) -> str:
    value = unicodedata.decimal(letter, None)
    return letter if value is None else str(value)


def _is_word(letter: str) -> bool:
    """Whether a character is part of a word. Not for the empty text."""
    return bool(letter) and unicodedata.category(letter)[0] in "LMN"


def _value(digits: str) -> Decimal | None:
    """The value of digits with separators; None for what is no number, such as a date."""
    if _THOUSANDS.fullmatch(digits):
        last = max(digits.rfind("."), digits.rfind(","))
        both = "." in digits and "," in digits
        whole, part = (digits[:last], digits[last + 1 :]) if both else (digits, "0")
        return Decimal(f"{re.sub('[.,]', '', whole)}.{part}").normalize()
    if len(re.findall("[.,]", digits)) > 1:
        return None
    return Decimal(digits.replace(",", ".")).normalize()


def _is_edge(text: str, place: int) -> bool:
    """Whether a word may begin or end between text[place - 1] and text[place]."""
    before, after = text[place - 1 : place] if place else "", text[place : place + 1]
    if not _is_word(before) or not _is_word(after):
        return True
    if unicodedata.category(after)[0] == "M" or before in _STACKING:
        return False
    return bool(_UNSPACED.match(before) or _UNSPACED.match(after))


def _ends(text: str, end: int) -> bool:
    if text[end - 1].isdigit() and re.match(r"[.,]\d", text[end:]):
        return False
    goes_on = _HANGUL.match(text[end - 1]) and _HANGUL.match(text[end : end + 1])
    return bool(goes_on) or _is_edge(text, end)


def _begins(text: str, start: int, length: int) -> bool:
    if text[start].isdigit() and re.search(r"\d[.,]$", text[:start]):
        return False
    if _is_edge(text, start):
        return True
    first = start
    while first and _is_word(text[first - 1]):
        first -= 1
    return length >= _LONG and _BEFORE.fullmatch(text[first:start]) is not None
