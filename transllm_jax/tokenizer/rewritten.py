"""Letters that a base tokenizer cannot produce, because its normalizer replaces them.

NFKC decomposes Thai's sara am (U+0E33), and StripAccents drops tone marks: new tokens are then learned from normalised
text, and the model never writes the letters that its readers write. New tokens cannot fix that.
"""

from __future__ import annotations

import unicodedata

from transllm_jax.tokenizer.scripts import Script
from transllm_jax.tokenizer.tokenizer import Tokenizer

_SHOWN = 8
# What SentencePiece's normalizers put before a text, for a space.
_SPACE = "▁"


def rewritten_letters(base: Tokenizer, script: Script) -> list[str]:
    """The script's letters, marks and digits that occur in NFC text and that the base's normalizer changes."""
    normalizer = base.backend.normalizer
    if normalizer is None:
        return []
    letters = (chr(point) for first, last in script.blocks for point in range(first, last + 1))
    return [
        letter
        for letter in letters
        if unicodedata.category(letter)[0] in "LMN"
        and unicodedata.is_normalized("NFC", letter)
        and normalizer.normalize_str(letter).removeprefix(_SPACE) != letter
    ]


def rewritten_letters_message(base: Tokenizer, script: Script) -> str | None:
    """A warning about `rewritten_letters`, for adding tokens to this base; None if there are none."""
    found = rewritten_letters(base, script)
    if not found:
        return None
    shown = ", ".join(f"{letter} (U+{ord(letter):04X})" for letter in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"the base's normalizer replaces {shown}{more} by other letters: a model with it never writes them"
