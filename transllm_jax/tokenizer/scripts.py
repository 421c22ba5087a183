"""Which characters a language is written in: the runs of text that vocabulary expansion is about."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from transllm_jax.errors import UserError


@dataclass(frozen=True)
class Script:
    """A target script: the language's English name and its Unicode blocks as inclusive (first, last) pairs.

    Blocks of characters that take three bytes in UTF-8 start and end at multiples of 64: all characters that
    share such a character's first two bytes are then in the block too, so a new token that holds only those
    two bytes cannot occur in text of any other script.
    """

    language: str
    blocks: tuple[tuple[int, int], ...]

    @property
    def character_class(self) -> str:
        """The inside of a regular expression's `[...]` that matches the script's characters."""
        return "".join(f"{chr(first)}-{chr(last)}" for first, last in self.blocks)

    @property
    def numerals(self) -> str:
        """The script's own digits and other numeric characters (Unicode category N)."""
        characters = (chr(c) for first, last in self.blocks for c in range(first, last + 1))
        return "".join(c for c in characters if unicodedata.category(c).startswith("N"))


_DEVANAGARI = ((0x0900, 0x097F),)
_ARABIC = ((0x0600, 0x06FF), (0x0750, 0x077F))
_CYRILLIC = ((0x0400, 0x04FF),)

SCRIPTS = {
    "ar": Script("Arabic", _ARABIC),
    "bn": Script("Bengali", ((0x0980, 0x09FF),)),
    "el": Script("Greek", ((0x0370, 0x03FF),)),
    "fa": Script("Persian", _ARABIC),
    "he": Script("Hebrew", ((0x0590, 0x05FF),)),
    "hi": Script("Hindi", _DEVANAGARI),
    "km": Script("Khmer", ((0x1780, 0x17FF),)),
    "lo": Script("Lao", ((0x0E80, 0x0EFF),)),
    "mr": Script("Marathi", _DEVANAGARI),
    "ne": Script("Nepali", _DEVANAGARI),
    "ru": Script("Russian", _CYRILLIC),
    "ta": Script("Tamil", ((0x0B80, 0x0BFF),)),
    "te": Script("Telugu", ((0x0C00, 0x0C7F),)),
    "th": Script("Thai", ((0x0E00, 0x0E7F),)),
    "uk": Script("Ukrainian", _CYRILLIC),
}


def script_of(language: str) -> Script:
    """The script of a language given as ISO 639-1 code. Raises UserError for one that is not in the table."""
    if language not in SCRIPTS:
        raise UserError(f"language {language!r} is not supported: use one of {', '.join(sorted(SCRIPTS))}")
    return SCRIPTS[language]
