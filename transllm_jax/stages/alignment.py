"""Which English tokens the new tokens stand for, learned from parallel text by a statistical word aligner.

A hidden Markov model (Vogel et al., HMM-based word alignment in statistical translation, COLING 1996) in the library
sil-thot reads pairs as the tokenizers cut them and aligns each token of the target side with one English token.
Counting these is trans-tokenization (Remy et al., COLM 2024, arXiv 2408.04303), here of tokens and not of words: the
order of a name's pieces is that of its English pieces in most languages, and the model's jumps follow it, which IBM
model 1 does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.tokenizer import Tokenizer

# Rounds of expectation maximisation. More change little: SmolLM2 with 5,700 pairs.
ROUNDS = 5
# Pairs beyond these say little more of tokens that occur often, and cost 0.2 ms each (measured on 5,700 short ones).
MAX_PAIRS = 200_000


@dataclass(frozen=True)
class Alignment:
    """What the pairs say of n new tokens.

    meanings: for each, how often it is aligned with which base token; empty if the pairs do not hold it.
    inside: float64 [n], the share of its occurrences that go on with a word, because the token before them is aligned
    with the same English word.
    """

    meanings: list[Counter[int]]
    inside: np.ndarray


def align(pairs: Sequence[tuple[str, str]], expanded: Tokenizer, base: Tokenizer, first: int, number: int) -> Alignment:
    """Align (English, target) pairs, of which the first `MAX_PAIRS` are read.

    expanded: the tokenizer of the target side, whose new tokens have the ids first .. first + number - 1. base: that of
    the English side. Raises UserError if sil-thot is not installed, or if the pairs hold no new token.
    """
    try:
        from thot.alignment import HmmAlignmentModel
    except ImportError:
        raise UserError(
            "vocabulary.initial_rows: aligned needs a word aligner: pip install 'transllm-jax[align]'"
        ) from None
    read = pairs[:MAX_PAIRS]
    # A space before the first word: within sentences, which is most of the text, words have one.
    english = base.encode_batch([f" {pair[0].strip()}" for pair in read])
    target = expanded.encode_batch([pair[1].strip() for pair in read])
    model = HmmAlignmentModel()
    for sides in zip(english, target, strict=True):
        model.add_sentence_pair(*map(_as_words, sides))
    model.start_training()
    for _ in range(ROUNDS):
        model.train()
    model.end_training()

    @cache
    def begins(token: int) -> bool:
        return not base.decode([token])[:1].isalnum()

    meanings: list[Counter[int]] = [Counter() for _ in range(number)]
    seen, inside = np.zeros(number), np.zeros(number)
    for one, other in zip(english, target, strict=True):
        _, matrix = model.get_best_alignment(_as_words(one), _as_words(other))
        places: list[int | None] = [None] * len(other)
        for place, token in zip(*np.nonzero(matrix.to_numpy()), strict=True):
            places[int(token)] = int(place)
        words = np.cumsum([begins(token) for token in one])
        before: int | None = None
        for token, to in zip(other, places, strict=True):
            word = None if to is None else int(words[to])
            if token >= first:
                seen[token - first] += 1
                if to is not None:
                    meanings[token - first][one[to]] += 1
                    inside[token - first] += word == before
            before = word
    if not any(meanings):
        raise UserError("vocabulary.initial_rows: aligned: the pairs hold no new token; give pairs in this language")
    return Alignment(meanings, inside / np.maximum(seen, 1))


def _as_words(ids: Sequence[int]) -> list[str]:
    return [str(token) for token in ids]
