"""Which English tokens the new tokens stand for, learned from parallel text by a statistical word aligner.

A hidden Markov model (Vogel et al., HMM-based word alignment in statistical translation, COLING 1996) in the library
sil-thot reads pairs as the tokenizers cut them and aligns each token of the target side with one English token.
Counting these is trans-tokenization (Remy et al., COLM 2024, arXiv 2408.04303), here of tokens and not of words: the
order of a name's pieces is that of its English pieces in most languages, and the model's jumps follow it, which IBM
model 1 does not. sil-thot is imported only here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.tokenizer import Tokenizer

# Rounds of expectation maximisation. More change little: SmolLM2 with 5,700 pairs.
ROUNDS = 5
# A pair of I English and J target tokens takes time proportional to I * I * J. Of a larger corpus, pairs are taken
# evenly up to these sums. Measured on one core of a busy AMD EPYC: 100,000 pairs of 8 tokens take 40 s and 220 MB,
# 20,000 of 25 take 68 s and 280 MB. So MAX_COST is about five minutes.
MAX_PAIRS, MAX_COST = 200_000, 1_500_000_000
# Longer pairs are documents: they cost much, and their sentences may be in another order.
LONGEST = 100
# Pairs that are encoded or aligned at once.
PAIRS = 1000


@dataclass(frozen=True)
class Alignment:
    """What the pairs say of n new tokens.

    meanings: for each, how often it is aligned with which base token; empty if the pairs do not hold it.
    inside: float64 [n], the share of its occurrences that go on with a word, because the token before them is aligned
    with the same English word.
    """

    meanings: list[Counter[int]]
    inside: np.ndarray


def check_aligner() -> None:
    """Raises UserError if sil-thot is not installed."""
    _aligner()


def align(
    pairs: Sequence[tuple[str, str]],
    expanded: Tokenizer,
    base: Tokenizer,
    first: int,
    number: int,
    on_round: Callable[[int], None] | None = None,
) -> Alignment:
    """Align (English, target) pairs. Pairs of more than `LONGEST` tokens are left out.

    expanded: the tokenizer of the target side, whose new tokens have the ids first .. first + number - 1. base: that of
    the English side. on_round: called with the number of rounds that are done; the last of `ROUNDS` + 1 is the
    alignment itself. Raises UserError if sil-thot is not installed, or if the pairs hold no new token.
    """
    model, tell = _aligner()(), on_round or (lambda _: None)
    sides = _affordable(_encoded(_evenly(pairs, MAX_PAIRS / max(len(pairs), 1)), expanded, base))
    for one, other in sides:
        model.add_sentence_pair(_as_words(one), _as_words(other))
    model.start_training()
    for done in range(ROUNDS):
        model.train()
        tell(done + 1)
    model.end_training()

    word_begins = cache(lambda token: _begins_word(base, token))
    meanings: list[Counter[int]] = [Counter() for _ in range(number)]
    seen, inside = np.zeros(number), np.zeros(number)
    for one, other, places in _aligned(model, sides):
        words = np.cumsum([word_begins(token) for token in one])
        before: int | None = None
        for token, to in zip(other, places, strict=True):
            word = None if to is None else int(words[to])
            if token >= first:
                seen[token - first] += 1
                if to is not None:
                    meanings[token - first][one[to]] += 1
                    inside[token - first] += word == before
            before = word
    tell(ROUNDS + 1)
    if not any(meanings):
        raise UserError(
            f"vocabulary.initial_rows: aligned: the pairs of at most {LONGEST} tokens hold no new token; add sentences "
            "in this language with their translation, or a dictionary"
        )
    return Alignment(meanings, inside / np.maximum(seen, 1))


def _aligner() -> Any:
    """The class of the word aligner. Raises UserError if sil-thot is not installed."""
    try:
        from thot.alignment import HmmAlignmentModel
    except ImportError as error:
        raise UserError(
            "vocabulary.initial_rows: aligned needs a word aligner; pip install 'transllm-jax[align]'"
        ) from error
    return HmmAlignmentModel


T = TypeVar("T")
# The tokens of a pair: English, target.
_Sides = tuple[list[int], list[int]]


def _encoded(pairs: Sequence[tuple[str, str]], expanded: Tokenizer, base: Tokenizer) -> list[_Sides]:
    """The tokens of the pairs that are not too long."""
    # A space before the first word: within sentences, which is most of the text, words have one. SentencePiece puts it.
    space = " " if base.encode("a") == base.encode("a", continuing=True) else ""
    sides: list[_Sides] = []
    for start in range(0, len(pairs), PAIRS):
        some = pairs[start : start + PAIRS]
        english = base.encode_batch([space + pair[0].strip() for pair in some])
        target = expanded.encode_batch([pair[1].strip() for pair in some])
        both = zip(english, target, strict=True)
        sides += [pair for pair in both if all(0 < len(side) <= LONGEST for side in pair)]
    return sides


def _affordable(sides: list[_Sides]) -> list[_Sides]:
    return _evenly(sides, MAX_COST / max(sum(len(one) ** 2 * len(other) for one, other in sides), 1))


def _evenly(items: Sequence[T], share: float) -> list[T]:
    """This share of the items, evenly taken; all if it is 1 or more."""
    if share >= 1:
        return list(items)
    return [item for number, item in enumerate(items) if int((number + 1) * share) > int(number * share)]


def _aligned(model: Any, sides: Sequence[_Sides]) -> Iterator[tuple[list[int], list[int], list[int | None]]]:
    """The pairs, with the place of the English token with which each target token is aligned."""
    for one, other in sides:
        _, matrix = model.get_best_alignment(_as_words(one), _as_words(other))
        places: list[int | None] = [None] * len(other)
        for place, token in zip(*np.nonzero(matrix.to_numpy()), strict=True):
            places[int(token)] = int(place)
        yield one, other, places


def _begins_word(base: Tokenizer, token: int) -> bool:
    """Whether a base token does not go on with the word before it. A decoder strips SentencePiece's first space."""
    return str(base.token(token)).startswith("▁") or not base.decode([token])[:1].isalnum()


def _as_words(ids: Sequence[int]) -> list[str]:
    return [str(token) for token in ids]
