"""Training: what moves and what does not, checkpoints, and a run that was stopped ends as one that was not."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_weights, tiny_config, tiny_run, write_tiny_model

from conversion.hf.directory import read_weights
from transllm_jax.config import Config
from transllm_jax.errors import Diverged, Preempted, UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import BASE_ROWS, Split, abstract, assemble, count, load_frozen
from transllm_jax.progress import Progress
from transllm_jax.stages import base as base_stage
from transllm_jax.stages import pipeline, vocabulary
from transllm_jax.stages.run import Run
from transllm_jax.training.arrays import load_arrays, save_arrays
from transllm_jax.training.checkpoint import Checkpoints
from transllm_jax.training.loop import LoopConfig, Outcome, Watch, train
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from transllm_jax.training.record.ledger import LEDGER, Ledger, summarise
from transllm_jax.training.record.metrics import MetricsLog, read_rows, read_validations
from transllm_jax.training.step import TrainState, initial_state, make_step, summed_loss

# A frozen array that was given away with the state.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")

VOCAB, NEW, LENGTH, STEPS = 40, 5, 16, 6
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, steps=STEPS, warmup_steps=1, new_rows_multiplier=2.0, weight_decay=0.01)


def new_split(lora: LoraConfig = LORA, new_rows: int = NEW, *, train_base: bool = False, tied: bool = True) -> Split:
    """A model in the middle of training: nothing is zero."""
    config = tiny_config(VOCAB, tied=tied)
    rng = np.random.default_rng(1)
    shapes = abstract(config, lora, new_rows, train_base=train_base).trainable
    trainable = {path: 0.1 * rng.standard_normal(leaf.shape, dtype=np.float32) for path, leaf in sorted(shapes.items())}
    return assemble(config, load_frozen(config, random_weights(config)), lora=lora, trainable=trainable)


def batch_of(k: int) -> dict[str, np.ndarray]:
    """Batch k: sequences in which each token determines the next, among base and new ids."""
    tokens = np.zeros((2, LENGTH), np.int32)
    tokens[:, 0] = [k % (VOCAB + NEW), (7 * k + 3) % (VOCAB + NEW)]
    for place in range(1, LENGTH):
        tokens[:, place] = (tokens[:, place - 1] * 2 + 3) % (VOCAB + NEW)
    weights = np.ones((2, LENGTH), np.float32)
    weights[:, -1] = 0
    return {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
        "segment_ids": np.ones_like(tokens),
        "labels": np.roll(tokens, -1, axis=1),
        "weights": weights,
    }


class Source:
    """Batches by number; `before` is called with each number that is asked for."""

    batch_size = 2

    def __init__(self, before: Callable[[int], None] = lambda k: None) -> None:
        self.before = before

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        self.before(k)
        return batch_of(k)

    def of_rows(self, k: int, places: np.ndarray) -> dict[str, np.ndarray]:
        return {field: values[places] for field, values in self[k].items()}

    def places(self, k: int) -> list[str]:
        return [f"text.txt:{2 * k + row}" for row in range(2)]


def run(
    directory: Path,
    source: Any = None,
    *,
    checkpoint_every: int = 2,
    interrupt: Interrupt | None = None,
    watch: Watch | None = None,
    **changes: Any,
) -> Outcome:
    # No batch is asked for ahead of its step, so that what happens at one happens there.
    config = LoopConfig(OPTIMIZER, checkpoint_every=checkpoint_every, seed=11, dropout=True, ahead=0)
    config = replace(config, **changes)
    directory.mkdir(parents=True, exist_ok=True)
    with Ledger(directory / LEDGER) as ledger:
        given = (source or Source(), config, directory, Progress(quiet=True), interrupt or Interrupt(), ledger, watch)
        return train(new_split(), *given)


@cache
def _summed_loss() -> Any:
    split = new_split()
    return jax.jit(lambda trainable, batch: summed_loss(split.structure, trainable, split.frozen, batch))


def mean_loss(trainable: Any, batch: dict[str, jax.Array]) -> float:
    """nats a token, without dropout"""
    return float(_summed_loss()(trainable, batch) / batch["weights"].sum())


def tree_bytes(tree: Any) -> dict[str, bytes]:
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in _leaves(tree)}


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


# --- the optimizer --------------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    config = replace(OPTIMIZER, learning_rate=0.5, steps=20, warmup_steps=4, final_fraction=0.2)
    rate = schedule(config)
    values = [float(rate(step)) for step in range(21)]
    assert np.allclose(values[:5], [0.1, 0.2, 0.3, 0.4, 0.5])
    falling = [0.1 + 0.4 * (1 + math.cos(math.pi * step / 16)) / 2 for step in range(17)]
    assert np.allclose(values[4:], falling) and math.isclose(values[20], 0.1, rel_tol=1e-5)
    # No warm-up starts at the peak; nothing but warm-up ends just below it.
    assert math.isclose(schedule(replace(config, warmup_steps=0))(0), 0.5, rel_tol=1e-6)
    assert math.isclose(schedule(replace(config, warmup_steps=20))(19), 0.5 * 20 / 21, rel_tol=1e-5)


@pytest.mark.parametrize("train_base", [False, True], ids=["new rows", "base rows too"])
def test_the_optimizer_keeps_two_moments_of_what_trains_and_nothing_else(train_base: bool) -> None:
    split = new_split(train_base=train_base)
    assert ("vocabulary.base_trained" in split.trainable) == train_base
    state = make_optimizer(OPTIMIZER).init(split.trainable)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * count(split.trainable)
    held = [jax.tree_util.keystr(path) for path, leaf in _leaves(state) if leaf.ndim]
    assert len(held) == 2 * len(split.trainable)
    for path in split.trainable:
        assert sum(f"'{path}'" in name for name in held) == 2, path
    assert not any(f"'{path}'" in name for path in split.frozen for name in held)
    assert all(leaf.dtype == jnp.float32 for _, leaf in _leaves(state) if leaf.ndim)


def test_the_multiplier_scales_the_new_rows_rate() -> None:
    parameters = {
        "blocks.mlp.up.a": jnp.full((2, 3), 0.7),
        "vocabulary.new": jnp.full((4, 3), -0.4),
        "vocabulary.base_trained": jnp.full((5, 3), -0.4),
    }
    gradients = {path: jnp.full(values.shape, 0.3) for path, values in parameters.items()}

    def update(multiplier: float) -> dict[str, np.ndarray]:
        optimizer = make_optimizer(replace(OPTIMIZER, weight_decay=0.1, new_rows_multiplier=multiplier))
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(parameters), parameters)
        return {path: np.asarray(values) for path, values in updates.items()}

    once, thrice = update(1.0), update(3.0)
    # Adam's first step is the gradient's sign; the decay is the weight's tenth. The rate is the step's to apply.
    assert np.allclose(once["blocks.mlp.up.a"], 1 + 0.07, rtol=1e-4)
    assert np.allclose(once["vocabulary.new"], 1 - 0.04, rtol=1e-4)
    assert np.array_equal(thrice["blocks.mlp.up.a"], once["blocks.mlp.up.a"])
    assert np.allclose(thrice["vocabulary.new"], 3 * once["vocabulary.new"], rtol=1e-6)
    # Trained base rows are of the same group.
    for updates in (once, thrice):
        assert (updates["vocabulary.base_trained"] == updates["vocabulary.new"][0, 0]).all()


def test_large_gradients_are_clipped_to_their_global_norm() -> None:
    parameters = {"blocks.mlp.up.a": jnp.zeros(2), "vocabulary.new": jnp.zeros(2)}
    gradients = {"blocks.mlp.up.a": jnp.array([3.0, 0.0]), "vocabulary.new": jnp.array([0.0, 4.0])}
    optimizer = make_optimizer(replace(OPTIMIZER, clip_norm=0.5, beta1=0.5))
    _, state = optimizer.update(gradients, optimizer.init(parameters), parameters)
    means = [np.asarray(leaf) for path, leaf in _leaves(state) if ".mu[" in jax.tree_util.keystr(path)]
    assert len(means) == 2
    # The gradients' norm is 5; Adam is given a tenth of them, and its first mean is half of that.
    assert np.allclose(sum(means), [0.15, 0.2], rtol=1e-5)


# --- one step -------------------------------------------------------------------------------------------------------


def stepping(structure: Any, config: OptimizerConfig = OPTIMIZER, *, seed: int = 11, dropout: bool = False) -> Any:
    return make_step(structure, make_optimizer(config), schedule(config), seed=seed, dropout=dropout, remat="none")


@pytest.fixture(scope="module")
def step() -> Any:
    return stepping(new_split().structure)


def device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {field: jnp.asarray(values) for field, values in batch.items()}


def test_a_step_changes_all_that_trains_and_no_bit_of_what_is_frozen(step: Any) -> None:
    split = new_split()
    before, frozen = tree_bytes(split.trainable), tree_bytes(split.frozen)
    batch = device(batch_of(0))
    wanted = mean_loss(split.trainable, batch)

    state, metrics = step(initial_state(split.trainable, make_optimizer(OPTIMIZER)), split.frozen, batch)
    after = tree_bytes(state.trainable)
    assert after.keys() == before.keys() and all(after[path] != before[path] for path in before)
    # Still there (not donated), and untouched.
    assert tree_bytes(split.frozen) == frozen
    assert int(state.step) == 1
    assert metrics.tokens == 2 * (LENGTH - 1)
    assert math.isclose(metrics.loss, wanted, rel_tol=1e-5)
    assert 0 < metrics.gradient_norm < 100


def test_a_step_moves_the_base_rows_where_they_train_and_no_frozen_bit() -> None:
    # Untied, so that the embedding shows which rows were read; in the output every row takes part.
    split = new_split(train_base=True, tied=False)
    frozen, before = tree_bytes(split.frozen), {path: np.array(split.trainable[path]) for path in BASE_ROWS}
    optimizer = make_optimizer(replace(OPTIMIZER, weight_decay=0.0))
    step = stepping(split.structure, replace(OPTIMIZER, weight_decay=0.0))
    batch = batch_of(0)
    state, _ = step(initial_state(split.trainable, optimizer), split.frozen, device(batch))
    read, written = (np.abs(np.asarray(state.trainable[path]) - before[path]).max(axis=1) for path in BASE_ROWS)
    seen = np.isin(np.arange(VOCAB), batch["tokens"][:, :-1])
    assert seen.sum() >= 4 and (read[~seen] == 0).all()
    # Adam's first step is the rate, half of the peak, and for vocabulary rows twice that.
    assert np.allclose(read[seen], OPTIMIZER.learning_rate, rtol=1e-2)
    assert np.allclose(written, OPTIMIZER.learning_rate, rtol=1e-2)
    assert tree_bytes(split.frozen) == frozen


def test_the_step_is_on_the_mean_over_weighted_tokens(step: Any) -> None:
    """A batch with all weights doubled has the same mean: the same loss, gradient norm and next arrays."""
    outcomes = []
    for factor in (1, 2):
        split = new_split()
        batch = batch_of(0)
        batch["weights"] = factor * batch["weights"]
        outcomes.append(step(initial_state(split.trainable, make_optimizer(OPTIMIZER)), split.frozen, device(batch)))
    (one, metrics), (other, of_other) = outcomes
    assert np.allclose(metrics.loss, of_other.loss, rtol=1e-6)
    assert np.allclose(metrics.gradient_norm, of_other.gradient_norm, rtol=1e-4)
    for path, values in one.trainable.items():
        assert np.allclose(values, other.trainable[path], atol=1e-5), path


def test_a_batch_without_a_trained_token_is_harmless(step: Any) -> None:
    split = new_split()
    batch = batch_of(0)
    batch["weights"] = np.zeros_like(batch["weights"])
    state, metrics = step(initial_state(split.trainable, make_optimizer(OPTIMIZER)), split.frozen, device(batch))
    assert metrics.loss == 0 and metrics.gradient_norm == 0
    assert all(np.isfinite(values).all() for values in state.trainable.values())


# --- checkpoints ----------------------------------------------------------------------------------------------------


def latest(directory: Path) -> int | None:
    with closing(Checkpoints(directory / "checkpoints")) as checkpoints:
        return checkpoints.latest()


def restored(directory: Path, like: TrainState | None = None) -> TrainState:
    with closing(Checkpoints(directory / "checkpoints")) as checkpoints:
        return checkpoints.restore(some_state(0) if like is None else like)


def save(directory: Path, *states: TrainState) -> None:
    with closing(Checkpoints(directory / "checkpoints")) as checkpoints:
        for state in states:
            checkpoints.save(state)


def some_state(step: int, *, lora: LoraConfig = LORA, new_rows: int = NEW, train_base: bool = False) -> TrainState:
    """A state in which every value is another one."""
    rng = np.random.default_rng(step)
    state = initial_state(new_split(lora, new_rows, train_base=train_base).trainable, make_optimizer(OPTIMIZER))
    drawn = jax.tree.map(
        lambda leaf: (
            jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) if leaf.ndim else jnp.int32(rng.integers(99))
        ),
        state,
    )
    return drawn._replace(step=jnp.int32(step))


def test_a_checkpoint_is_restored_bit_for_bit(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    states = [some_state(step) for step in (2, 4, 7)]
    save(tmp_path, *states)
    assert latest(tmp_path) == 7
    again = restored(tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(states[-1])
    assert tree_bytes(again) == tree_bytes(states[-1]) != tree_bytes(states[0])
    assert [leaf.dtype for _, leaf in _leaves(again)] == [leaf.dtype for _, leaf in _leaves(states[-1])]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} == {"4", "7"}


def test_what_is_saved_is_the_state_of_the_moment_though_training_goes_on(tmp_path: Path) -> None:
    onwards = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=(0,))
    large = {"vocabulary.new": jnp.zeros((1000, 1000))}
    state = onwards(initial_state(large, make_optimizer(OPTIMIZER)))
    with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(state)
        for _ in range(5):
            state = onwards(state)
    again = restored(tmp_path, state)
    assert int(again.step) == 1 and (np.asarray(again.trainable["vocabulary.new"]) == 1).all()


# Orbax leaves the readers of the other arrays unfinished.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "other",
    [{"lora": replace(LORA, rank=3)}, {"new_rows": NEW + 1}, {"new_rows": 0}, {"train_base": True}],
    ids=["rank", "rows", "no rows", "base rows"],
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    save(tmp_path, some_state(3))

    def message() -> str:
        with pytest.raises(UserError, match="checkpoints/3: not a checkpoint of this configuration") as caught:
            restored(tmp_path, some_state(0, **other))
        return str(caught.value)

    assert "\n" not in message()
    gc.collect()


def test_arrays_of_a_stage_are_read_back(tmp_path: Path) -> None:
    arrays = dict(new_split().trainable)
    save_arrays(tmp_path / "trainable", arrays)
    read = load_arrays(tmp_path / "trainable")
    assert tree_bytes(read) == tree_bytes(arrays)
    assert all(isinstance(values, np.ndarray) for values in read.values())
    with pytest.raises(UserError, match="no such adapters"):
        load_arrays(tmp_path / "elsewhere")


# --- the loop -------------------------------------------------------------------------------------------------------


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
        for trainable in (new_split().trainable, outcome.trainable)
    )
    assert after < before - 0.2
    rate = schedule(OPTIMIZER)
    for row in rows:
        assert math.isclose(row["learning_rate"], rate(row["step"] - 1), rel_tol=1e-6)
        assert row["gradient_norm"] > 0 and row["trained_tokens"] == 2 * (LENGTH - 1)
    assert outcome.steps == STEPS and outcome.last_loss == rows[-1]["loss"] and outcome.tokens_per_second > 0
    assert latest(directory) == STEPS


def test_dropout_is_a_function_of_seed_and_step(step: Any, undisturbed: tuple[Outcome, Path]) -> None:
    optimizer = make_optimizer(OPTIMIZER)
    dropping, other_seed = (stepping(new_split().structure, seed=seed, dropout=True) for seed in (11, 12))

    def arguments(number: int) -> tuple[Any, ...]:
        """Batch 0 and the arrays that a run starts from, at a step of the given number."""
        split = new_split()
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


def test_a_run_that_was_asked_to_stop_ends_as_one_that_was_not(
    tmp_path: Path, undisturbed: tuple[Outcome, Path]
) -> None:
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
    assert asked_for == [3, 4, 5], "no batch twice, none left out"
    require_same(outcome, directory, undisturbed)


def test_a_run_that_was_killed_past_its_checkpoint_ends_as_one_that_was_not(
    tmp_path: Path, undisturbed: tuple[Outcome, Path]
) -> None:
    directory = tmp_path / "pretrain"

    def die(k: int) -> None:
        if k == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(directory, Source(die), checkpoint_every=3)
    # Step 4 is logged but not saved; and a kill may come in the middle of a line.
    metrics = directory / "metrics.jsonl"
    assert [row["step"] for row in read_rows(metrics)] == [1, 2, 3, 4]
    assert latest(directory) == 3
    with metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')

    asked_for: list[int] = []
    outcome = run(directory, Source(asked_for.append))
    assert asked_for == [3, 4, 5]
    require_same(outcome, directory, undisturbed)


def test_a_request_at_the_last_step_stops_nothing(tmp_path: Path, undisturbed: tuple[Outcome, Path]) -> None:
    interrupt = Interrupt()

    def ask(k: int) -> None:
        interrupt.requested = k == STEPS - 1

    require_same(run(tmp_path / "a", Source(ask), interrupt=interrupt), tmp_path / "a", undisturbed)


class Broken(Source):
    """Batches of which some have a loss that is not finite."""

    def __init__(self, broken: set[int]) -> None:
        super().__init__()
        self.broken = broken

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        batch = batch_of(k)
        if k in self.broken:
            batch["weights"] = batch["weights"] * np.float32(3e38)
        return batch


def test_an_update_that_is_not_finite_is_skipped_and_accounted_for(tmp_path: Path) -> None:
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
    # Stopped between the two, it ends with the same bytes.
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "again", _Dying({1, 3}), max_skipped=2)
    run(tmp_path / "again", Broken({1, 3}), max_skipped=2)
    assert tree_bytes(restored(tmp_path / "again")) == tree_bytes(state)
    for name in ("metrics.jsonl", "skipped.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


class _Dying(Broken):
    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        if k == 3:
            raise KeyboardInterrupt
        return super().__getitem__(k)


def test_too_many_in_a_row_end_the_run_and_the_last_checkpoint_stands(tmp_path: Path) -> None:
    directory = tmp_path / "pretrain"
    said = r"pretrain: .* not finite in 2 steps in a row, up to step 5; .* lower pretrain\.learning_rate"
    with pytest.raises(Diverged, match=said):
        run(directory, Broken({1, 3, 4}), checkpoint_every=3, max_skipped=2)
    assert latest(directory) == 3
    assert all(np.isfinite(leaf).all() for _, leaf in _leaves(restored(directory)))
    # What was skipped in a row before a stop counts after it.
    with pytest.raises(Preempted):
        interrupt = Interrupt()
        interrupt.requested = True
        run(tmp_path / "stopped", Broken({0, 1}), max_skipped=2, interrupt=interrupt)
    with pytest.raises(Diverged, match="in 2 steps in a row, up to step 2"):
        run(tmp_path / "stopped", Broken({0, 1}), max_skipped=2)


# --- validation -----------------------------------------------------------------------------------------------------


def watch_of(scores: list[float], every: int = 1, patience: int | None = None, of: str = "") -> tuple[Watch, list[int]]:
    """Validations with these results, one after the other; and how many were made."""
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
    # Of equal ones the last: it has seen more.
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
    # Killed after it had stopped, it does not go on; killed before, it comes to the same end.
    watch, made = watch_of([])
    again = run(tmp_path / "a", watch=replace(watch, patience=2))
    assert (again.steps, again.best, made) == (4, 2, [])
    assert tree_bytes(again.trainable) == tree_bytes(outcome.trainable)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", _Dying(set()), watch=watch_of(scores, patience=2)[0])
    run(tmp_path / "b", watch=watch_of(scores[3:], patience=2)[0])
    assert (tmp_path / "b" / "validation.jsonl").read_bytes() == (tmp_path / "a" / "validation.jsonl").read_bytes()


def test_validations_of_other_rows_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(scores: list[float], of: str) -> None:
        interrupt = Interrupt()
        interrupt.requested = True
        with pytest.raises(Preempted):
            run(tmp_path / "a", watch=watch_of(scores, of=of)[0], interrupt=interrupt)

    # Step by step: with other rows every score is higher, and so is the best of them.
    stopped([1.0], "few")
    stopped([1.5], "few")
    stopped([3.0], "many")
    watch, made = watch_of([2.5, 2.8, 2.9], of="many", patience=3)
    outcome = run(tmp_path / "a", watch=watch)
    assert (outcome.best, outcome.steps, len(made)) == (4, STEPS, 3)
    rows = read_validations(tmp_path / "a" / "validation.jsonl")
    assert [row["step"] for row in rows] == [3, 4, 5, 6] and {row["of"] for row in rows} == {"many"}
    assert len(read_rows(tmp_path / "a" / "validation.jsonl")) == 6
    # Nothing was measured on these rows yet, and the scores of others have no say.
    assert run(tmp_path / "a", watch=watch_of([], of="third")[0]).best is None


# --- what may change ------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_more_steps_and_refuses_fewer_than_it_did(tmp_path: Path) -> None:
    run(tmp_path / "a")
    more = run(tmp_path / "a", optimizer=replace(OPTIMIZER, steps=STEPS + 2))
    assert more.steps == STEPS + 2
    with pytest.raises(UserError, match=r"checkpoint is at step 8, past the 3 steps of the config; raise a\.steps"):
        run(tmp_path / "a", optimizer=replace(OPTIMIZER, steps=3))


def test_the_ledger_has_the_time_of_all_steps(tmp_path: Path) -> None:
    run(tmp_path / "a", checkpoint_every=2)
    spent = summarise(tmp_path / "a" / LEDGER)["seconds"]
    assert all(spent[name] > 0 for name in ("init", "compile", "step", "save", "data")) and spent["validate"] == 0


# --- all rows of the vocabulary train -------------------------------------------------------------------------------


def test_a_run_with_all_embeddings_trains_copies_of_the_base_rows(tiny_model: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    config = Config.model_validate(tiny_run(tiny_model, workdir, embeddings="all"))
    pipeline.run_pipeline(config, workdir, Progress(quiet=True), Interrupt(), until="pretrain")
    original = read_weights(tiny_model)["vocabulary.base"]
    started, trained = (load_arrays(workdir / point / "trainable") for point in ("vocabulary", "pretrain"))
    assert started["vocabulary.base_trained"].tobytes() == original.astype(np.float32).tobytes()
    assert "vocabulary.output_base_trained" not in started, "tied embeddings stay tied"
    assert started.keys() == trained.keys()
    assert all(started[path].tobytes() != trained[path].tobytes() for path in started)
    manifest = json.loads((workdir / "vocabulary" / "manifest.json").read_text(encoding="utf-8"))
    report = json.loads((workdir / "vocabulary" / "report.json").read_text(encoding="utf-8"))
    assert report["trainable_parameters"] == sum(values.size for values in started.values())
    assert str(report["trainable_parameters"]) in json.dumps(manifest)

    # The original model is still inside, bit for bit: the teacher, whatever was trained.
    run = Run(config, workdir, Progress(quiet=True), Interrupt())
    tokens = jnp.arange(24)[None] + 40
    rows = (tokens, jnp.arange(24)[None], jnp.ones_like(tokens))
    whole, off, wanted = (
        model.vocabulary.logits(model(*rows, adapters=adapters), base_only=True, adapters=adapters)
        for model, adapters in (
            (run.split("pretrain").merge(), True),
            (run.split("pretrain").merge(), False),
            (run.split("base").merge(), True),
        )
    )
    assert np.array_equal(off, wanted) and not np.array_equal(whole, wanted)


def test_an_untied_run_copies_both_tables(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", tied=False)
    workdir = tmp_path / "run"
    config = Config.model_validate(tiny_run(tmp_path / "model", workdir, embeddings="all"))
    run = Run(config, workdir, Progress(quiet=True), Interrupt())
    for name, stage in (("base", base_stage), ("vocabulary", vocabulary)):
        (workdir / name).mkdir(parents=True)
        stage.run_stage(run, workdir / name)
    arrays, original = load_arrays(workdir / "vocabulary" / "trainable"), read_weights(tmp_path / "model")
    for path in ("vocabulary.base", "vocabulary.output_base"):
        assert arrays[f"{path}_trained"].tobytes() == original[path].astype(np.float32).tobytes()


# --- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_an_unfinished_last_line_is_left_out_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    rows = [{"step": step, "loss": step / 3} for step in (1, 2, 3)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    for cut in range(len(whole) - len(json.dumps(rows[-1])) - 1, len(whole)):
        path.write_text(whole[:cut], encoding="utf-8")
        assert read_rows(path) == rows[:2], "only a line with its end is whole"
    path.write_text(whole[:-4], encoding="utf-8")
    log = MetricsLog(path, step=3)
    log.write(rows[-1])
    assert path.read_text(encoding="utf-8") == whole, "a line is on the disk at once"
    log.close()


def test_lines_past_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 8)), encoding="utf-8")
    log = MetricsLog(path, step=4)
    log.write({"step": 5, "loss": 2.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2)]
    MetricsLog(path).close()
    assert read_rows(path) == [], "a run from the start starts its log"


def test_a_run_that_had_finished_reports_its_last_loss(tmp_path, undisturbed):
    run(tmp_path / "pretrain")
    again = run(tmp_path / "pretrain")
    assert again.last_loss == undisturbed[0].last_loss


def test_where_all_checkpoints_are_damaged_it_is_refused_each_time(tmp_path: Path) -> None:
    """The first refusal must leave what makes the second one: a loop that restarts a run is not to begin it anew."""
    directory = tmp_path / "pretrain"
    run(directory)
    for step in ("4", "6"):
        (directory / "checkpoints" / step / "state" / "_METADATA").write_text("{", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UserError, match=r"6 is damaged .*; .*4 is damaged .*no other is left: run the stage with"):
            run(directory)
    assert len(read_rows(directory / "metrics.jsonl")) == STEPS
