"""Where text is cut into words, by ICU's break iterator, so that no new token is learned across two of them.

Thai, Lao, Khmer, Burmese, Chinese and Japanese write no spaces between words; there ICU looks words up in its
dictionaries. icu4py is imported only here, and needed only while tokens are learned.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from transllm_jax.errors import UserError

Span = tuple[int, int]

_SPACES = " ▁"  # as written in text, and by SentencePiece


def check_icu() -> None:
    """Raises UserError if icu4py is not installed."""
    _library()


class WordCutter:
    """Cuts stretches of a text where words end.

    version: ICU's, for the report. Another version may have other dictionaries.
    """

    def __init__(self, language: str) -> None:
        """`language`: a code or tag; ICU has special rules for few. Raises UserError if icu4py is not installed."""
        self._icu, self._breaker = _library()
        self._language = language

    @property
    def version(self) -> str:
        return str(self._icu.icu_version)

    def cut(self, text: str, spans: Sequence[Span]) -> list[list[str]]:
        """The words of each of the stretches of `text` at `spans`.

        A space belongs to the word after it, as for GPT-2 and SentencePiece. ICU reads the whole text, because where a
        word ends depends on what follows.
        """
        # The words, not ICU's offsets, which count units of UTF-16.
        ends = list(accumulate(map(len, self._breaker(text, self._language)))) if spans else []
        found = []
        for first, last in spans:
            words = []
            for end in ends[bisect_right(ends, first) : bisect_left(ends, last)]:
                if text[end - 1] not in _SPACES:
                    words.append(text[first:end])
                    first = end
            found.append([*words, text[first:last]])
        return found


def _library() -> tuple[Any, Any]:
    """The module icu4py, and its iterator over the words of a text."""
    try:
        import icu4py
        from icu4py.breakers import WordBreaker
    except ImportError as error:
        raise UserError("learning tokens within words needs icu4py; pip install 'transllm-jax[icu]'") from error
    return icu4py, WordBreaker
