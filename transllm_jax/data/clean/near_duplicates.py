"""Exact and near duplicates: MinHash signatures of texts, and which texts to keep (Broder 1997).

The similarity of two texts is the Jaccard index of their sets of character n-grams (N characters, as Thai has no spaces
between words). A signature holds SIZE hashes, and the share of places in which two signatures agree estimates the
similarity. Its standard error is at most sqrt(J (1 - J) / SIZE): 0.03 at J = 0.95, 0.05 at 0.8, 0.06 at 0.5. So a
threshold is soft. A threshold of 0.8 finds all pairs of similarity 0.95 or more, 99 % of those of 0.9, half of those of
0.8, 3 % of those of 0.7, and next to none (0.04 %) of those of 0.6 or less.

Signatures are computed as in "Fast Similarity Sketching" (Dahlgaard, Knudsen and Thorup 2017): every n-gram goes into
one of SIZE bins, each bin keeps its smallest hash, and rounds with new hashes follow until no bin is empty. A long text
needs one round, so one hash per n-gram instead of SIZE. A short text needs many rounds, and is then as exact as with
SIZE independent hashes, which one-permutation hashing with borrowed bins is not.

Why no library: datasketch keeps a Python object and a dictionary entry per text and band. Here signatures are one
array, stored with the tokens, and ten million texts are compared band by band by sorting.

Texts are expected in NFC. Signatures are the same on every machine and in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from transllm_jax.errors import UserError

SIZE = 64  # hashes in a signature; a power of two
N = 8  # characters in an n-gram: about two Thai words; unrelated texts then share less than 1 %
_BIN_BITS = SIZE.bit_length() - 1
_CHUNK = 1 << 16  # characters, or texts, at a time: keeps the work in the cache and memory bounded
_ENOUGH = SIZE * 8  # n-grams x rounds that most likely fill all bins
_RECALL = 0.99  # share of the pairs at the threshold that agree in some band
_BASE = 0x9E3779B97F4A7C15  # of the polynomial; odd
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of SplitMix64
_SEEDS = np.arange(2 * SIZE, dtype=np.uint64) * np.uint64(_BASE)  # one per round
_ROUNDS = np.arange(SIZE, dtype=np.uint64) << np.uint64(64 - 2 * _BIN_BITS)  # a round's place in a key
_EDGES = np.arange(SIZE, dtype=np.uint64) << np.uint64(64 - _BIN_BITS)  # a bin's place in a key, and its least key
_BIN_MASK = _EDGES[-1]
_LOW_MASK = ~_BIN_MASK
_FULL = np.uint64(0xFFFFFFFFFFFFFFFF)  # above every key


@dataclass(frozen=True, eq=False)
class Deduplicated:
    """keep: bool [n], the texts that stay. exact, near: numbers of texts removed as exact and as near duplicates.

    unchecked: number of texts that were not compared with all their candidates, because too many dissimilar texts share
    a band with them (see `keep_first`); they are kept.
    """

    keep: np.ndarray
    exact: int
    near: int
    unchecked: int


def normalised(text: str) -> str:
    """The text case-folded, with each run of white space as one space and none at the ends."""
    return " ".join(text.split()).casefold()


def exact_key(text: str) -> int:
    """A 64-bit hash (0 to 2**64 - 1) of the normalised text: the same for texts that differ only in spaces and case."""
    digest = hashlib.blake2b(normalised(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def code_points(text: str) -> np.ndarray:
    """The characters as code points, uint32 [T]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def ngram_hashes(codes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all n-grams: code points [T] -> uint64 [T - n + 1], empty if T < n.

    A hash depends only on the n-gram: it is a polynomial of its code points modulo 2**64, times a constant, so that
    its upper bits depend on all characters. (The lower bits do not: see `mixed`.)
    """
    return _polynomials(codes.astype(np.uint64) + np.uint64(1), n) * _MIX[0]


def _polynomials(codes: np.ndarray, n: int) -> np.ndarray:
    """sum(codes[i + j] * _BASE ** (n - 1 - j)) for every i, by doubling the width: log2(n) passes."""
    if len(codes) < n:
        return np.empty(0, np.uint64)
    if n == 1:
        return codes
    half = _polynomials(codes, n // 2)
    left = n // 2
    whole = half[:-left] * np.uint64(pow(_BASE, left, 1 << 64)) + half[left:]
    return whole if n % 2 == 0 else whole[:-1] * np.uint64(_BASE) + codes[n - 1 :]


def mixed(hashes: np.ndarray) -> np.ndarray:
    """A bijection of uint64, any shape: every bit of the result depends on every bit (the end of SplitMix64)."""
    first, second = _MIX
    hashes = (hashes ^ (hashes >> np.uint64(30))) * first
    hashes = (hashes ^ (hashes >> np.uint64(27))) * second
    return hashes ^ (hashes >> np.uint64(31))


def signature(text: str) -> np.ndarray:
    """The MinHash signature of the normalised text: uint32 [SIZE].

    A text of fewer than N characters is one n-gram, so only an equal text is similar to it.
    """
    codes = code_points(normalised(text))
    if len(codes) < N:
        codes = np.concatenate([codes, np.zeros(N - len(codes), codes.dtype)])
    start, stop = 0, _rounds(len(codes) - N + 1)
    slots = np.full(SIZE, _FULL)
    for hashes in _hash_chunks(codes):
        np.minimum(slots, _smallest(hashes, start, stop), out=slots)
    if not (slots == _FULL).any():
        return slots.astype(np.uint32)
    # A bin is empty by bad luck, or because the text repeats itself.
    distinct = np.unique(np.concatenate([np.unique(hashes) for hashes in _hash_chunks(codes)]))
    while (slots == _FULL).any() and stop < SIZE:
        start, stop = stop, min(SIZE, stop + _rounds(len(distinct)))
        np.minimum(slots, _smallest(distinct, start, stop), out=slots)
    empty = slots == _FULL
    if empty.any():  # few n-grams: each empty bin takes the smallest hash of all n-grams, with a seed of its own
        slots[empty] = mixed(distinct + _SEEDS[SIZE:][empty][:, None]).min(axis=1)
    # The upper bits of the smallest hash in a bin vary little; the lower ones distinguish n-grams.
    return slots.astype(np.uint32)


def _rounds(grams: int) -> int:
    """How many rounds most likely leave no bin empty. Additional rounds change nothing."""
    return min(SIZE, -(-_ENOUGH // grams))


def _hash_chunks(codes: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(codes) - N + 1, _CHUNK):
        yield ngram_hashes(codes[start : start + _CHUNK + N - 1], N)


def _smallest(hashes: np.ndarray, start: int, stop: int) -> np.ndarray:
    """hashes [n] -> uint64 [SIZE]: the smallest key of each bin in rounds start .. stop; _FULL for an empty bin.

    From its upper bits on a key is the bin, the round and 52 bits of hash. So the smallest key of a bin is the first of
    that bin in sorted order, and keys of an earlier round come first.
    """
    keys = hashes + _SEEDS[start:stop, None]
    keys ^= keys >> np.uint64(32)
    keys *= _MIX[0]
    keys ^= keys >> np.uint64(29)
    keys *= _MIX[1]
    rounds = _ROUNDS[start:stop, None]
    keys = ((keys & _BIN_MASK) | rounds | ((keys & _LOW_MASK) >> np.uint64(_BIN_BITS))).ravel()
    keys.sort()
    first = np.searchsorted(keys, _EDGES)
    least = keys[np.minimum(first, len(keys) - 1)]
    return np.where((least & _BIN_MASK) == _EDGES, least, _FULL)


def bands(threshold: float) -> tuple[int, int]:
    """How a signature is cut to look up candidates: (number of bands, hashes per band).

    As many hashes per band as possible, for few false candidates, provided that a pair whose similarity is the
    threshold agrees in a whole band with a probability of at least 99 %.
    """
    width = 1
    for wider in range(2, SIZE + 1):
        if 1 - (1 - threshold**wider) ** (SIZE // wider) >= _RECALL:
            width = wider
    return SIZE // width, width


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The estimated Jaccard index of signatures [..., SIZE]: float64 [...], multiples of 1 / SIZE."""
    return np.asarray((a == b).mean(axis=-1))


def keep_first(
    exact: np.ndarray, signatures: np.ndarray | None, threshold: float = 0.8, *, leaders: int = 1000
) -> Deduplicated:
    """Which texts to keep: the first of those with the same exact key, then the first of those that are similar.

    exact: uint64 [n], of `exact_key`. signatures: uint32 [n, SIZE] (may be a memory map), or None for exact duplicates
    only. threshold: texts of at least this estimated similarity are near duplicates. Raises UserError unless it is
    above 0 and at most 1.

    Every removed text is a duplicate of an earlier one (which may itself be removed for a still earlier one). No two
    kept texts that agree in a whole band are near duplicates (a pair at the threshold agrees in one with 99 %). The
    result depends only on the arrays. Texts that share a band are compared with the first of them, the dissimilar ones
    with the first of the rest, and so on, at most `leaders` times: boilerplate shared by a million dissimilar texts
    would need a comparison of every pair. Time: a sort of n keys per band. Memory beyond the arrays: about 60 bytes per
    text.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"the threshold of near duplicates is {threshold}: it must be above 0 and at most 1")
    order = np.argsort(exact, kind="stable")
    keep = np.ones(len(exact), bool)
    keep[order[1:][exact[order[1:]] == exact[order[:-1]]]] = False
    removed = len(exact) - int(keep.sum())
    del order
    if signatures is None:
        return Deduplicated(keep, removed, 0, 0)
    if signatures.shape != (len(exact), SIZE):
        raise ValueError(f"signatures {signatures.shape} of {len(exact)} texts must be [{len(exact)}, {SIZE}]")
    unchecked = np.zeros(len(exact), bool)
    count, width = bands(threshold)
    for band in range(count):
        _remove_alike(signatures, band * width, width, keep, unchecked, threshold, leaders)
    near = len(exact) - removed - int(keep.sum())
    return Deduplicated(keep, removed, near, int((unchecked & keep).sum()))


def _remove_alike(
    signatures: np.ndarray,
    column: int,
    width: int,
    keep: np.ndarray,
    unchecked: np.ndarray,
    threshold: float,
    leaders: int,
) -> None:
    """Clear `keep` of each text that is similar to an earlier one with the same values in the band's columns."""
    texts = np.flatnonzero(keep)
    keys = np.zeros(len(texts), np.uint64)
    for start in range(0, len(texts), _CHUNK):
        part = signatures[texts[start : start + _CHUNK], column : column + width].astype(np.uint64)
        for place in range(width):
            keys[start : start + _CHUNK] = mixed(keys[start : start + _CHUNK] * np.uint64(_BASE) + part[:, place])
    order = np.argsort(keys, kind="stable")
    texts, keys = texts[order], keys[order]
    for _ in range(leaders):
        # Texts of one key are adjacent, in ascending order: the first of each group leads; a group of one is done.
        starts = np.ones(len(keys), bool)
        starts[1:] = keys[1:] != keys[:-1]
        first = np.flatnonzero(starts)
        leader = np.repeat(texts[first], np.diff(first, append=len(texts)))
        texts, keys, leader = texts[~starts], keys[~starts], leader[~starts]
        if not len(texts):
            return
        alike = np.empty(len(texts), bool)
        for start in range(0, len(texts), _CHUNK):
            some = slice(start, start + _CHUNK)
            alike[some] = similarity(signatures[leader[some]], signatures[texts[some]]) >= threshold
        keep[texts[alike]] = False
        texts, keys = texts[~alike], keys[~alike]
    # The remaining texts of a group were not compared with one another; a group of one needs no comparison.
    alone = np.ones(len(keys), bool)
    alone[1:] &= keys[1:] != keys[:-1]
    alone[:-1] &= keys[1:] != keys[:-1]
    unchecked[texts[~alone]] = True
