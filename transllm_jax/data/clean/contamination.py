"""Finds training text that contains texts of an evaluation set.

Both sides are normalised (compatibility forms, case; only letters, marks and digits stay, so neither spaces nor
punctuation hide a copy) and compared by character n-grams. An evaluation text contaminates a document that contains at
least a given share of the text's distinct n-grams: a copy with a few words changed is still found, and a document that
only shares a phrase with it is not. An evaluation text shorter than an n-gram must occur in the document as a whole.

Checkable questions (`evaluation.answers`) are mostly made from templates, and training text may have other questions of
the same template ("What is the capital of ...?"), which share most n-grams with them. So of a question, a document is
contaminated only by the whole, from the first word to the last one ("Niger" is not in "Nigeria"); a question with
earlier turns is whole together with these.

Evaluation sets are small, training text is not. So the n-grams of the sets form one sorted table, and a bitmap of the
upper bits of their hashes rules out most other n-grams before the table is searched.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from functools import cache
from math import ceil

import numpy as np

from transllm_jax.data.clean.near_duplicates import code_points, ngram_hashes
from transllm_jax.data.clean.whole_words import word_places, words
from transllm_jax.errors import UserError

SHORTEST = 12  # normalised characters; a shorter text occurs in many documents by chance
N = 2 * SHORTEST  # characters in an n-gram, normalised: about five English words
SHARE = 0.5
_FORMAT = 1  # of the result; part of the key
_ODD = np.uint64(0xD6E8FEB86659FD93)
_CHUNK = 1 << 16  # characters at a time: bounds memory


@cache
def categories() -> np.ndarray:
    """The first letter of the Unicode category of every code point, as its ASCII code: uint8 [0x110000]."""
    return np.frombuffer("".join(unicodedata.category(chr(c))[0] for c in range(0x110000)).encode(), np.uint8)


@cache
def _is_compared() -> np.ndarray:
    """bool [0x110000]: letters, marks and digits."""
    return np.isin(categories(), np.frombuffer(b"LM", np.uint8)) | _digits()


def _digits() -> np.ndarray:
    numeric = np.flatnonzero(categories() == ord("N"))
    digits = np.zeros(len(categories()), bool)
    digits[[c for c in numeric.tolist() if unicodedata.category(chr(c)) == "Nd"]] = True
    return digits


def compared(text: str) -> np.ndarray:
    """The part of a text that is compared: code points of its letters, marks and digits, NFKC, case-folded, uint32 [T].

    Thai vowels and tones are marks.
    """
    codes = code_points(unicodedata.normalize("NFKC", text).casefold())
    return codes[_is_compared()[codes]]


class _Table:
    """A set of hashes, for fast look-ups of many others."""

    def __init__(self, hashes: np.ndarray) -> None:
        """hashes: uint64, sorted, without repeats."""
        self.hashes = hashes
        # The bitmap has 16 to 32 slots per hash: at most 6 % of the hashes outside the set pass it.
        bits = max(16, (16 * len(hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._map = np.zeros(1 << bits, bool)
        self._map[hashes >> self._shift] = True

    def places(self, hashes: np.ndarray) -> np.ndarray:
        """The indices in the set of the `hashes` (uint64 [n], any) that it contains: int64, ascending, each once."""
        candidates = hashes[self._map[hashes >> self._shift]]
        if not len(candidates):
            return np.empty(0, np.int64)
        places = np.minimum(np.searchsorted(self.hashes, candidates), len(self.hashes) - 1)
        return np.unique(places[self.hashes[places] == candidates])


class EvaluationTexts:
    """Texts of evaluation sets, to be kept out of training text.

    names: the sets, in the order given. texts: how many texts are looked for. ignored: how many texts are too short to
    look for (fewer than SHORTEST letters, marks and digits). key: changes with anything that `found_in` depends on.
    """

    def __init__(
        self, texts: Iterable[tuple[str, str]], *, whole: Iterable[tuple[str, str]] = (), share: float = SHARE
    ) -> None:
        """texts: (name of the evaluation set, text). whole: the same of texts that count only as a whole.

        share: a document with at least this share of a text's distinct n-grams is contaminated. Raises UserError unless
        it is above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise UserError(f"the share of n-grams for contamination is {share}: it must be above 0 and at most 1")
        digest = hashlib.sha256(json.dumps([_FORMAT, N, SHORTEST, share]).encode())
        names: dict[str, int] = {}
        grams: list[np.ndarray] = []  # by long text
        sets: list[int] = []  # by long text: the number of its set
        shorts: dict[str, int] = {}  # short text, normalised: the number of the first set that has it
        self.ignored = 0
        for name, text in texts:
            digest.update(json.dumps([name, text]).encode())
            number = names.setdefault(name, len(names))
            codes = compared(text)
            if len(codes) < SHORTEST:
                self.ignored += 1
            elif len(codes) < N:
                shorts.setdefault(_string(codes), number)
            else:
                grams.append(np.unique(_doubled(ngram_hashes(codes, SHORTEST))))
                sets.append(number)
        wholes: dict[str, tuple[int, str]] = {}  # normalised: the number of the first set that has it, its words
        for name, text in whole:
            digest.update(json.dumps(["whole", name, text]).encode())
            number, codes = names.setdefault(name, len(names)), compared(text)
            if len(codes) < SHORTEST:
                self.ignored += 1
            else:
                wholes.setdefault(_string(codes), (number, words(text)))
        self.names = tuple(names)
        self.texts = len(sets) + len(shorts) + len(wholes)
        self.key = digest.hexdigest()[:32]
        sizes = np.array([len(some) for some in grams], np.int64)
        # The n-grams that a document must have; the product is rounded first, as 0.07 * 300 is a little more than 21.
        self._needed = np.array([ceil(round(share * size, 6)) for size in sizes.tolist()], np.int64)
        self._sets = np.array(sets, np.int64)
        hashes = np.concatenate([*grams, np.empty(0, np.uint64)])
        order = np.argsort(hashes, kind="stable")
        # The texts with the n-gram at index i of the table are owners[offsets[i] : offsets[i + 1]].
        self._owners = np.repeat(np.arange(len(sizes)), sizes)[order]
        unique, first = np.unique(hashes[order], return_index=True)
        self._offsets = np.append(first, len(hashes))
        self._table = _Table(unique)
        self._shorts, self._wholes = shorts, wholes
        starts = [ngram_hashes(code_points(text)[:SHORTEST], SHORTEST) for text in (*shorts, *wholes)]
        self._starts = _Table(np.unique(np.concatenate([*starts, np.empty(0, np.uint64)])))

    def found_in(self, text: str) -> str | None:
        """The name of the first evaluation set that has a text in this document, or None."""
        numbers = self._sets_in(text)
        return self.names[min(numbers)] if numbers else None

    def every_found_in(self, text: str) -> set[str]:
        """The names of all evaluation sets that have a text in this document."""
        return {self.names[number] for number in self._sets_in(text)}

    def _sets_in(self, text: str) -> set[int]:
        """The numbers of the sets that have a text in a document."""
        codes = compared(text)
        longs, shorts = [], False
        # In chunks, to bound memory; they overlap so that no n-gram is lost between two of them.
        for start in range(0, max(1, len(codes) - N + 1), _CHUNK):
            halves = ngram_hashes(codes[start : start + _CHUNK + N - 1], SHORTEST)
            shorts = shorts or len(self._starts.places(halves)) > 0
            longs.append(self._table.places(_doubled(halves)))
        places = longs[0] if len(longs) == 1 else np.unique(np.concatenate(longs))
        numbers = self._held(places) if len(places) else set()
        if shorts:
            document = _string(codes)
            numbers |= {of_set for short, of_set in self._shorts.items() if short in document}
            found = [held for normalised, held in self._wholes.items() if normalised in document]
            spelled = words(text) if found else ""
            numbers |= {of_set for of_set, whole in found if next(word_places(spelled, whole), None) is not None}
        return numbers

    def _held(self, places: np.ndarray) -> set[int]:
        """The numbers of the sets with a text that contaminates the document.

        places: indices in the table of the document's n-grams.
        """
        first, counts = self._offsets[places], self._offsets[places + 1] - self._offsets[places]
        skipped = np.repeat(first - np.append(0, counts.cumsum()[:-1]), counts)
        held = np.bincount(self._owners[skipped + np.arange(len(skipped))], minlength=len(self._needed))
        return set(self._sets[held >= self._needed].tolist())


def _string(codes: np.ndarray) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def _doubled(halves: np.ndarray) -> np.ndarray:
    """Hashes of n-grams of N characters, from those of n-grams of SHORTEST: uint64 [T] -> [T - SHORTEST]."""
    return halves[:-SHORTEST] * _ODD + halves[SHORTEST:]
