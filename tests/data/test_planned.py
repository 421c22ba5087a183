"""Planned rows: the same as packing in memory, everything once, by index, from what is stored."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_shards import DOCUMENTS, conversation, items_of, shards_of, some_shards, write
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.choices import Content
from transllm_jax.config import Source
from transllm_jax.data.clean.cleaning import Rules
from transllm_jax.data.clean.near_duplicates import Deduplicated
from transllm_jax.data.read.shards import Shard
from transllm_jax.data.rows import planned as module
from transllm_jax.data.rows.batches import Batches
from transllm_jax.data.rows.examples import (
    Example,
    conversation_rows,
    document_examples,
    make_example,
    pair_texts,
    text_example,
)
from transllm_jax.data.rows.packing import FIELDS, PackedRows, pack
from transllm_jax.data.rows.planned import PlannedRows, Selection
from transllm_jax.data.rows.tokenise import tokenise
from transllm_jax.data.rows.transform import Transform
from transllm_jax.errors import Preempted, UserError
from transllm_jax.stages import token_rows as stage_sources
from transllm_jax.stages.bad_rows import BadRows
from transllm_jax.stages.token_rows import left_out, planned_rows
from transllm_jax.tokenizer.chain import MARKERS
from transllm_jax.tokenizer.tokenizer import Tokenizer

T = 48


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def planned(
    shards: list[Shard], tokenizer: Tokenizer, cache: Path, transform: Transform | None = None, **choice: Any
) -> PlannedRows:
    transform = transform or Transform("text", T)
    tokens = tokenise(shards, transform, tokenizer, "refuse", cache, processes=1)
    return PlannedRows(tokens, Selection(transform.length, **choice), cache)


def written(directory: Path, *files: list[object]) -> list[Shard]:
    for number, items in enumerate(files):
        write(directory / f"{number}.txt", items)
    return shards_of(directory / "*.txt")


def assert_equal_rows(found: PlannedRows, wanted: PackedRows) -> None:
    assert len(found) == len(wanted) > 1
    for number in range(len(wanted)):
        row = found.row(number)
        assert set(row) == set(FIELDS)
        for field in FIELDS:
            np.testing.assert_array_equal(row[field], getattr(wanted, field)[number])
            assert row[field].dtype == getattr(wanted, field).dtype
    assert found.token_count == wanted.token_count
    assert found.padded_fraction == pytest.approx(wanted.padded_fraction)
    assert found.row_length == wanted.row_length
    assert found.counts["trained"] == (wanted.weights > 0).sum()


def texts_of_rows(rows: PlannedRows, tokenizer: Tokenizer) -> Counter[str]:
    """The examples of all rows as text, and how often each is there."""
    found = Counter[str]()
    for number in range(len(rows)):
        row = rows.row(number)
        for segment in range(1, row["segment_ids"].max() + 1):
            found[tokenizer.decode(row["tokens"][row["segment_ids"] == segment])] += 1
    return found


@pytest.mark.parametrize("content", ["text", "pairs", "conversations"])
@pytest.mark.parametrize("window", [2, 256])
def test_rows_are_those_of_packing_in_memory(
    tmp_path: Path, tokenizer: Tokenizer, content: Content, window: int
) -> None:
    shards = some_shards(tmp_path / "data", content)
    length = 128 if content == "conversations" else T
    rows = planned(shards, tokenizer, tmp_path / "cache", Transform(content, length), window=window)
    items: list[Any] = items_of(shards)
    examples: list[Example]
    if content == "text":
        examples = document_examples(tokenizer, items, length)
        assert len(examples) > len(items) and rows.counts["split"] > 0
    elif content == "pairs":
        texts = [text for pair in items for text in pair_texts(*pair)]
        whole = [text_example(tokenizer, tokenizer.encode(text)) for text in texts]
        examples = [example for example in whole if len(example) <= length]
        # Counted by pairs; both directions of each are longer here.
        assert len(whole) - len(examples) == 2 * rows.counts["longer than a row"] > 0
    else:
        made = [conversation_rows(tokenizer, item, length) for item in items]
        examples = [make_example(row.ids, row.mask) for of_item, _ in made for row in of_item]
        assert [how for _, how in made].count("cut") == rows.counts["cut at a turn"] > 0
    assert rows.counts["items"] == len(items) and rows.counts["examples"] == len(examples)
    assert_equal_rows(rows, pack(examples, length, window=window))
    assert sum(rows.bytes(number) for number in range(len(rows))) == rows.counts["bytes"] > 0


def test_bytes_are_those_of_the_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = some_shards(tmp_path / "text")
    rows = planned(shards, tokenizer, tmp_path / "cache")
    assert rows.counts["bytes"] == sum(len(str(item).encode()) for item in items_of(shards))
    two = some_shards(tmp_path / "pairs", "pairs")
    pairs = planned(two, tokenizer, tmp_path / "cache", Transform("pairs", 500))
    assert pairs.counts["bytes"] == 2 * sum(len("".join(map(str, item)).encode()) for item in items_of(two))
    chats = some_shards(tmp_path / "chats", "conversations")
    answers = [m["content"] for n in range(12) for m in conversation(n) if m["role"] == "assistant"]
    found = planned(chats, tokenizer, tmp_path / "cache", Transform("conversations", 500))
    assert found.counts["bytes"] == sum(len(answer.encode()) for answer in answers)


def test_every_item_is_there_once_whatever_the_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    wanted = Counter(f"{text.strip()}<|endoftext|>" for text in DOCUMENTS)
    for files in (1, 7):
        shards = some_shards(tmp_path / str(files), files=files)
        rows = planned(shards, tokenizer, tmp_path / "cache", Transform("text", 400))
        found = texts_of_rows(rows, tokenizer)
        assert Counter({text.replace(" <|", "<|"): n for text, n in found.items()}) == wanted


def test_duplicates_over_shards_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = "the quick brown fox jumps over the lazy dog and sleeps under the old tree all afternoon "
    shards = written(
        tmp_path / "data", ["one", "two", long + "today"], ["three", " One ", long + "today!", "two"], ["four", "one"]
    )
    near = Transform("text", 200, near=True)
    ends = "<|endoftext|>"
    rows = planned(shards, tokenizer, tmp_path / "cache", near)
    assert rows.counts["exact duplicates"] == 3 and rows.counts["near duplicates"] == 0
    kept = {"one", "two", "three", "four", long + "today", long + "today!"}
    assert texts_of_rows(rows, tokenizer) == Counter(text + ends for text in kept)
    rows = planned(shards, tokenizer, tmp_path / "cache", near, near=0.8)
    assert rows.counts["exact duplicates"] == 3 and rows.counts["near duplicates"] == 1
    assert texts_of_rows(rows, tokenizer) == Counter(text + ends for text in kept - {long + "today!"})
    rows = planned(shards, tokenizer, tmp_path / "cache", near, exact=False)
    assert rows.counts["examples"] == 9 and "exact duplicates" not in rows.counts
    rows = planned(shards, tokenizer, tmp_path / "cache", near, exact=False, near=0.8)
    assert rows.counts["near duplicates"] == 4 and rows.counts["exact duplicates"] == 0


def test_what_was_left_out_is_nobodys_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """An item without an example must not take its duplicate with it."""
    shards = written(tmp_path / "data", ["x" + " " * 20 + "y"], ["x y"])
    rules = Rules(max_characters=10)
    rows = planned(shards, tokenizer, tmp_path / "cache", Transform("text", T, rules=rules, near=True), near=0.5)
    assert texts_of_rows(rows, tokenizer) == {"x y<|endoftext|>": 1} and rows.counts["too long"] == 1


def test_items_not_compared_are_counted(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "keep_first", lambda exact, *_: Deduplicated(np.ones(len(exact), bool), 0, 0, 3))
    assert planned(some_shards(tmp_path / "data"), tokenizer, tmp_path / "cache").counts["unchecked"] == 3


def test_a_budget_of_tokens_is_kept_to(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = some_shards(tmp_path / "data")
    everything = planned(shards, tokenizer, tmp_path / "cache")
    longest = max(Counter(np.concatenate([s.column("item") for s in everything.shards]).tolist()).values()) * T
    chosen = {}
    for budget in (300, 1000):
        for seed in (0, 1):
            rows = planned(shards, tokenizer, tmp_path / "cache", tokens=budget, seed=seed)
            assert budget - longest < rows.token_count <= budget < everything.token_count
            assert rows.token_count == sum((rows.row(n)["segment_ids"] > 0).sum() for n in range(len(rows)))
            left = everything.counts["items"] - rows.counts["over the budget"]
            assert 0 < left < everything.counts["items"]
            chosen[budget, seed] = texts_of_rows(rows, tokenizer)
            again = planned(shards, tokenizer, tmp_path / "anew", tokens=budget, seed=seed)
            assert texts_of_rows(again, tokenizer) == chosen[budget, seed]
    assert chosen[1000, 0] != chosen[1000, 1] and chosen[300, 0] != chosen[300, 1]
    assert chosen[300, 0] <= chosen[1000, 0]  # a larger budget adds to what there was
    assert planned(shards, tokenizer, tmp_path / "cache", tokens=10**9).token_count == everything.token_count
    assert len(planned(shards, tokenizer, tmp_path / "cache", tokens=1)) == 0


def test_an_item_is_within_the_budget_whole_or_not_at_all(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = written(tmp_path / "data", [f"{n} " + "the fox " * 60 for n in range(6)])
    one = planned(written(tmp_path / "one", ["0 " + "the fox " * 60]), tokenizer, tmp_path / "cache")
    pieces = one.counts["examples"]
    assert pieces > 2
    rows = planned(shards, tokenizer, tmp_path / "cache", tokens=one.token_count * 5 // 2)
    assert rows.counts["examples"] == 2 * pieces and rows.counts["over the budget"] == 4


def test_places_are_those_of_the_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = tmp_path / "data"
    shards = written(directory, ["aaa", "bbb\nbbb", "ccc"], ["ddd", "eee"])
    rows = planned(shards, tokenizer, tmp_path / "cache", Transform("text", 12), window=2)
    lines = {"aaa": "0.txt:1", "bbb\nbbb": "0.txt:3", "ccc": "0.txt:6", "ddd": "1.txt:1", "eee": "1.txt:3"}
    batches = Batches([("texts", rows, None)], 1, seed=0)
    seen = []
    for k in range(len(rows)):
        tokens = batches[k]["tokens"][batches[k]["segment_ids"] > 0]
        texts = [text for text in tokenizer.decode(tokens).split("<|endoftext|>") if text]
        end = [f"{directory}/{lines[text]}" for text in texts]
        assert batches.places(k) == [f"texts: {' '.join(end)}"]
        seen += texts
    assert sorted(seen) == sorted(lines) and len(rows) > 1


def test_a_stored_plan_is_taken_and_another_choice_has_its_own(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, cache = some_shards(tmp_path / "data"), tmp_path / "cache"
    first = planned(shards, tokenizer, cache)
    [path] = cache.glob("plan-*")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("planned again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "plan", refuse)
        again = planned(shards, tokenizer, cache)
    assert again.counts == first.counts and len(again) == len(first)
    for changes in ({"tokens": 500}, {"tokens": 500, "seed": 1}, {"exact": False}, {"window": 3}):
        planned(shards, tokenizer, cache, **changes)
    planned(shards[:2], tokenizer, cache)
    planned(shards, tokenizer, cache, Transform("text", T + 1))
    assert len(list(cache.glob("plan-*"))) == 7 and path.exists()


def test_a_damaged_plan_is_the_users_and_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards, cache = some_shards(tmp_path / "data"), tmp_path / "cache"
    rows = planned(shards, tokenizer, cache)
    [path] = cache.glob("plan-*")
    content = path.read_bytes()
    middle = content.index(b"members") + 200
    for broken in (content[:-30], b"", content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        path.write_bytes(broken)
        with pytest.raises(
            UserError, match=rf"{path.name} is damaged \(.+\): remove it and run again; it is made again"
        ):
            planned(shards, tokenizer, cache)
    path.unlink()
    assert planned(shards, tokenizer, cache).counts == rows.counts and path.read_bytes() == content


@pytest.mark.parametrize("near", [None, 0.8])
def test_a_source_of_which_nothing_is_left(tmp_path: Path, tokenizer: Tokenizer, near: float | None) -> None:
    transform = Transform("text", T, rules=Rules(min_characters=10_000), near=near is not None)
    rows = planned(some_shards(tmp_path / "data"), tokenizer, tmp_path / "cache", transform, near=near, tokens=100)
    assert len(rows) == 0 and rows.padded_fraction == 0 and rows.token_count == 0
    assert rows.counts["too short"] == rows.counts["items"] == len(DOCUMENTS)
    with pytest.raises(UserError, match="'a' gave no rows"):
        Batches([("a", rows, None)], 1, 0)


def test_rows_of_hosts_are_the_batch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = planned(some_shards(tmp_path / "text"), tokenizer, tmp_path / "cache")
    pairs = planned(some_shards(tmp_path / "pairs", "pairs"), tokenizer, tmp_path / "cache", Transform("pairs", T))
    batches = Batches([("text", text, 0.5), ("pairs", pairs, 0.5)], 8, seed=3)
    for k in (5, 0, 17):
        whole = batches[k]
        for hosts in (1, 2, 4, 8):
            parts = [batches.select_rows(k, places) for places in np.split(np.arange(8), hosts)]
            for name, values in whole.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
        assert batches.rows(k)[:, 0].tolist() == whole["sources"].tolist()
        assert sorted(whole["sources"].tolist()) == [0] * 4 + [1] * 4


def test_batches_over_a_cache_made_anew_are_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = some_shards(tmp_path / "data")
    one, two = (
        Batches([("a", planned(shards, tokenizer, tmp_path / name, tokens=900), None)], 2, seed=5)
        for name in ("one", "two")
    )
    for k in (9, 2, 0):
        for name, values in one[k].items():
            np.testing.assert_array_equal(values, two[k][name])
    assert (one[0]["tokens"] != one[1]["tokens"]).any()


class FakeRun:
    """What a stage's sources need of a run."""

    def __init__(self, tokenizer: Tokenizer, directory: Path) -> None:
        self.said, self.stopped, self.markers = list[str](), False, MARKERS
        self.config = SimpleNamespace(seed=1, token_cache=str(directory / "cache"))
        self.models = SimpleNamespace(tokenizer=lambda point: tokenizer)
        self.inputs = SimpleNamespace(shards=lambda source: shards_of(Path(source.path)), evaluation_texts=None)
        self.ledger = SimpleNamespace(spend=lambda what: nullcontext())
        bar = SimpleNamespace(update=lambda done, note: None)
        self.progress = SimpleNamespace(
            say=lambda text, **_: self.said.append(text), task=lambda *_, **__: nullcontext(bar)
        )
        self.interrupt = SimpleNamespace(check=self.check)
        self.bad_rows = BadRows(lambda place: place, directory, self.said.append)
        # Of one process, whose disk is its own.
        self.site = SimpleNamespace(mirrored=False, storage=None, shares=lambda directory: False)

    def check(self, where: str) -> None:
        if self.stopped:
            raise Preempted(where)


