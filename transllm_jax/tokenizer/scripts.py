"""Which characters a language is written in; vocabulary expansion learns from runs of them.

A language's scripts come from CLDR's likely subtags (Babel), a script's code points from the Unicode character database
(fontTools). No table of languages or code points is kept here.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from babel import Locale
from babel.core import get_global
from fontTools import unicodedata as ucd
from fontTools.unicodedata import Blocks, Scripts

from transllm_jax.errors import UserError

Range = tuple[int, int]

# ZERO WIDTH NON-JOINER and JOINER: of no script, and part of the spelling of words in many (Sinhala, Persian, Bengali).
JOINERS = "\u200c\u200d"
_NO_SCRIPT = frozenset({"Zyyy", "Zinh", "Zzzz"})  # common, inherited, unassigned
_UNASSIGNED = "Zzzz"
_LATIN = "Latn"
_CJK_SIGNS = "CJK Symbols and Punctuation"  # mostly of no script, with some letters: 々, 〇
_ADDITION = re.compile("Extended|Supplement|Symbols|Forms|Extensions")
_MARKS = (0x300, 0x36F)  # accents that are not part of a letter, for instance of Yoruba's ẹ́

# Scripts of ISO 15924 that are several scripts of Unicode, or a variant of one.
_MADE_OF: dict[str, tuple[str, ...]] = {
    "Jpan": ("Hani", "Hira", "Kana"),
    "Kore": ("Hang", "Hani"),
    "Hrkt": ("Hira", "Kana"),
    "Hans": ("Hani",),
    "Hant": ("Hani",),
    "Hanb": ("Hani", "Bopo"),
    "Jamo": ("Hang",),
    "Aran": ("Arab",),
    "Cyrs": ("Cyrl",),
    "Latf": ("Latn",),
    "Latg": ("Latn",),
    "Geok": ("Geor",),
    "Syre": ("Syrc",),
    "Syrj": ("Syrc",),
    "Syrn": ("Syrc",),
}


@dataclass(frozen=True)
class Script:
    """What a target language is written in. language: its English name.

    blocks: code points as inclusive (first, last) ranges. They are the Unicode blocks that are mostly of the scripts,
    including their digits and signs, without characters of other scripts; for the Latin script only letters and
    combining marks. A new token may hold only the first two bytes of a character that takes three in UTF-8. So that it
    cannot occur in text of other scripts, ranges are extended to multiples of 64, the characters with the same first
    two bytes, if the code points in between are unassigned or of the scripts. If such a stretch also has another
    script, additions to the script (a block of extensions, or beyond the basic plane) are left out there, and other
    characters are kept.

    scripts: their names in Unicode. latin: English uses the script too, so not all ids of English text can stay.
    shared: other scripts that have characters with the same first two bytes, where ranges could not be extended.
    """

    language: str
    blocks: tuple[Range, ...]
    scripts: tuple[str, ...] = ()
    latin: bool = False
    shared: tuple[str, ...] = ()

    @property
    def character_class(self) -> str:
        """The content of a regular expression's `[...]` that matches the script's characters."""
        return "".join(f"{chr(first)}-{chr(last)}" for first, last in self.blocks)

    def stretch(self, characters: str | None = None) -> str:
        """A regular expression for a run of the script's characters, with at most one joiner between two of them.

        characters: an expression that matches one character, in place of any of the script's.
        """
        one = characters or f"[{self.character_class}]"
        return f"{one}+(?:[{JOINERS}]{one}+)*"

    @property
    def numerals(self) -> str:
        """The script's own digits and other numeric characters (Unicode category N)."""
        characters = (chr(c) for first, last in self.blocks for c in range(first, last + 1))
        return "".join(c for c in characters if unicodedata.category(c).startswith("N"))


