"""Text as a SentencePiece tokenizer sees it, and the stretches of it that new pieces are learned from.

Such a tokenizer does not split text before merging: the whole text is one word. No piece crosses the ends of a stretch,
so it is encoded alone in the same way as within its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transllm_jax.tokenizer.growing.icu_words import Span
from transllm_jax.tokenizer.scripts import JOINERS, Script

SPACE = "▁"


def prefixes(state: dict[str, Any]) -> str:
    """When "▁" is put before a text: "always" (as in SentencePiece), "unless" it begins with one, or "never"."""
    if (step := state["pre_tokenizer"]) is not None:  # Metaspace
        return "never" if step["prepend_scheme"] == "never" else "unless"
    normalizer = state["normalizer"]
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return "always" if any(step["type"] == "Prepend" for step in steps) else "never"


class PieceRuns:
    """Finds the stretches with target-script characters in a text."""

    def __init__(self, state: dict[str, Any], script: Script, known: Iterable[str], *, whole_words: bool) -> None:
        """`state`: the base's parsed tokenizer.json; `known`: the pieces that its merges use and make.

        whole_words: stretches go from space to space. This is for a script that the base has pieces for, which hold
        other characters too.
        """
        self._prefix = prefixes(state)
        inside = script.character_class
        joiner = f"[{JOINERS}]?"
        self._learnable = re.compile(f"(?:{SPACE}?|{joiner})[{inside}](?:{joiner}[{inside}])*{joiner}")
        # A piece with a character of the script next to another one, or with a space after something.
        crossing = re.compile(f"[{inside}][^{inside}]|[^{SPACE}{inside}][{inside}]|[^{SPACE}]{SPACE}")
        if whole_words or any(crossing.search(piece) for piece in known):
            self._stretch = re.compile(f"{SPACE}*[^{SPACE}{inside}]*[{inside}][^{SPACE}]*")
        else:
            # A new piece may begin or end with any joiner.
            self._stretch = re.compile(f"{SPACE}*[{JOINERS}]*[{inside}][{inside}{JOINERS}]*")

    def normalised(self, text: str) -> str:
        """The text with "▁" for each space, and before the text if the tokenizer puts one there."""
        text = text.replace(" ", SPACE)
        if not text or self._prefix == "never" or (self._prefix == "unless" and text.startswith(SPACE)):
            return text
        return SPACE + text

    def find(self, text: str) -> tuple[str, list[Span]]:
        """The text, normalised, and where its stretches begin and end, in order."""
        text = self.normalised(text)
        return text, [match.span() for match in self._stretch.finditer(text)]

    def learnable(self, piece: str) -> bool:
        """Whether this may become a new piece: at most one "▁", then characters of the script and single joiners.

        Text without the script cannot contain such a piece.
        """
        return self._learnable.fullmatch(piece) is not None