@pytest.fixture
def fake_run(tmp_path: Path, tokenizer: Tokenizer) -> Any:
    some_shards(tmp_path / "data")
    return FakeRun(tokenizer, tmp_path)


def test_a_stage_says_why_nothing_is_left(fake_run: Any, tmp_path: Path) -> None:
    source = Source(path=str(tmp_path / "data" / "*.txt"), cleaning={"min_characters": 9999, "contamination": False})
    message = (
        r"^pretrain: nothing of .*\*.txt is left to train on \(40 documents: 40 too short\): give it more text, or "
    )
    with pytest.raises(UserError, match=message):
        planned_rows(fake_run, "pretrain", source, T)
    short = Source(path=source.path, tokens=1, cleaning={"contamination": False})
    with pytest.raises(UserError, match=r"\(40 documents: 40 over the budget\)"):
        planned_rows(fake_run, "pretrain", short, T)


def test_a_stage_says_what_was_not_compared(fake_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(path=str(tmp_path / "data" / "*.txt"), cleaning={"contamination": False})
    assert left_out(planned_rows(fake_run, "pretrain", source, T)) == {} and fake_run.said == []
    monkeypatch.setattr(module, "keep_first", lambda exact, *_: Deduplicated(np.ones(len(exact), bool), 0, 0, 3))
    planned_rows(fake_run, "pretrain", source, T + 1)
    assert len(fake_run.said) == 1 and "pretrain: 3 items of" in fake_run.said[0]


def test_a_stage_stops_in_a_long_source_only(fake_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(path=str(tmp_path / "data" / "*.txt"), cleaning={"contamination": False})
    fake_run.stopped = True
    assert len(planned_rows(fake_run, "pretrain", source, T)) > 0
    monkeypatch.setattr(stage_sources, "LARGE", 10)
    with pytest.raises(Preempted, match="pretrain: tokenising"):
        planned_rows(fake_run, "pretrain", source, T + 1)
