"""Training: a step, the loop, and a stopped run ends as an undisturbed one."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import (
    LENGTH,
    OPTIMIZER,
    STEPS,
    VOCAB,
    Broken,
    Dying,
    Source,
    adapted_split,
    batch_of,
    latest,
    leaves,
    mean_loss,
    restored,
    run,
    tree_bytes,
)

from transllm_jax.errors import Diverged, Preempted, UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.model.parameters import BASE_ROWS
from transllm_jax.training.loop import Outcome
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from transllm_jax.training.record.ledger import LEDGER, summarise
from transllm_jax.training.record.metrics import read_rows
from transllm_jax.training.step import initial_state, make_step

# XLA gives this warning if a frozen array is donated with the state.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")


def stepping(structure: Any, config: OptimizerConfig = OPTIMIZER, *, seed: int = 11, dropout: bool = False) -> Any:
    return make_step(structure, make_optimizer(config), schedule(config), seed=seed, dropout=dropout, remat="none")


@pytest.fixture(scope="module")
def step() -> Any:
    return stepping(adapted_split().structure)


def device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {field: jnp.asarray(values) for field, values in batch.items()}


def test_a_step_changes_all_that_trains_and_nothing_frozen(step: Any) -> None:
    split = adapted_split()
    before, frozen = tree_bytes(split.trainable), tree_bytes(split.frozen)
    batch = device(batch_of(0))
    wanted = mean_loss(split.trainable, batch)

    state, metrics = step(initial_state(split.trainable, make_optimizer(OPTIMIZER)), split.frozen, batch)
    after = tree_bytes(state.trainable)
    assert after.keys() == before.keys() and all(after[path] != before[path] for path in before)
    # The frozen arrays were not donated, and are unchanged.
    assert tree_bytes(split.frozen) == frozen
    assert int(state.step) == 1
    assert metrics.tokens == 2 * (LENGTH - 1)
    assert math.isclose(metrics.loss, wanted, rel_tol=1e-5)
    assert 0 < metrics.gradient_norm < 100


def test_a_step_moves_trained_base_rows() -> None:
    # Untied, so that the embedding shows which rows were read: in the output every row takes part.
    split = adapted_split(train_base=True, tied=False)
    frozen, before = tree_bytes(split.frozen), {path: np.array(split.trainable[path]) for path in BASE_ROWS}
    optimizer = make_optimizer(replace(OPTIMIZER, weight_decay=0.0))
    step = stepping(split.structure, replace(OPTIMIZER, weight_decay=0.0))
    batch = batch_of(0)
    state, _ = step(initial_state(split.trainable, optimizer), split.frozen, device(batch))
    read, written = (np.abs(np.asarray(state.trainable[path]) - before[path]).max(axis=1) for path in BASE_ROWS)
    seen = np.isin(np.arange(VOCAB), batch["tokens"][:, :-1])
    assert seen.sum() >= 4 and (read[~seen] == 0).all()
    # Adam's first step is the rate: half of the peak, times 2 for vocabulary rows.
    assert np.allclose(read[seen], OPTIMIZER.learning_rate, rtol=1e-2)
    assert np.allclose(written, OPTIMIZER.learning_rate, rtol=1e-2)
    assert tree_bytes(split.frozen) == frozen


def test_the_loss_is_the_mean_over_weighted_tokens(step: Any) -> None:
    """A batch with all weights doubled has the same mean: the same loss, gradient norm and next arrays."""
    outcomes = []
    for factor in (1, 2):
        split = adapted_split()
        batch = batch_of(0)
        batch["weights"] = factor * batch["weights"]
        outcomes.append(step(initial_state(split.trainable, make_optimizer(OPTIMIZER)), split.frozen, device(batch)))
    (one, metrics), (other, of_other) = outcomes
    assert np.allclose(metrics.loss, of_other.loss, rtol=1e-6)
    assert np.allclose(metrics.gradient_norm, of_other.gradient_norm, rtol=1e-4)
    for path, values in one.trainable.items():
        assert np.allclose(values, other.trainable[path], atol=1e-5), path


def test_a_batch_without_a_trained_token_is_harmless(step: Any) -> None:
    split = adapted_split()
    batch = batch_of(0)
    batch["weights"] = np.zeros_like(batch["weights"])
    state, metrics = step(initial_state(split.trainable, make_optimizer(OPTIMIZER)), split.frozen, device(batch))
    assert metrics.loss == 0 and metrics.gradient_norm == 0
    assert all(np.isfinite(values).all() for values in state.trainable.values())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """A run of all steps, and its directory."""
    directory = tmp_path_factory.mktemp("loop") / "pretrain"
    return run(directory), directory


def test_a_run_logs_every_step_and_learns(undisturbed: tuple[Outcome, Path]) -> None:
    outcome, directory = undisturbed
    rows = read_rows(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    seen = [device(batch_of(k)) for k in range(STEPS)]
    before, after = (
        np.mean([mean_loss(trainable, batch) for batch in seen])
        for trainable in (adapted_split().trainable, outcome.trainable)
    )
    assert after < before - 0.2
    rate = schedule(OPTIMIZER)
    for row in rows:
        assert math.isclose(row["learning_rate"], rate(row["step"] - 1), rel_tol=1e-6)
        assert row["gradient_norm"] > 0 and row["trained_tokens"] == 2 * (LENGTH - 1)
    assert outcome.steps == STEPS and outcome.last_loss == rows[-1]["loss"] and outcome.tokens_per_second > 0
    assert latest(directory) == STEPS


def test_dropout_depends_on_seed_and_step(step: Any, undisturbed: tuple[Outcome, Path]) -> None:
    optimizer = make_optimizer(OPTIMIZER)
    dropping, other_seed = (stepping(adapted_split().structure, seed=seed, dropout=True) for seed in (11, 12))

    def arguments(number: int) -> tuple[Any, ...]:
        """Batch 0 and the arrays that a run starts from, at a step of the given number."""
        split = adapted_split()
        state = initial_state(split.trainable, optimizer)._replace(step=jnp.int32(number))
        return state, split.frozen, device(batch_of(0))

    first = read_rows(undisturbed[1] / "metrics.jsonl")[0]["loss"]
    losses = [float(made(*arguments(number))[1].loss) for made, number in ((dropping, 0), (dropping, 1), (step, 0))]
    assert losses[0] == first
    assert len(set(losses)) == 3 and max(losses) - min(losses) < 1
    assert str(jax.make_jaxpr(dropping)(*arguments(0))) != str(jax.make_jaxpr(other_seed)(*arguments(0)))


def require_same(outcome: Outcome, directory: Path, undisturbed: tuple[Outcome, Path]) -> None:
    """The same bytes of trained arrays and of the last checkpoint, and the same rows in metrics.jsonl."""
    wanted, other = undisturbed
    assert tree_bytes(outcome.trainable) == tree_bytes(wanted.trainable)
    assert (directory / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert tree_bytes(restored(directory)) == tree_bytes(restored(other))


def test_a_run_that_was_stopped_ends_as_an_undisturbed_one(tmp_path: Path, undisturbed: tuple[Outcome, Path]) -> None:
    interrupt = Interrupt()
    directory = tmp_path / "pretrain"

    def ask(k: int) -> None:
        interrupt.requested = k == 2

    with pytest.raises(Preempted, match="stopped at step 3 of 6"):
        run(directory, Source(ask), checkpoint_every=100, interrupt=interrupt)
    assert latest(directory) == 3
    assert [row["step"] for row in read_rows(directory / "metrics.jsonl")] == [1, 2, 3]

    asked_for: list[int] = []
    outcome = run(directory, Source(asked_for.append))
    assert asked_for == [3, 4, 5], "each remaining batch once"
    require_same(outcome, directory, undisturbed)


def test_a_run_that_was_killed_ends_as_an_undisturbed_one(tmp_path: Path, undisturbed: tuple[Outcome, Path]) -> None:
    directory = tmp_path / "pretrain"

    def die(k: int) -> None:
        if k == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(directory, Source(die), checkpoint_every=3)
    # Step 4 is logged but not saved. A kill may also come in the middle of a line.
    metrics = directory / "metrics.jsonl"
    assert [row["step"] for row in read_rows(metrics)] == [1, 2, 3, 4]
    assert latest(directory) == 3
    with metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')

    asked_for: list[int] = []
    outcome = run(directory, Source(asked_for.append))
    assert asked_for == [3, 4, 5]
    require_same(outcome, directory, undisturbed)


def test_a_request_to_stop_at_the_last_step_changes_nothing(tmp_path: Path, undisturbed: tuple[Outcome, Path]) -> None:
    interrupt = Interrupt()

    def ask(k: int) -> None:
        interrupt.requested = k == STEPS - 1

    require_same(run(tmp_path / "a", Source(ask), interrupt=interrupt), tmp_path / "a", undisturbed)


def test_an_update_that_is_not_finite_is_skipped_and_recorded(tmp_path: Path) -> None:
    directory = tmp_path / "pretrain"
    outcome = run(directory, Broken({1, 3}), max_skipped=2)
    assert (outcome.steps, outcome.skipped) == (STEPS, 2)
    rows = read_rows(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if row["loss"] is None] == [2, 4]
    skipped = read_rows(directory / "skipped.jsonl")
    assert [row["step"] for row in skipped] == [2, 4]
    assert skipped[1]["rows"] == ["text.txt:6", "text.txt:7"] and skipped[0]["loss"] in ("inf", "nan")
    state = restored(directory)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (STEPS, 2, 0)
    # A run that is stopped between the two ends with the same bytes.
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "again", Dying({1, 3}), max_skipped=2)
    run(tmp_path / "again", Broken({1, 3}), max_skipped=2)
    assert tree_bytes(restored(tmp_path / "again")) == tree_bytes(state)
    for name in ("metrics.jsonl", "skipped.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_too_many_skipped_updates_in_a_row_end_the_run(tmp_path: Path) -> None:
    directory = tmp_path / "pretrain"
    said = r"pretrain: .* not finite in 2 steps in a row, up to step 5; .* lower pretrain\.learning_rate"
    with pytest.raises(Diverged, match=said):
        run(directory, Broken({1, 3, 4}), checkpoint_every=3, max_skipped=2)
    assert latest(directory) == 3
    assert all(np.isfinite(leaf).all() for _, leaf in leaves(restored(directory)))
    # Updates that were skipped before a stop count after it.
    with pytest.raises(Preempted):
        interrupt = Interrupt()
        interrupt.requested = True
        run(tmp_path / "stopped", Broken({0, 1}), max_skipped=2, interrupt=interrupt)
    with pytest.raises(Diverged, match="in 2 steps in a row, up to step 2"):
        run(tmp_path / "stopped", Broken({0, 1}), max_skipped=2)


def test_a_run_may_get_more_steps_but_not_fewer(tmp_path: Path, undisturbed: tuple[Outcome, Path]) -> None:
    shutil.copytree(undisturbed[1], tmp_path / "a")
    more = run(tmp_path / "a", optimizer=replace(OPTIMIZER, steps=STEPS + 2))
    assert more.steps == STEPS + 2
    with pytest.raises(UserError, match=r"checkpoint is at step 8, past the 3 steps of the config; raise a\.steps"):
        run(tmp_path / "a", optimizer=replace(OPTIMIZER, steps=3))


def test_the_ledger_has_the_time_of_all_steps(undisturbed: tuple[Outcome, Path]) -> None:
    spent = summarise(undisturbed[1] / LEDGER)["seconds"]
    assert all(spent[name] > 0 for name in ("init", "compile", "step", "save", "data")) and spent["validate"] == 0


def test_a_finished_run_reports_its_last_loss(tmp_path: Path, undisturbed: tuple[Outcome, Path]) -> None:
    again = run(shutil.copytree(undisturbed[1], tmp_path / "pretrain"))
    assert again.last_loss == undisturbed[0].last_loss