def script_of(language: str, scripts: Sequence[str] = ()) -> Script:
    """What a language is written in.

    language: an ISO 639-1 or 639-3 code or a BCP-47 tag (`th`, `tha`, `zh-Hant`, `sr-Latn`, `pa-PK`). scripts: names
    of scripts (`Thai`, `Old Italic`, `Cyrl`) instead of those that the language is usually written in. Raises
    UserError, with similar names, for a language or script that CLDR or Unicode does not know.
    """
    code, usual = _parse(language)
    codes = tuple(dict.fromkeys(c for name in scripts for c in _script_codes(name))) or _MADE_OF.get(usual, (usual,))
    blocks, shared = _blocks(frozenset(codes))
    if not blocks:
        raise UserError(
            f"language {language!r} is written in {usual}, which has no characters in Unicode; give --script"
        )
    names = tuple(str(ucd.script_name(c)) for c in codes)
    return Script(language_name(language) or code, blocks, names, _LATIN in codes, shared)


def language_name(language: str) -> str | None:
    """The English name of a language code or tag: `th` is Thai, `zh-Hant` Traditional Chinese; None if unknown."""
    match = _TAG.match(language.strip().replace("_", "-"))
    if match is None:
        return None
    code = _current(match["language"].lower())
    names = _english_names()
    whole = "_".join(part for part in (code, (match["script"] or "").title()) if part)
    return names.get(whole) or names.get(code)


def is_language_name(word: str) -> bool:
    """Whether this is the English name of a language, such as Thai."""
    return word.strip().casefold() in _names()


_TAG = re.compile(r"^(?P<language>[A-Za-z]{2,3})(-(?P<script>[A-Za-z]{4}))?(-(?P<region>[A-Za-z]{2}|\d{3}))?$")


def _parse(language: str) -> tuple[str, str]:
    """The language's code, and the script (ISO 15924) that it is usually written in. Raises UserError."""
    match = _TAG.match(language.strip().replace("_", "-"))
    if match is None:
        raise UserError(_unknown(language))
    code = _current(match["language"].lower())
    script, region = (match["script"] or "").title(), (match["region"] or "").upper()
    likely: Mapping[str, str] = get_global("likely_subtags")
    found = likely.get(f"{code}_{region}") or likely.get(code)
    if found is None or code == "und":
        raise UserError(_unknown(language))
    if script:
        if script not in _MADE_OF and script not in Scripts.NAMES:
            raise UserError(f"language {language!r} names the script {script!r}, which is unknown; correct it")
        return code, script
    return code, found.split("_")[1]


def _current(code: str) -> str:
    """The code that CLDR uses for a language: `tha` is `th`, `iw` is `he`."""
    aliases: Mapping[str, str] = get_global("language_aliases")
    return aliases.get(code, code).split("_")[0]


@cache
def _english_names() -> dict[str, str]:
    return {str(code): str(name) for code, name in Locale("en").languages.items()}


@cache
def _names() -> frozenset[str]:
    return frozenset(name.casefold() for name in _english_names().values())


def _unknown(language: str) -> str:
    names = _english_names()
    wanted = language.strip().lower()
    by_name = {name.lower(): code for code, name in names.items()}
    near = [by_name[name] for name in difflib.get_close_matches(wanted, by_name, n=3, cutoff=0.75)]
    if len(wanted) <= 4:
        near += difflib.get_close_matches(wanted, [code for code in names if "_" not in code], n=4, cutoff=0.5)
    shown = ", ".join(f"{code.replace('_', '-')} ({names[code]})" for code in dict.fromkeys(near))
    return f"language {language!r} is not supported: give an ISO 639 code or a tag such as th, zh-Hant or sr-Latn" + (
        f"; near it: {shown}" if shown else ""
    )


def _script_codes(name: str) -> tuple[str, ...]:
    if (code := name.strip().title()) in _MADE_OF:
        return _MADE_OF[code]
    try:
        code = str(ucd.script_code(name.strip()))
    except KeyError:
        code = name.strip().title()
    if code in _NO_SCRIPT or code not in Scripts.NAMES:
        names = [str(n).replace("_", " ") for code, n in Scripts.NAMES.items() if code not in _NO_SCRIPT]
        known = {name.lower(): name for name in names}
        near = difflib.get_close_matches(name.strip().lower().replace("_", " "), known, n=3)
        hint = f"; near it: {', '.join(known[n] for n in near)}" if near else "; use Unicode's name, such as Thai"
        raise UserError(f"script {name!r} is unknown{hint}")
    return (code,)


# --- code points ----------------------------------------------------------------------------------------------------


