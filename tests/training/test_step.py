"""The step: accumulation, losses by source and skipped updates."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from tiny_steps import GRADIENTS, RATES, batch_of, gradient_of, in_parts, near, rows_of, stepper
from tiny_training import LORA, VOCAB, adapted_split, tree_bytes

from transllm_jax.model.parameters import abstract, merge
from transllm_jax.training.optimizer import make_optimizer, schedule
from transllm_jax.training.step import Batch, batch_losses, initial_state, make_step

# XLA gives this warning if a frozen array is donated with the state.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")


def test_the_rate_depends_on_the_step_and_not_on_the_parts() -> None:
    """The optimizer's update is always 1, so the arrays move by the rate."""
    rate = schedule(RATES)
    for accumulate in (1, 2):
        split = adapted_split()
        for number in (0, 2, 5):
            trainable = jax.tree.map(jnp.zeros_like, split.trainable)
            state = initial_state(trainable, GRADIENTS)._replace(step=jnp.int32(number))
            state, _ = stepper(accumulate)(state, split.frozen, in_parts(batch_of(), accumulate))
            assert int(state.step) == number + 1
            for path, values in state.trainable.items():
                assert np.allclose(values, -float(rate(number)), rtol=1e-6), path


def test_parts_of_a_batch_give_the_same_as_the_whole() -> None:
    batch = batch_of()
    wanted, whole = gradient_of(stepper(), batch)
    assert whole.tokens == batch["weights"].sum() > 0
    for accumulate in (2, 8):
        ours, metrics = gradient_of(stepper(accumulate), in_parts(batch, accumulate))
        near(ours, wanted)
        assert metrics.tokens == whole.tokens and np.array_equal(metrics.source_tokens, whole.source_tokens)
        for field in ("loss", "gradient_norm", "source_loss"):
            assert np.allclose(getattr(metrics, field), getattr(whole, field), rtol=1e-5), field
    # The mean of the parts' means would be far from it.
    halves = [jnp.arange(8)[:, None] < 4, jnp.arange(8)[:, None] >= 4]
    parts = [gradient_of(stepper(), batch | {"weights": batch["weights"] * half}) for half in halves]
    assert not np.isclose((parts[0][1].loss + parts[1][1].loss) / 2, whole.loss, rtol=1e-3)
    for path, values in wanted.items():
        mean = (parts[0][0][path] + parts[1][0][path]) / 2
        assert np.abs(mean - values).max() > 1e-2 * np.abs(values).max(), path


@pytest.mark.parametrize("batch", [batch_of(), in_parts(batch_of(), 4)], ids=["whole", "in 4"])
def test_a_batch_in_other_parts_is_refused(batch: Batch) -> None:
    split = adapted_split()
    shape = re.escape(str(batch["tokens"].shape))
    with pytest.raises(ValueError, match=f"^a batch of tokens {shape} is not in 2 parts"):
        stepper(2)(initial_state(split.trainable, GRADIENTS), split.frozen, batch)


def test_dropout_depends_on_seed_step_and_part() -> None:
    one = rows_of(batch_of(), slice(4))
    batch = {field: jnp.concatenate([values, values]) for field, values in one.items()}
    batch["sources"] = jnp.repeat(jnp.arange(2, dtype=jnp.int32), 4)
    split = adapted_split()
    losses = {}
    for dropout in (False, True):
        state = initial_state(adapted_split().trainable, GRADIENTS)._replace(step=jnp.int32(5))
        _, metrics = stepper(2, dropout)(state, split.frozen, in_parts(batch, 2))
        losses[dropout] = np.asarray(metrics.source_loss)
    assert losses[False][0] == losses[False][1] > 0
    assert abs(losses[True][0] - losses[True][1]) > 1e-3

    @jax.jit
    def summed(part: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(11), 5), part)
        return jnp.sum(batch_losses(*split, one, dropout=key)[1])

    wanted = [float(summed(jnp.int32(part))) for part in (0, 1)]
    assert np.allclose(losses[True][:2], wanted, rtol=1e-5)


