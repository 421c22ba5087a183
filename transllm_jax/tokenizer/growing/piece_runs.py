"""Text as a SentencePiece tokenizer sees it, and the stretches of it that new pieces are learned from.

Such a tokenizer cuts nothing before it merges: the whole text is one word. Stretches are found so that no piece
crosses their ends, hence each is encoded alone as it is within its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transllm_jax.tokenizer.scripts import JOINERS, Script

SPACE = "▁"


def prefixes(state: dict[str, Any]) -> str:
    """When "▁" is put before a text: "always" (SentencePiece's own way), "unless" one stands there, or "never"."""
    if (step := state["pre_tokenizer"]) is not None:  # Metaspace
        return "never" if step["prepend_scheme"] == "never" else "unless"
    normalizer = state["normalizer"]
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return "always" if any(step["type"] == "Prepend" for step in steps) else "never"


class PieceRuns:
    """Finds the stretches with target-script characters in a text."""

    def __init__(self, state: dict[str, Any], script: Script, known: Iterable[str], *, whole_words: bool) -> None:
        """`state`: the base's parsed tokenizer.json; `known`: the pieces that its merges use and make.

        whole_words: for a script that the base writes itself, whose pieces hold other characters too. The stretches
        then go from space to space.
        """
        self._prefix = prefixes(state)
        inside = script.character_class
        joiner = f"[{JOINERS}]?"
        self._learnable = re.compile(f"(?:{SPACE}?|{joiner})[{inside}](?:{joiner}[{inside}])*{joiner}")
        # A piece that holds a character of the script and another, or a space behind something.
        touching = re.compile(f"[{inside}][^{inside}]|[^{SPACE}{inside}][{inside}]|[^{SPACE}]{SPACE}")
        if whole_words or any(touching.search(piece) for piece in known):
            self._stretch = re.compile(f"{SPACE}*[^{SPACE}{inside}]*[{inside}][^{SPACE}]*")
        else:
            # A new piece may begin or end with a joiner, wherever that stands.
            self._stretch = re.compile(f"{SPACE}*[{JOINERS}]*[{inside}][{inside}{JOINERS}]*")

    def normalised(self, text: str) -> str:
        """The text with "▁" for spaces, and before it where the tokenizer puts one."""
        text = text.replace(" ", SPACE)
        if not text or self._prefix == "never" or (self._prefix == "unless" and text.startswith(SPACE)):
            return text
        return SPACE + text

    def find(self, text: str) -> list[str]:
        """The stretches in order, normalised."""
        return self._stretch.findall(self.normalised(text))

    def learnable(self, piece: str) -> bool:
        """Whether this may become a new piece: characters of the script, with at most a "▁" before them, and joiners
        beside them, never two in a row: text without the script cannot make it."""
        return self._learnable.fullmatch(piece) is not None