def _pieces(starts: Sequence[int], values: Sequence[str], first: int, last: int) -> Iterator[tuple[int, int, str]]:
    """Split first..last into ranges of one value each; starts, values: fontTools' sorted table of ranges."""
    place = bisect_right(starts, first) - 1
    while place < len(starts) and starts[place] <= last:
        end = starts[place + 1] - 1 if place + 1 < len(starts) else 0x10FFFF
        yield max(starts[place], first), min(end, last), values[place]
        place += 1


def _scripts_in(first: int, last: int) -> Iterator[tuple[int, int, str]]:
    return _pieces(Scripts.RANGES, Scripts.VALUES, first, last)


def _stretch(c: int) -> Range:
    """The code points with the same first two bytes in UTF-8 as `c`, which takes three or four."""
    size = 64 if c < 0x10000 else 4096
    return c // size * size, c // size * size + size - 1


@cache
def _blocks(codes: frozenset[str]) -> tuple[tuple[Range, ...], tuple[str, ...]]:
    """Code points of the scripts as sorted ranges, and the other scripts that share their first two bytes."""
    if _LATIN in codes:
        return _latin_blocks(codes), ()
    chosen: set[int] = set()
    additions: set[int] = set()
    for first, last, name in _pieces(Blocks.RANGES, Blocks.VALUES, 0, 0x10FFFF):
        if name == "No_Block":
            continue
        found = list(_scripts_in(first, last))
        sizes: Counter[str] = Counter()
        for start, end, code in found:
            sizes[code] += end - start + 1
        del sizes[_UNASSIGNED]
        if name == _CJK_SIGNS:
            own = (range(start, end + 1) for start, end, code in found if code in codes)
            chosen |= {c for points in own for c in points if _is_letter(c)}
        elif 2 * sum(sizes[code] for code in codes) > sizes.total():
            # Common and inherited characters of the block are included: Arabic's vowel marks and comma, Thai's ฿.
            points = {c for start, end, code in found if code in codes | _NO_SCRIPT for c in range(start, end + 1)}
            chosen |= points - {0xFEFF}  # a byte order mark, in an Arabic block
            if first > 0xFFFF or _ADDITION.search(name):
                additions |= points
    if not chosen - additions:  # a script beyond the basic plane, such as Adlam, has no other characters
        additions = set()
    stretches = {_stretch(c) for c in chosen if c >= 0x800}
    for first, last in stretches:
        if _others(first, last, chosen):
            chosen -= additions.intersection(range(first, last + 1))
    shared: set[str] = set()
    for first, last in stretches:
        if chosen.isdisjoint(range(first, last + 1)):
            continue
        if others := _others(first, last, chosen):
            shared |= others - codes
        else:
            chosen |= set(range(first, last + 1))
    return _ranges(chosen), tuple(sorted(str(ucd.script_name(code)) for code in shared))


def _latin_blocks(codes: frozenset[str]) -> tuple[Range, ...]:
    """The letters of the scripts, one of which is Latin, and combining marks, as sorted ranges."""
    points = (range(first, last + 1) for first, last, code in _scripts_in(0, 0xFFFF) if code in codes)
    letters = {c for some in points for c in some if _is_letter(c)}
    return _ranges(letters | set(range(_MARKS[0], _MARKS[1] + 1)))


def _others(first: int, last: int, chosen: set[int]) -> set[str]:
    """The scripts of the assigned characters of first..last that are not chosen."""
    return {
        code
        for start, end, code in _scripts_in(first, last)
        if code != _UNASSIGNED and not chosen.issuperset(range(start, end + 1))
    }


def _is_letter(c: int) -> bool:
    """Whether it is a letter or letter-like number and not a compatibility variant (a halfwidth form, a ligature)."""
    return unicodedata.category(chr(c))[0] in "LN" and unicodedata.normalize("NFKC", chr(c)) == chr(c)


def _ranges(points: Iterable[int]) -> tuple[Range, ...]:
    found: list[list[int]] = []
    for c in sorted(points):
        if found and found[-1][1] == c - 1:
            found[-1][1] = c
        else:
            found.append([c, c])
    return tuple((first, last) for first, last in found)
