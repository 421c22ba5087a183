"""Kills, damage and full disks in short; `make test-full` runs the long forms, in tests/reliability."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import EXAMPLES
from reliability.damage import (
    check_damaged_cache,
    check_damaged_checkpoints,
    check_other_arrays,
    put,
    restored,
    save,
    state_of,
)
from reliability.harness import UNTIL, Whole, copied, goes_on, run, undisturbed, where

from transllm_jax.data.read.shards import Reading, shards
from transllm_jax.data.rows.batches import Batches
from transllm_jax.data.rows.planned import PlannedRows, Selection
from transllm_jax.data.rows.tokenise import tokenise
from transllm_jax.data.rows.transform import Transform
from transllm_jax.disk import sha256_of
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An undisturbed run."""
    return undisturbed(tmp_path_factory.mktemp("whole"), tiny_model)


@pytest.mark.full
def test_killed_in_packing_in_a_save_and_in_a_step_it_ends_as_one_that_was_not(whole: Whole, tmp_path: Path) -> None:
    harms = [
        {"kind": "plan", "number": 1, "do": "kill"},
        {"kind": "save", "number": 21, "do": "kill"},
        {"kind": "batch", "number": 4, "do": "kill", "after": 0.002},
    ]
    workdir = copied(whole.prepared, tmp_path / "run")
    ended = [run(whole.config, workdir, *UNTIL, harm=harm) for harm in harms]
    assert [process.code for process in ended] == [-9, -9, -9]
    places = [where(process) for process in ended]
    assert places[0] == "packing" and places[1] == "save", places
    goes_on(whole, workdir, *ended)


@pytest.mark.full
def test_the_disk_fills_up_in_a_save(whole: Whole, tmp_path: Path) -> None:
    workdir = copied(whole.prepared, tmp_path / "run")
    ended = run(whole.config, workdir, *UNTIL, harm={"kind": "save", "number": 40, "do": "full"})
    assert ended.code == 2
    assert ended.line() == (
        f"error: the disk is full at {workdir}/pretrain/checkpoints; free some space and run the same command again"
    )
    goes_on(whole, workdir, ended)


@pytest.mark.full
def test_a_damaged_checkpoint_is_put_aside_and_the_run_ends_as_one_without(whole: Whole, tmp_path: Path) -> None:
    workdir = copied(whole.prepared, tmp_path / "run")
    ended = run(whole.config, workdir, *UNTIL, harm={"kind": "batch", "number": 10, "do": "term"})
    assert ended.code == 75
    newest = workdir / "pretrain/checkpoints/10"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    changed = bytearray(largest.read_bytes())
    changed[len(changed) // 2] ^= 4
    put(largest, bytes(changed))
    again = goes_on(whole, workdir, ended)
    assert f"warning: {newest} is damaged (" in again.out and "it was put aside, step 8 is used" in again.out
    assert not again.errors, again.errors
    assert again.batches[0][1] == 8


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    # Orbax tells at length of each file that it cannot read.
    caplog.set_level(logging.CRITICAL)


# What tensorstore tells of a read that orbax gave up.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_damage_of_a_checkpoint_is_trained_on(tmp_path: Path) -> None:
    check_damaged_checkpoints(tmp_path, places=3)


def test_an_array_that_is_not_the_one_saved_is_named(tmp_path: Path) -> None:
    names = check_other_arrays(tmp_path)
    assert len(set(names)) == len(names) == len(jax.tree.leaves(state_of(4)))


def test_all_checkpoints_damaged_is_for_the_user_to_mend(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 2, 4)
    for step in (2, 4):
        for path in (tmp_path / "checkpoints" / str(step) / "state").rglob("*"):
            if path.is_file():
                put(path, path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError) as refused:
        restored(tmp_path / "checkpoints")
    line = str(refused.value)
    assert all(f"checkpoints/{step} is damaged (" in line for step in (2, 4)) and "--force" in line and "\n" not in line
    # They stay: the next run must not begin anew as if there had never been one.
    with pytest.raises(UserError, match="no other is left"):
        restored(tmp_path / "checkpoints")


def test_a_checkpoint_of_another_rank_is_refused_and_stays(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 2, 4)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"checkpoints/4: not a checkpoint of this configuration \(trainable/layers\.q"):
        restored(tmp_path / "checkpoints", rank=5)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    state, said = restored(tmp_path / "checkpoints")
    assert state is not None and int(state.step) == 4 and not said


# The token cache, and batches on any number of hosts


@pytest.fixture
def rows(tiny_model: Path, tmp_path: Path) -> Callable[[], PlannedRows]:
    """Opens the rows of a text anew, over the cache in tmp_path/tokens."""
    text = tmp_path / "text.txt"
    text.write_text((EXAMPLES / "text.train.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    tokenizer = Tokenizer.load(tiny_model)
    transform = Transform(content="text", length=64)

    def make() -> PlannedRows:
        found = shards(Reading(path=str(text)), sha256_of)
        tokens = tokenise(found, transform, tokenizer, "refuse", tmp_path / "tokens")
        return PlannedRows(tokens, Selection(row_length=64), tmp_path / "tokens")

    return make


def test_no_damage_of_the_token_cache_is_trained_on(rows: Callable[[], PlannedRows], tmp_path: Path) -> None:
    check_damaged_cache(rows, tmp_path / "tokens", 12, print)


def test_hosts_share_the_batches_of_one_and_read_each_example_once(rows: Callable[[], PlannedRows]) -> None:
    size = 8
    one = Batches([("text", rows(), None)], size, seed=3)
    steps = one.steps_per_epoch
    # Over size epochs, the batches divide the rows.
    wanted = [one[k] for k in range(steps)]
    for hosts in (1, 2, 4, 8):
        for host in range(hosts):
            # Each host opens its own, and again where it was killed: twice.
            for first, last in ((0, steps // 3), (steps // 3, steps // 2), (steps // 2, steps)):
                mine = Batches([("text", rows(), None)], size, seed=3)
                for k in range(first, last):
                    place = np.split(np.arange(size), hosts)[host]
                    part = mine.select_rows(k, place)
                    assert part.keys() == wanted[k].keys()
                    for field, values in part.items():
                        assert values.tobytes() == wanted[k][field][place].tobytes(), (hosts, host, k, field)
    # An epoch is the data set: each row once, and in the rows each example once.
    total = len(rows())
    order = [int(row) for k in range(steps) for _, row in one.rows(k)][:total]
    assert sorted(order) == list(range(total))
    seen = Counter(place for row in order for place in rows().places(row))
    assert sum(seen.values()) == rows().counts["examples"]
    tokens = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in wanted])
    assert len(tokens) >= rows().token_count