def test_losses_by_source_add_up_to_the_whole() -> None:
    batch = batch_of()
    # Weights other than 0 and 1: a source may count less.
    batch["weights"] = batch["weights"] * jnp.where(batch["sources"] == 1, 0.25, 1.0)[:, None]
    _, metrics = gradient_of(stepper(), batch)
    split = adapted_split()
    _, losses = jax.jit(batch_losses, static_argnums=0)(*split, batch)
    for number in range(3):
        rows = np.asarray(batch["sources"]) == number
        assert np.isclose(metrics.source_loss[number], np.asarray(losses)[rows].sum(), rtol=1e-5)
        assert metrics.source_tokens[number] == np.asarray(batch["weights"])[rows].sum() > 0
    assert metrics.tokens == metrics.source_tokens.sum()
    assert np.isclose(metrics.loss, metrics.source_loss.sum() / metrics.tokens, rtol=1e-6)
    assert metrics.finite
    # A batch without the field is one source.
    del batch["sources"]
    _, alone = gradient_of(stepper(), batch)
    assert np.isclose(alone.loss, metrics.loss, rtol=1e-6) and not alone.source_loss[1:].any()
    assert alone.source_tokens.tolist() == [metrics.tokens, 0, 0]


def test_z_loss_is_in_the_gradient_but_not_reported() -> None:
    plain, metrics = gradient_of(stepper(), batch_of())
    ours, reported = gradient_of(stepper(z_loss=0.5), batch_of())
    parted, _ = gradient_of(stepper(2, z_loss=0.5), in_parts(batch_of(), 2))
    assert reported.loss == metrics.loss and np.array_equal(reported.source_loss, metrics.source_loss)
    split, batch = adapted_split(), batch_of()

    @jax.jit
    @jax.grad
    def wanted(trainable: Any) -> jax.Array:
        model = merge(split.structure, trainable, split.frozen)
        hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        log_z = jax.nn.logsumexp(model.vocabulary.logits(hidden), axis=-1)
        return 0.5 * jnp.sum(batch["weights"] * log_z**2) / jnp.sum(batch["weights"])

    extra = wanted(split.trainable)
    near(ours, {path: values + extra[path] for path, values in plain.items()})
    near(parted, ours)


def test_an_update_that_is_not_finite_changes_nothing() -> None:
    split = adapted_split()
    optimizer = make_optimizer(RATES)
    step = make_step(split.structure, optimizer, schedule(RATES), seed=1, dropout=False, remat="none")
    good = batch_of()
    broken = good | {"weights": good["weights"] * np.float32(3e38)}
    state, metrics = step(initial_state(split.trainable, optimizer), split.frozen, good)
    assert metrics.finite and (int(state.skipped), int(state.skipped_in_a_row)) == (0, 0)
    before = tree_bytes((state.trainable, state.optimizer))
    for number in (1, 2):
        state, metrics = step(state, split.frozen, broken)
        assert not metrics.finite and not np.isfinite(metrics.loss)
        assert tree_bytes((state.trainable, state.optimizer)) == before, "also the optimizer's count"
        assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (1 + number, number, number)
    state, metrics = step(state, split.frozen, good)
    assert metrics.finite and (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (4, 2, 0)
    after = tree_bytes((state.trainable, state.optimizer))
    assert all(after[path] != before[path] for path in before if "EmptyState" not in path)
    state, _ = step(state, split.frozen, broken)
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (3, 1)


def test_a_gradient_that_is_not_finite_is_skipped() -> None:
    """New rows so large that the loss is finite and the gradient is not."""
    split = adapted_split()
    split.trainable["vocabulary.new"] *= 1e25
    before = tree_bytes(split.trainable)
    state = initial_state(split.trainable, GRADIENTS)
    state, metrics = stepper()(state, split.frozen, batch_of())
    assert np.isfinite(metrics.loss) and not np.isfinite(metrics.gradient_norm) and not metrics.finite
    assert tree_bytes(state.trainable) == before and int(state.skipped) == 1


def test_skipping_updates_needs_no_copies() -> None:
    split = abstract(replace(tiny_config(VOCAB), num_hidden_layers=1), LORA, 5000)
    optimizer = make_optimizer(RATES)
    step = make_step(split.structure, optimizer, schedule(RATES), seed=0, dropout=False, remat="none")
    state = jax.eval_shape(lambda arrays: initial_state(arrays, optimizer), split.trainable)
    program = step.lower(state, split.frozen, jax.eval_shape(lambda: batch_of(1))).compile()
    memory = program.memory_analysis()
    rows = 5000 * 48 * 4
    # The gradient of the rows and one more array of their size; copies of the moments would be two more.
    assert rows < memory.temp_size_in_bytes < 2.5 * rows
    assert memory.alias_size_in_bytes > 3 * rows, "rows and moments are updated in place"
