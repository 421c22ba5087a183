"""BPE training over symbols: each unit of a text becomes one private-use character, and `tokenizers` trains on those.

So merges begin and end between units, whether a unit is a character or a piece of the base.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.encoded import Encoded, Ids, Merge, Progress

BARRIER = -1  # a unit that no merge may contain
_FIRST, _LAST = 0x10000, 0x10FFFF  # no white space among them
_LONGEST = 24  # units in a token: longer ones are boilerplate of the corpus, not words
_CHUNK = 100_000  # units that are passed to the library at a time


def train_merges(
    runs: Encoded,
    weights: Ids,
    symbols: Sequence[str],
    numbers: Ids,
    size: int,
    min_count: int,
    on_progress: Progress | None = None,
) -> list[Merge]:
    """Merges, as pairs of texts in rank order, of at most `size` distinct tokens, each frequent enough when learned.

    runs: texts as numbers of units. weights: int64 [texts], how often each text occurs. numbers: int64 [units], the
    index in `symbols` of each unit's text, or BARRIER. The most frequent pair comes first; among equally frequent ones,
    that with the earlier symbols.
    """
    if len(symbols) > _LAST - _FIRST:
        raise UserError(f"the corpus has {len(symbols)} different characters or pieces: raise min_count, or clean it")
    characters = np.where(numbers == BARRIER, ord(" "), numbers + _FIRST).astype("<u4")
    alphabet = [chr(_FIRST + i) for i in range(len(symbols))]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + size,
        min_frequency=min_count,
        initial_alphabet=alphabet,
        max_token_length=_LONGEST,
        show_progress=False,
    )
    backend.train_from_iterator(_lines(runs, weights, characters, on_progress), trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return [(_read(left, symbols), _read(right, symbols)) for left, right in merges]


def _read(written: str, symbols: Sequence[str]) -> str:
    return "".join(symbols[ord(c) - _FIRST] for c in written)


def _lines(runs: Encoded, weights: Ids, characters: np.ndarray, on_progress: Progress | None = None) -> Iterator[str]:
    """Every run as often as its weight says, separated by spaces, many in one string.

    A run of weight 5 = 4 + 1 is in a string that is yielded four times and in one that is yielded once.
    """
    lengths, done, total = runs.lengths, 0, int(weights.sum())
    for bit in range(int(np.max(weights, initial=0)).bit_length()):
        chosen = np.flatnonzero(weights >> bit & 1)
        ends = np.cumsum(lengths[chosen] + 1)
        first = 0
        while first < len(chosen):
            before = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + _CHUNK)))
            text = _text(runs, chosen[first:last], characters)
            for _ in range(1 << bit):
                yield text
            done += (last - first) << bit
            first = last
            if on_progress is not None:
                on_progress(done / total)


def _text(runs: Encoded, chosen: Ids, characters: np.ndarray) -> str:
    lengths = runs.lengths[chosen]
    before = np.cumsum(lengths) - lengths
    places = np.repeat(runs.starts[:-1][chosen] - before, lengths) + np.arange(lengths.sum())
    units = np.insert(characters[runs.ids[places]], before + lengths, ord(" "))
    return units.tobytes().decode("utf-32-le")
