"""Many short texts as ids in one flat array, and counts of each id as the merges change.

The encoding of a text depends on a merge only if the merge applies in it. So after a change of merges only those texts
are encoded again that contain a token made by a removed merge, or two neighbours that a new merge joins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import tokenizers

from transllm_jax.errors import UserError

Ids = npt.NDArray[np.int64]
Merge = tuple[str, str]
Progress = Callable[[float], None]

_CHUNK = 20_000  # texts that are encoded at a time
WORD_END = "\ud800"  # between two words of a run: a surrogate, which no text that can be encoded has


@dataclass(frozen=True)
class Encoded:
    """ids: int32 [n], the ids of all texts, concatenated. starts: int64 [texts + 1], where each text's ids begin."""

    ids: npt.NDArray[np.int32]
    starts: Ids

    @property
    def lengths(self) -> Ids:
        """Ids in each text, int64 [texts]."""
        return np.diff(self.starts)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The texts of all parts, concatenated."""
    lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
    return Encoded(np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)]), np.cumsum(lengths))


def batches(
    backend: tokenizers.Tokenizer, texts: Sequence[str], on_progress: Progress | None = None
) -> Iterable[Encoded]:
    """The texts as ids, in batches of some thousands."""
    for first in range(0, len(texts), _CHUNK):
        encodings = backend.encode_batch_fast(list(texts[first : first + _CHUNK]), add_special_tokens=False)
        starts = np.cumsum(np.fromiter(chain([0], map(len, encodings)), np.int64, len(encodings) + 1))
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32, int(starts[-1]))
        yield Encoded(ids, starts)
        if on_progress is not None:
            on_progress(min(1.0, (first + _CHUNK) / len(texts)))


def _in_order(counted: Counter[str]) -> tuple[list[str], Ids]:
    texts = sorted(counted)
    return texts, np.array([counted[text] for text in texts], np.int64)


def encode(backend: tokenizers.Tokenizer, texts: Sequence[str], on_progress: Progress | None = None) -> Encoded:
    """All texts as ids."""
    return joined(list(batches(backend, texts, on_progress)))


def whole_runs(runs: Counter[str]) -> tuple[list[str], Ids]:
    """The distinct runs in order, without WORD_END, and how often each occurs: int64 [runs]."""
    if any(WORD_END in run for run in runs):
        whole: Counter[str] = Counter()
        for run, times in runs.items():
            whole[run.replace(WORD_END, "")] += times
        runs = whole
    return _in_order(runs)


def encode_within_words(
    backend: tokenizers.Tokenizer,
    runs: Counter[str],
    characters: Callable[[], Ids],
    regroup: Callable[[Encoded], Encoded] = lambda encoded: encoded,
    on_progress: Progress | None = None,
) -> tuple[Encoded, Ids]:
    """Whole runs as units, then split at every WORD_END; and how often each part occurs: int64 [parts].

    regroup: ids -> units. characters: how many characters begin in each unit, int64 [units].
    """
    texts, weights = _in_order(runs)
    parts: list[Encoded] = []
    repeats: list[Ids] = [np.zeros(0, np.int64)]
    first = 0
    for batch in batches(backend, [text.replace(WORD_END, "") for text in texts], on_progress):
        units, some = regroup(batch), texts[first : first + len(batch.lengths)]
        repeated = np.ones(len(some), np.int64)
        if any(WORD_END in text for text in some):
            units, repeated = _split(units, some, characters()[units.ids])
        parts.append(units)
        repeats.append(repeated)
        first += len(some)
    return joined(parts), np.repeat(weights, np.concatenate(repeats))


def _split(encoded: Encoded, runs: Sequence[str], characters: Ids) -> tuple[Encoded, Ids]:
    """The runs split at every WORD_END, without units that cross one; and how many parts each run has: int64 [runs].

    runs: at least one has a WORD_END. encoded: the same runs without. characters: how many characters begin in each of
    its units, int64 [n]. Raises UserError if units are missing.
    """
    points = np.frombuffer("".join(runs).encode("utf-32-le", "surrogatepass"), "<u4")
    marks = np.flatnonzero(points == ord(WORD_END))
    ends = marks - np.arange(len(marks))  # in characters from the beginning of the first run, as are these:
    stop = np.cumsum(characters)
    start = stop - characters
    if stop[-1] != len(points) - len(marks):
        raise UserError(
            "the base has no tokens for some characters of the corpus, so that its words cannot be told apart: remove "
            "control and private-use characters, or learn tokens across words"
        )
    done = np.searchsorted(ends, start, side="right")  # ends up to where a unit begins
    crosses = np.searchsorted(ends, stop, side="left") > done
    begins = (done > 0) & (ends[done - 1] == start)
    begins[1:] |= crosses[:-1]
    starts = np.union1d(encoded.starts, np.flatnonzero(begins))
    kept = np.concatenate([[0], np.cumsum(~crosses)])
    return Encoded(encoded.ids[~crosses], kept[starts]), np.diff(np.searchsorted(starts, encoded.starts))


def count(backend: tokenizers.Tokenizer, texts: Sequence[str], weights: Ids, size: int) -> Ids:
    """How often each id below `size` occurs in weighted texts: int64 [size]."""
    found = np.zeros(size, np.int64)
    first = 0
    for part in batches(backend, texts):
        some = weights[first : first + len(part.lengths)]
        found += counts(part, some, size)
        first += len(part.lengths)
    return found


def counts(encoded: Encoded, weights: Ids, size: int) -> Ids:
    """How often each id below `size` occurs in weighted texts: int64 [size]."""
    repeated = np.repeat(weights, encoded.lengths)
    # Sums of whole numbers in float64 are exact below 2 ** 53.
    return np.bincount(encoded.ids, weights=repeated, minlength=size).astype(np.int64)


class Recount:
    """The counts of ids in weighted texts under merges that change a little from call to call."""

    def __init__(self, texts: Sequence[str], weights: Ids, ids: dict[str, int], *, ignore_merges: bool) -> None:
        """`ids`: every token that any merges may produce. `ignore_merges`: as in tokenizer.json: a text that is a
        token is never cut."""
        self._texts, self._weights, self._ids = texts, weights, ids
        self._size = max(ids.values()) + 1
        self._places = {text: place for place, text in enumerate(texts)} if ignore_merges else None
        self._encoded: Encoded | None = None
        self._merges: list[Merge] = []

    def count(
        self,
        backend: tokenizers.Tokenizer,
        merges: list[Merge],
        spell: Callable[[str], str] = str,
        on_progress: Progress | None = None,
    ) -> Ids:
        """The counts with the merges of `backend`, int64 [size].

        `merges`: those that may differ from the last call's; new ones apply after all others. `spell` returns the text
        of a token.
        """
        if self._encoded is None:
            self._encoded = encode(backend, self._texts, on_progress)
        else:
            touched = np.flatnonzero(self._touched(self._encoded, merges, spell))
            again = encode(backend, [self._texts[i] for i in touched.tolist()])
            self._encoded = _replaced(self._encoded, touched, again)
        self._merges = merges
        return counts(self._encoded, self._weights, self._size)

    def _touched(self, encoded: Encoded, merges: list[Merge], spell: Callable[[str], str]) -> npt.NDArray[np.bool_]:
        """Which texts the change of merges may affect, bool [texts]."""
        removed, new = set(self._merges).difference(merges), set(merges).difference(self._merges)
        made = {left + right for left, right in removed}
        size = 0
        while size != len(made):  # and all tokens made of these
            size = len(made)
            made |= {left + right for left, right in self._merges if left in made or right in made}
        is_made = np.zeros(self._size, bool)
        is_made[[self._ids[token] for token in made]] = True
        hit = is_made[encoded.ids]
        left, right = np.zeros(self._size, bool), np.zeros(self._size, bool)
        pairs = {(self._ids[one], self._ids[other]) for one, other in new}
        left[[one for one, _ in pairs]] = True
        right[[other for _, other in pairs]] = True
        candidates = np.flatnonzero(left[encoded.ids[:-1]] & right[encoded.ids[1:]])
        found = encoded.ids[candidates].astype(np.int64) * self._size + encoded.ids[candidates + 1]
        wanted = np.array(sorted(one * self._size + other for one, other in pairs), np.int64)
        hit[candidates[np.isin(found, wanted)]] = True  # a pair across two texts only costs a needless encoding
        touched = np.zeros(len(self._texts), bool)
        touched[np.searchsorted(encoded.starts, np.flatnonzero(hit), side="right") - 1] = True
        if self._places is not None:
            for token in {one + other for one, other in new}:
                if (place := self._places.get(spell(token))) is not None:
                    touched[place] = True
        return touched


def _replaced(encoded: Encoded, places: Ids, by: Encoded) -> Encoded:
    """The texts, with those at `places` (ascending) replaced by the texts of `by`."""
    lengths = encoded.lengths
    replaced = np.zeros(len(lengths), bool)
    replaced[places] = True
    old = np.repeat(replaced, lengths)
    lengths[places] = by.lengths
    new = np.repeat(replaced, lengths)
    ids = np.empty(len(new), np.int32)
    ids[~new] = encoded.ids[~old]
    ids[new] = by.ids
    return Encoded(ids, np.concatenate([[0], np.cumsum(lengths)]))
