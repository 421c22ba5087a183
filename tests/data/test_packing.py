"""Packing and batches: everything once and intact, nothing leaks, batch k depends on (seed, k) alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transllm_jax.data.rows.batches import Batch, Batches, Prefetcher, Proportions
from transllm_jax.data.rows.examples import Example, split_example
from transllm_jax.data.rows.packing import FIELDS, PackedRows, pack, plan
from transllm_jax.errors import UserError

LENGTH = 16


@st.composite
def example_lists(draw: st.DrawFn) -> list[Example]:
    """Examples of 1 to LENGTH tokens; every token id is unique, so that it can be found again."""
    lengths = draw(st.lists(st.integers(1, LENGTH), max_size=40))
    examples, following = [], 1
    for length in lengths:
        mask = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        ids = np.arange(following, following + length, dtype=np.int32)
        examples.append(Example(ids, np.array(mask, np.uint8)))
        following += length
    return examples


@settings(deadline=None)
@given(example_lists(), st.integers(1, 5))
def test_every_example_is_packed_once_and_intact(examples: list[Example], window: int) -> None:
    rows = pack(examples, LENGTH, window=window)
    found = []
    for row in range(len(rows)):
        segments = rows.segment_ids[row]
        count = segments.max()
        used = (segments > 0).sum()
        assert (segments[used:] == 0).all(), "padding stands at the end only"
        assert (np.diff(segments[:used]) >= 0).all() and set(segments[:used]) == set(range(1, count + 1))
        for segment in range(1, count + 1):
            at = np.flatnonzero(segments == segment)
            assert (rows.positions[row, at] == np.arange(len(at))).all()
            found.append(rows.tokens[row, at])
    assert sorted(map(tuple, found)) == sorted(tuple(e.ids) for e in examples)


@settings(deadline=None)
@given(example_lists(), st.integers(1, 5))
def test_labels_stay_inside_their_example_and_weights_follow_the_mask(examples: list[Example], window: int) -> None:
    rows = pack(examples, LENGTH, window=window)
    following = {int(a): int(b) for e in examples for a, b in zip(e.ids[:-1], e.ids[1:], strict=True)}
    trained = {int(i) for e in examples for i, m in zip(e.ids[1:], e.mask[1:], strict=True) if m}
    for token, segment, label, weight in zip(
        rows.tokens.ravel(), rows.segment_ids.ravel(), rows.labels.ravel(), rows.weights.ravel(), strict=True
    ):
        assert label == (following.get(int(token), 0) if segment else 0)
        assert weight == (1.0 if int(label) in trained else 0.0)
    assert (rows.weights > 0).sum() == len(trained)
    assert rows.token_count == sum(map(len, examples))
    assert rows.padded_fraction == pytest.approx(1 - rows.token_count / rows.tokens.size if rows.tokens.size else 0)


def reference_first_fit(lengths: list[int], row_length: int, window: int) -> list[list[int]]:
    """The definition, in plain Python."""
    rows: list[list[int]] = []
    opened: list[list[int]] = []  # [row, space], by age
    for index, length in enumerate(lengths):
        place = next((slot for slot in opened if slot[1] >= length), None)
        if place is None:
            if len(opened) == window:
                opened.remove(min(opened, key=lambda slot: slot[1]))
            place = [len(rows), row_length]
            opened.append(place)
            rows.append([])
        rows[place[0]].append(index)
        place[1] -= length
    return rows


@settings(deadline=None)
@given(st.lists(st.integers(1, LENGTH), max_size=80), st.integers(1, 6))
def test_plan_is_first_fit_within_the_window(lengths: list[int], window: int) -> None:
    assert plan(lengths, LENGTH, window=window) == reference_first_fit(lengths, LENGTH, window)


def test_plan_of_short_texts_wastes_little() -> None:
    lengths = np.random.default_rng(0).gamma(2.0, 30.0, 4000).astype(int).clip(4, 512)
    rows = plan(lengths, 512)
    assert 1 - lengths.sum() / (512 * len(rows)) < 0.02


def test_plan_and_pack_refuse_what_no_row_can_hold() -> None:
    with pytest.raises(ValueError, match="example 1 has 17 tokens"):
        plan([3, 17], LENGTH)
    with pytest.raises(ValueError, match="example 0 has 0 tokens"):
        plan([0], LENGTH)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(2, 20))
def test_split_makes_every_token_a_target_once(n: int, length: int) -> None:
    ids = np.arange(100, 100 + n, dtype=np.int32)
    mask = np.ones(n, np.uint8)
    mask[0] = 0
    pieces = split_example(Example(ids, mask), length)
    assert all(len(piece) <= length for piece in pieces)
    assert sum(int(piece.mask.sum()) for piece in pieces) == n - 1
    rows = pack(pieces, length)
    assert Counter(rows.labels[rows.weights > 0].tolist()) == Counter(ids[1:].tolist())
    # each label is predicted from the token before it
    assert (rows.labels - rows.tokens)[rows.weights > 0].tolist() == [1] * (n - 1)


def numbered(count: int, base: int = 0, length: int = 4) -> PackedRows:
    """Rows that can be told apart by their tokens: row r is all base + r."""
    tokens = np.broadcast_to(np.arange(base, base + count, dtype=np.int32)[:, None], (count, length)).copy()
    ones = np.ones((count, length), np.int32)
    return PackedRows(tokens, ones * np.arange(length, dtype=np.int32), ones, tokens + 1, ones.astype(np.float32))


def drawn(batches: Batches, steps: range) -> list[int]:
    return [int(t) for k in steps for t in batches[k]["tokens"][:, 0]]


def test_batches_are_a_pure_function_of_seed_and_number() -> None:
    def build() -> Batches:
        return Batches([("a", numbered(13), 0.7), ("b", numbered(5, 100), 0.3)], 4, seed=7)

    first, second = build(), build()
    in_order = [first[k] for k in range(40)]
    for k in np.random.default_rng(1).permutation(40):
        again = second[int(k)]
        assert set(again) == {*FIELDS, "sources"}
        np.testing.assert_array_equal(again["sources"], second.rows(int(k))[:, 0])
        assert again["sources"].dtype == np.int32
        for field in FIELDS:
            np.testing.assert_array_equal(again[field], in_order[k][field])
            assert again[field].shape == (4, 4)
            assert again[field].dtype == (np.float32 if field == "weights" else np.int32)


def test_batches_are_the_same_in_another_process() -> None:
    """Nothing depends on hash seeds or on what ran before."""
    code = (
        "import numpy as np; from transllm_jax.data.rows.packing import PackedRows; "
        "from transllm_jax.data.rows.batches import Batches; "
        "t = np.zeros((11, 2), np.int32); r = PackedRows(t, t, t, t, t.astype(np.float32)); "
        "b = Batches([('a', r, None), ('b', r, None)], 3, seed=5); "
        "print([b.rows(k).tolist() for k in (9, 2)])"
    )
    tokens = np.zeros((11, 2), np.int32)
    rows = PackedRows(tokens, tokens, tokens, tokens, tokens.astype(np.float32))
    here = Batches([("a", rows, None), ("b", rows, None)], 3, seed=5)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str([here.rows(k).tolist() for k in (9, 2)])


def test_one_source_gives_every_row_once_an_epoch_in_a_new_order() -> None:
    batches = Batches([("a", numbered(12), None)], 4, seed=3)
    assert batches.steps_per_epoch == 3
    epochs = [drawn(batches, range(3 * e, 3 * e + 3)) for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(12))
    assert batches.epoch(0) == {"a": 0.0} and batches.epoch(3) == {"a": 1.0}


def test_an_epoch_that_the_batch_does_not_divide_goes_on_in_the_next() -> None:
    batches = Batches([("a", numbered(10), None)], 4, seed=3)
    assert batches.steps_per_epoch == 3
    assert Counter(drawn(batches, range(5))) == Counter({row: 2 for row in range(10)})


def test_another_seed_gives_another_order() -> None:
    orders = [drawn(Batches([("a", numbered(40), None)], 4, seed=s), range(10)) for s in (0, 1, 2, 2**40)]
    assert len({tuple(order) for order in orders}) == 4


def test_equal_sources_are_not_shuffled_alike() -> None:
    batches = Batches([("a", numbered(30), None), ("b", numbered(30, 100), None)], 2, seed=0)
    rows = np.concatenate([batches.rows(k) for k in range(30)])
    assert rows[rows[:, 0] == 0, 1].tolist() != rows[rows[:, 0] == 1, 1].tolist()


def test_without_weights_every_row_of_every_source_is_seen_once_an_epoch() -> None:
    # 100 rows and 3: shares rounded to a hundredth of the smallest would miss some
    batches = Batches([("a", numbered(100), None), ("b", numbered(3, 1000), None)], 1, seed=0)
    assert batches.steps_per_epoch == 103
    assert sorted(drawn(batches, range(103))) == [*range(100), 1000, 1001, 1002]


def test_mixture_has_its_proportions_and_small_sources_repeat() -> None:
    batches = Batches([("a", numbered(500), 0.6), ("b", numbered(7, 1000), 0.3), ("c", numbered(2, 2000), 0.1)], 10, 0)
    assert batches.shares == pytest.approx({"a": 0.6, "b": 0.3, "c": 0.1})
    values = drawn(batches, range(10))
    counts = Counter(value // 1000 for value in values)
    assert counts == {0: 60, 1: 30, 2: 10}
    # well mixed: no batch is far from the shares
    for k in range(10):
        sources = Counter(batches.rows(k)[:, 0].tolist())
        assert abs(sources[0] - 6) <= 1 and abs(sources[1] - 3) <= 1
    assert batches.epoch(10) == pytest.approx({"a": 60 / 500, "b": 30 / 7, "c": 5.0})
    assert set(Counter(v for v in values if v >= 2000).values()) == {5}
    assert batches.steps_per_epoch == 84  # 500 rows at 6 a batch


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 500))
def test_proportions_count_what_they_give(parts: list[int], n: int) -> None:
    proportions = Proportions(parts)
    given_so_far = Counter(proportions[i][0] for i in range(n))
    assert proportions.counts(n) == tuple(given_so_far[i] for i in range(len(parts)))
    source, place = proportions[n]
    assert place == given_so_far[source]
    period = sum(proportions.parts)
    assert proportions.counts(period) == proportions.parts


def test_batches_refuse_bad_mixtures() -> None:
    empty = pack([], 4)
    with pytest.raises(UserError, match="'a' gave no rows"):
        Batches([("a", empty, None)], 2, 0)
    with pytest.raises(UserError, match="'b' has weight 0"):
        Batches([("a", numbered(2), 1.0), ("b", numbered(2), 0)], 2, 0)
    with pytest.raises(UserError, match="'b' has weight nan"):
        Batches([("a", numbered(2), 1.0), ("b", numbered(2), float("nan"))], 2, 0)
    with pytest.raises(UserError, match="'b' has no weight"):
        Batches([("a", numbered(2), 1.0), ("b", numbered(2), None)], 2, 0)
    with pytest.raises(UserError, match="one name"):
        Batches([("a", numbered(2), None), ("a", numbered(2), None)], 2, 0)
    with pytest.raises(UserError, match="batch size 0"):
        Batches([("a", numbered(2), None)], 0, 0)
    with pytest.raises(ValueError, match="row length"):
        Batches([("a", numbered(2), None), ("b", numbered(2, length=5), None)], 2, 0)


def test_a_short_batch_of_rows_is_filled_with_padding() -> None:
    rows = numbered(5)
    whole, short = rows.batch(0, 3), rows.batch(3, 3)
    for field in FIELDS:
        values = getattr(rows, field)
        np.testing.assert_array_equal(whole[field], values[:3])
        np.testing.assert_array_equal(short[field][:2], values[3:])
        assert short[field].shape == whole[field].shape and not short[field][2:].any()


@pytest.mark.parametrize("parts", [1, 2])
def test_rows_of_hosts_are_the_batch(parts: int) -> None:
    """Where a batch is computed in two parts, a host has rows of both."""
    batches = Batches([("a", numbered(13), 0.7), ("b", numbered(5, 100), 0.3)], 8, seed=7)
    for k in (0, 6):
        for hosts in (1, 2, 4):
            places = np.arange(8).reshape(parts, hosts, -1).swapaxes(0, 1).reshape(hosts, -1)
            found = [batches.select_rows(k, own) for own in places]
            assert {len(rows["tokens"]) for rows in found} == {8 // hosts}
            for name, values in batches[k].items():
                for rows, own in zip(found, places, strict=True):
                    assert rows[name].dtype == values.dtype
                    np.testing.assert_array_equal(rows[name], values[own])


def test_rows_that_a_host_has_not_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches([("a", numbered(13), 0.7), ("b", numbered(5, 100), 0.3)], 8, seed=7)
    read: list[int] = []
    row = PackedRows.row

    def reading(self: PackedRows, number: int) -> dict[str, np.ndarray]:
        read.append(number)
        return row(self, number)

    monkeypatch.setattr(PackedRows, "row", reading)
    batches.select_rows(3, np.array([1, 6]))
    assert read == batches.rows(3)[[1, 6], 1].tolist()


def test_places_name_the_source_and_its_row() -> None:
    batches = Batches([("a", numbered(5), None), ("b", numbered(3, 100), None)], 4, seed=1)
    for k in range(4):
        tokens = batches[k]["tokens"][:, 0].tolist()
        assert batches.places(k) == [f"a: row {t + 1}" if t < 100 else f"b: row {t - 99}" for t in tokens]


def made(k: int) -> Batch:
    return {"tokens": np.full(1, k)}


def test_the_prefetcher_gives_each_batch_and_makes_the_next_ones() -> None:
    begun: list[int] = []
    third = threading.Event()

    def make(k: int) -> Batch:
        begun.append(k)
        if k == 5:
            third.set()
        return made(k)

    ahead = Prefetcher(make, 8, depth=2)
    assert ahead[3]["tokens"] == 3  # a run that goes on begins anywhere
    assert third.wait(10), "batches 4 and 5 are made while nobody asks"
    assert [int(ahead[k]["tokens"][0]) for k in range(4, 8)] == [4, 5, 6, 7]
    ahead.close()
    assert begun == [3, 4, 5, 6, 7], "each once, in order, and none behind the last"


def test_the_prefetcher_raises_an_error_with_the_batch_that_it_is_of() -> None:
    def make(k: int) -> Batch:
        if k == 2:
            raise UserError("damaged")
        return made(k)

    ahead = Prefetcher(make, 9)
    assert ahead[0]["tokens"] == 0 and ahead[1]["tokens"] == 1
    with pytest.raises(UserError, match="damaged"):
        ahead[2]
    assert ahead[3]["tokens"] == 3
    ahead.close()


def test_the_prefetcher_closes_without_making_what_nobody_asked_for() -> None:
    begun: list[int] = []
    asked, go = threading.Event(), threading.Event()

    def make(k: int) -> Batch:
        begun.append(k)
        if k == 1:
            asked.set()
            assert go.wait(10)
        return made(k)

    ahead = Prefetcher(make, 100, depth=5)
    ahead[0]
    assert asked.wait(10)
    threading.Timer(0.1, go.set).start()
    ahead.close()
    assert begun == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
