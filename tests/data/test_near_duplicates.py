"""Near duplicates: estimates beside exact Jaccard indices, and which texts stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from transllm_jax.data.clean import near_duplicates
from transllm_jax.data.clean.near_duplicates import (
    SIZE,
    N,
    bands,
    exact_key,
    keep_first,
    ngram_hashes,
    signature,
    similarity,
)
from transllm_jax.errors import UserError

FIRST_THAI, LAST_THAI = 0x0E01, 0x0E2E


def random_thai(rng: np.random.Generator, length: int) -> str:
    return "".join(map(chr, rng.integers(FIRST_THAI, LAST_THAI + 1, length)))


def grams(text: str) -> set[str]:
    return {text[i : i + N] for i in range(len(text) - N + 1)}


def jaccard(a: str, b: str) -> float:
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def overlapping(rng: np.random.Generator, length: int, share: float) -> tuple[str, str]:
    """Two random texts with a common beginning, of a Jaccard index close to `share`."""
    common = round(2 * share / (1 + share) * (length - N + 1)) + N - 1 if share else 0
    start = random_thai(rng, common)
    return start + random_thai(rng, length - common), start + random_thai(rng, length - common)


def keys(texts: list[str]) -> np.ndarray:
    return np.array([exact_key(text) for text in texts], np.uint64)


def signatures(texts: list[str]) -> np.ndarray:
    return np.stack([signature(text) for text in texts])


# --- estimates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [40, 300, 3000])
@pytest.mark.parametrize("share", [0.95, 0.8, 0.5, 0.0])
def test_the_estimate_is_that_of_the_exact_jaccard_index(length: int, share: float) -> None:
    rng = np.random.default_rng(length)
    pairs = [overlapping(rng, length, share) for _ in range(60)]
    exact = np.array([jaccard(a, b) for a, b in pairs])
    assert abs(exact.mean() - share) < 0.03  # the texts are what the test says: one n-gram of 33 more or less
    errors = np.array([similarity(signature(a), signature(b)) for a, b in pairs]) - exact
    error = np.sqrt((exact * (1 - exact)).mean() / SIZE)
    # Unbiased, and no wider than SIZE independent hashes: 4 standard errors of the mean, and of the deviation.
    assert abs(errors.mean()) <= 4 * error / np.sqrt(len(pairs))
    assert errors.std() <= error * (1 + 4 / np.sqrt(2 * len(pairs)))


def test_texts_with_nothing_in_common_agree_nowhere() -> None:
    rng = np.random.default_rng(0)
    some = signatures([random_thai(rng, int(n)) for n in rng.integers(1, 400, 150)])
    alike = similarity(some[:, None], some[None, :])
    assert np.array_equal(alike, np.eye(len(some)))


def test_spaces_and_case_change_nothing_and_all_else_does() -> None:
    for change in (signature, exact_key):
        same = [change(text) for text in ("Straße ist lang", " STRASSE  ist\n\tlang ", "strasse\u00a0ist lang")]
        assert np.array_equal(same[0], same[1]) and np.array_equal(same[0], same[2])
        other = [change(text) for text in ("strasse istlang", "strasse ist lang.", "", "s")]
        assert not any(np.array_equal(same[0], one) for one in other)


@pytest.mark.parametrize("length", [0, 1, N - 1, N, N + 1])
def test_short_texts_are_like_themselves_only(length: int) -> None:
    text = "กขคงจฉชซฌญ"[:length]
    assert similarity(signature(text), signature(text)) == 1
    assert similarity(signature(text), signature(text + "ด")) <= 0.75  # N + 1 against N + 2 characters: 2 of 3 n-grams
    if length < N:
        assert similarity(signature(text), signature(text + "ด")) == 0


def test_a_text_that_repeats_itself_has_the_signature_of_its_distinct_ngrams() -> None:
    one_gram = "ก" * N
    assert np.array_equal(signature("ก" * 5000), signature(one_gram))
    assert similarity(signature("ก" * 5000), signature("ข" * 5000)) == 0
    assert (signature("ก" * 5000) != 0xFFFFFFFF).all()  # no bin stays empty


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    texts = [random_thai(rng, 1000), "abc" * 300, random_thai(rng, 12) * 50]
    whole = signatures(texts)
    for size in (3, 100, 993):
        monkeypatch.setattr(near_duplicates, "_CHUNK", size)
        assert np.array_equal(signatures(texts), whole)


def test_signatures_are_the_same_everywhere() -> None:
    """Stored signatures and keys are compared with those of later runs: these are what they must always be."""
    code = (
        "from transllm_jax.data.clean.near_duplicates import *\n"
        "s = signature('ที่บ้านมีน้ำ และมีปลา'); print(s.dtype, s.shape, *s[:3], exact_key('ที่บ้านมีน้ำ'))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert printed == {"uint32 (64,) 2716943543 2365538141 353185399 9225030459647757626\n"}


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 12, 24])
def test_an_ngrams_hash_depends_on_it_alone(n: int) -> None:
    codes = np.random.default_rng(n).integers(1, 4, 200).astype(np.uint32)
    hashes = ngram_hashes(codes, n)
    assert hashes.dtype == np.uint64 and len(hashes) == 200 - n + 1
    windows = [tuple(codes[i : i + n].tolist()) for i in range(len(hashes))]
    of_window = dict(zip(windows, hashes.tolist(), strict=True))
    assert hashes.tolist() == [of_window[window] for window in windows]
    assert len(set(of_window.values())) == len(of_window)
    assert len(ngram_hashes(codes[: n - 1], n)) == 0


# --- which stay -----------------------------------------------------------------------------------------------------


def test_the_first_of_exact_duplicates_stays() -> None:
    texts = ["b", "a", " A", "c", "a\n", "B", "a b"]
    for given in (None, signatures(texts)):
        kept = keep_first(keys(texts), given)
        assert kept.keep.tolist() == [True, True, False, True, False, False, True]
        assert (kept.exact, kept.near, kept.unchecked) == (3, 0, 0)


def test_near_duplicates_of_known_likeness() -> None:
    """At 0.8: all of 0.95 are found, none of 0.5 or 0 is; exact duplicates are not counted twice."""
    rng = np.random.default_rng(2)
    texts: list[str] = []
    for share in (0.95, 0.5, 0.0):
        for _ in range(100):
            texts += overlapping(rng, 600, share)
    texts += texts[:10]
    kept = keep_first(keys(texts), signatures(texts), 0.8)
    expected = [True, False] * 100 + [True, True] * 200 + [False] * 10
    assert kept.keep.tolist() == expected
    assert (kept.exact, kept.near, kept.unchecked) == (10, 100, 0)


def test_recall_at_the_threshold_is_that_of_the_estimate() -> None:
    """Of pairs whose estimate reaches the threshold, bands find at least 99 % (where they are as alike as that)."""
    rng = np.random.default_rng(3)
    pairs = 20_000
    first = rng.integers(0, 1 << 32, (pairs, SIZE), np.uint32)
    second = np.where(rng.random((pairs, SIZE)) < 0.8, first, rng.integers(0, 1 << 32, (pairs, SIZE), np.uint32))
    both = np.concatenate([first, second])
    kept = keep_first(np.arange(2 * pairs, dtype=np.uint64), both, 0.8)
    alike = similarity(first, second) >= 0.8
    assert kept.keep[:pairs].all()
    removed = ~kept.keep[pairs:]
    assert not (removed & ~alike).any()
    assert removed[alike].mean() >= 0.99


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
def test_whatever_is_removed_has_a_like_one_before_and_no_two_that_stay_are_alike(threshold: float) -> None:
    """Against all pairs, on signatures in clusters of every similarity."""
    rng = np.random.default_rng(4)
    centres = rng.integers(0, 1 << 32, (20, SIZE), np.uint32)
    some = centres[rng.integers(0, 20, 300)]
    some = np.where(rng.random((300, SIZE)) < rng.random((300, 1)), some, rng.integers(0, 1 << 32, some.shape))
    some[250:] = some[:50]  # equal signatures of different texts
    some = some.astype(np.uint32)
    kept = keep_first(np.arange(300, dtype=np.uint64), some, threshold)
    alike = similarity(some[:, None], some[None, :]) >= threshold
    count, width = bands(threshold)
    cut = (some[:, None] == some[None, :])[:, :, : count * width].reshape(300, 300, count, width)
    candidates = alike & cut.all(axis=3).any(axis=2)
    for j in range(300):
        if not kept.keep[j]:
            assert candidates[:j, j].any()
    staying = candidates[np.ix_(kept.keep, kept.keep)]
    assert np.array_equal(staying, np.eye(len(staying), dtype=bool))
    assert kept.near == 300 - kept.keep.sum() >= 50 and kept.exact == kept.unchecked == 0


def test_new_texts_at_the_end_change_nothing_before_them() -> None:
    rng = np.random.default_rng(5)
    texts = [text for _ in range(30) for text in overlapping(rng, 200, 0.9)]
    whole = keep_first(keys(texts), signatures(texts))
    part = keep_first(keys(texts[:41]), signatures(texts[:41]))
    assert whole.near > 10 and np.array_equal(whole.keep[:41], part.keep)


def test_a_common_frame_is_compared_with_so_many_leaders_and_the_rest_is_counted() -> None:
    rng = np.random.default_rng(6)
    some = rng.integers(0, 1 << 32, (100, SIZE), np.uint32)
    width = bands(0.8)[1]
    some[:, :width] = 7  # all share the first band and nothing else
    some[99] = some[98]
    exact = np.arange(100, dtype=np.uint64)
    some[99, width:] += np.arange(SIZE - width, dtype=np.uint32) % np.uint32(width) == 0  # alike, no other band agrees
    assert similarity(some[98], some[99]) >= 0.8
    found = keep_first(exact, some, 0.8)
    assert not found.keep[99] and found.keep[:99].all() and (found.near, found.unchecked) == (1, 0)
    # With 98 leaders, the last two are left and compared with each other by no band.
    left = keep_first(exact, some, 0.8, leaders=98)
    assert left.keep.all() and (left.near, left.unchecked) == (0, 2)
    assert keep_first(exact, some, 0.8, leaders=10).unchecked == 90
    assert keep_first(exact, some, 0.8, leaders=99).unchecked == 0


def test_signatures_may_be_a_memory_map_and_chunks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(7)
    texts = [text for _ in range(30) for text in overlapping(rng, 200, 0.9)]
    some = signatures(texts)
    expected = keep_first(keys(texts), some)
    mapped = np.memmap(tmp_path / "signatures", np.uint32, "w+", shape=some.shape)
    mapped[:] = some
    monkeypatch.setattr(near_duplicates, "_CHUNK", 7)
    found = keep_first(keys(texts), mapped)
    assert np.array_equal(found.keep, expected.keep) and found.near == expected.near > 10


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold: float) -> None:
    count, width = bands(threshold)
    assert count >= 1 and width >= 1 and count * width <= SIZE
    if threshold > 0.1:  # below, even single hashes agree seldom
        assert 1 - (1 - threshold**width) ** count >= 0.99


def test_no_texts() -> None:
    kept = keep_first(np.zeros(0, np.uint64), np.zeros((0, SIZE), np.uint32), 0.8)
    assert kept.keep.shape == (0,) and (kept.exact, kept.near, kept.unchecked) == (0, 0, 0)


@pytest.mark.parametrize("threshold", [0, -1, 1.01, float("nan")])
def test_a_threshold_that_is_none(threshold: float) -> None:
    with pytest.raises(UserError, match="threshold of near duplicates"):
        keep_first(np.zeros(1, np.uint64), None, threshold)


def test_signatures_of_other_texts_are_a_defect() -> None:
    with pytest.raises(ValueError, match="must be"):
        keep_first(np.zeros(3, np.uint64), np.zeros((2, SIZE), np.uint32), 0.8)
