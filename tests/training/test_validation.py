"""Validation: the best checkpoint is kept, and a stage stops when it no longer improves."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_training import STEPS, Dying, run, some_state, tree_bytes

from transllm_jax.errors import Preempted
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.training.checkpoint import Checkpoints
from transllm_jax.training.record.metrics import read_rows, read_validations
from transllm_jax.training.validation import Watch

# XLA gives this warning if a frozen array is donated with the state.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")


def watch_of(scores: list[float], every: int = 1, patience: int | None = None, of: str = "") -> tuple[Watch, list[int]]:
    """A watch that measures these scores one after the other, and a list with an entry for each."""
    made: list[int] = []

    def measure(trainable: Any) -> float:
        made.append(len(made))
        return scores[len(made) - 1]

    return Watch(measure, every, patience, of), made


def test_the_best_checkpoint_is_kept_and_is_the_result(tmp_path: Path) -> None:
    watch, made = watch_of([3.0, 1.0, 2.0], every=2)
    outcome = run(tmp_path / "a", watch=watch, checkpoint_every=100, keep=1)
    assert (outcome.best, outcome.steps, len(made)) == (4, STEPS, 3)
    with closing(Checkpoints(tmp_path / "a" / "checkpoints", keep=1)) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best(), checkpoints.latest()) == ([4, 6], 4, 6)
        best = checkpoints.read(4, some_state(0))
    assert tree_bytes(outcome.trainable) == tree_bytes(best.trainable)
    assert read_rows(tmp_path / "a" / "validation.jsonl") == [
        {"step": step, "bits_per_byte": score} for step, score in ((2, 3.0), (4, 1.0), (6, 2.0))
    ]
    # Of equal ones the last is the best, because it has seen more.
    watch, _ = watch_of([1.0, 2.0, 1.0], every=2)
    assert run(tmp_path / "b", watch=watch, checkpoint_every=100, keep=1).best == 6


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    watch, _ = watch_of([math.nan, 2.0, math.inf], every=2)
    assert run(tmp_path / "a", watch=watch).best == 4
    rows = read_rows(tmp_path / "a" / "validation.jsonl")
    assert [row["bits_per_byte"] for row in rows] == [None, 2.0, None]
    assert run(tmp_path / "a", watch=watch).best == 4
    watch, made = watch_of([math.nan] * 6, patience=2)
    outcome = run(tmp_path / "b", watch=watch)
    assert (outcome.best, outcome.steps, len(made)) == (None, 3, 3)


def test_a_stage_stops_when_it_gets_no_better(tmp_path: Path) -> None:
    scores = [3.0, 2.0, 2.5, 2.1, 0.0]
    watch, made = watch_of(scores, patience=2)
    outcome = run(tmp_path / "a", watch=watch)
    assert (outcome.steps, outcome.best, len(made)) == (4, 2, 4)
    # A run that is started again after it stopped does not go on; one killed before comes to the same end.
    watch, made = watch_of([])
    again = run(tmp_path / "a", watch=replace(watch, patience=2))
    assert (again.steps, again.best, made) == (4, 2, [])
    assert tree_bytes(again.trainable) == tree_bytes(outcome.trainable)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", Dying(set()), watch=watch_of(scores, patience=2)[0])
    run(tmp_path / "b", watch=watch_of(scores[3:], patience=2)[0])
    assert (tmp_path / "b" / "validation.jsonl").read_bytes() == (tmp_path / "a" / "validation.jsonl").read_bytes()


def test_validations_of_other_rows_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(scores: list[float], of: str) -> None:
        interrupt = Interrupt()
        interrupt.requested = True
        with pytest.raises(Preempted):
            run(tmp_path / "a", watch=watch_of(scores, of=of)[0], interrupt=interrupt)

    # A run in parts: with other rows every score is higher, also the best one.
    stopped([1.0], "few")
    stopped([1.5], "few")
    stopped([3.0], "many")
    watch, made = watch_of([2.5, 2.8, 2.9], of="many", patience=3)
    outcome = run(tmp_path / "a", watch=watch)
    assert (outcome.best, outcome.steps, len(made)) == (4, STEPS, 3)
    rows = read_validations(tmp_path / "a" / "validation.jsonl")
    assert [row["step"] for row in rows] == [3, 4, 5, 6] and {row["of"] for row in rows} == {"many"}
    assert len(read_rows(tmp_path / "a" / "validation.jsonl")) == 6
    # Nothing was measured on these rows yet, and scores on other rows do not count.
    assert run(tmp_path / "a", watch=watch_of([], of="third")[0]).best is None
