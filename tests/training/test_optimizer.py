"""The optimizer: the rates of its schedules, its moments, its groups and its clipping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_weights
from tiny_steps import ADAPTERS, FAMILY, NEW_ROWS, RATES
from tiny_training import OPTIMIZER, adapted_split, leaves, tree_bytes

from transllm_jax.model.parameters import BASE_ROWS, count_parameters
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, parameter_group, schedule


def test_the_rates_of_each_schedule() -> None:
    def rates(**changes: Any) -> list[float]:
        config = OptimizerConfig(0.5, steps=20, warmup_steps=4, final_fraction=0.2)
        rate = schedule(replace(config, **changes))
        compiled = jax.jit(rate)
        values = [float(rate(step)) for step in range(23)]
        # The step computes the rate of a number on the device.
        assert np.allclose(values, [compiled(jnp.int32(step)) for step in range(23)], rtol=1e-6)
        return values

    rising = [0.1, 0.2, 0.3, 0.4]
    cosine = [0.1 + 0.4 * (1 + np.cos(np.pi * step / 16)) / 2 for step in range(17)]
    linear = [0.5 - 0.4 * step / 16 for step in range(17)]
    stable = [0.5] * 12 + [0.5 - 0.4 * step / 5 for step in range(6)]
    for changes, wanted in (
        ({}, rising + cosine),
        ({"schedule": "linear"}, rising + linear),
        # Steps 4 to 14 are at the peak; so is step 15, the first of the last five.
        ({"schedule": "wsd", "decay_steps": 5}, rising + stable[1:]),
        ({"schedule": "constant"}, rising + [0.5] * 17),
        ({"schedule": "constant", "warmup_steps": 0}, [0.5] * 21),
        ({"warmup_steps": 0}, [0.1 + 0.4 * (1 + np.cos(np.pi * step / 20)) / 2 for step in range(21)]),
        ({"warmup_steps": 0, "schedule": "linear"}, [0.5 - 0.4 * step / 20 for step in range(21)]),
        ({"warmup_steps": 0, "schedule": "wsd", "decay_steps": 20}, [0.5 - 0.4 * step / 20 for step in range(21)]),
    ):
        values = rates(**changes)
        assert np.allclose(values, [*wanted, wanted[-1], wanted[-1]], rtol=1e-5), changes
    # Without warm-up the first step is at the peak; with nothing but warm-up the last is just below it.
    assert np.isclose(rates(warmup_steps=0)[0], 0.5, rtol=1e-6)
    assert np.isclose(rates(warmup_steps=20)[19], 0.5 * 20 / 21, rtol=1e-5)


@pytest.mark.parametrize("decay_steps", [0, 17])
def test_a_decay_that_does_not_fit_is_refused(decay_steps: int) -> None:
    with pytest.raises(ValueError, match=f"decay_steps is {decay_steps}; schedule wsd wants 1 to 16"):
        OptimizerConfig(0.5, steps=20, warmup_steps=4, schedule="wsd", decay_steps=decay_steps)


def test_moments_match_optax_or_stay() -> None:
    parameters = {"vocabulary.new": jnp.linspace(-1, 1, 3000).reshape(30, 100)}
    ours, theirs = (
        make_optimizer(RATES),
        optax.chain(
            optax.clip_by_global_norm(RATES.clip_norm),
            optax.scale_by_adam(RATES.beta1, RATES.beta2),
            optax.add_decayed_weights(RATES.weight_decay),
            optax.scale(RATES.new_rows_multiplier),
        ),
    )
    state, wanted_state = ours.init(parameters), theirs.init(parameters)
    for number in range(3):
        gradient = jax.tree.map(lambda values: jnp.cos(values * (9 + number)), parameters)  # noqa: B023
        _, kept = ours.update(gradient, state, parameters, finite=jnp.bool_(False))
        assert tree_bytes(kept) == tree_bytes(state)
        update, state = ours.update(gradient, state, parameters, finite=jnp.bool_(True))
        wanted, wanted_state = theirs.update(gradient, wanted_state, parameters)
        assert tree_bytes(update) == tree_bytes(wanted)
        assert list(tree_bytes(state).values()) == list(tree_bytes(wanted_state).values())


def test_weight_decay_leaves_scales_and_biases_alone() -> None:
    paths = ["final_norm.scale", "blocks.attention.q.bias", "blocks.attention.q.kernel", "blocks.attention.q.a"]
    arrays = {path: jnp.ones((2, 3)) for path in [*paths, "vocabulary.new"]}
    optimizer = make_optimizer(replace(RATES, weight_decay=0.5, new_rows_multiplier=1.0))
    update, _ = optimizer.update(jax.tree.map(jnp.zeros_like, arrays), optimizer.init(arrays), arrays)
    decayed = {path for path, change in update.items() if np.any(change)}
    assert decayed == {"blocks.attention.q.kernel", "blocks.attention.q.a", "vocabulary.new"}


def test_each_array_is_in_its_group() -> None:
    assert {parameter_group(path) for path in ADAPTERS} == {"adapters"}
    assert {parameter_group(path) for path in NEW_ROWS | set(BASE_ROWS)} == {"new_rows"}
    assert {parameter_group(path) for path in random_weights(FAMILY)} == {"weights"}
    # The multiplier does not apply to the base's weights.
    parameters = {path: jnp.ones(2) for path in ("vocabulary.base", "vocabulary.new", "blocks.mlp.up.kernel")}
    optimizer = make_optimizer(replace(RATES, new_rows_multiplier=3.0, weight_decay=0.0))
    updates, _ = optimizer.update(parameters, optimizer.init(parameters), parameters)
    # Adam's first update is the gradient's sign; the step multiplies it by the rate.
    assert np.allclose(updates["vocabulary.base"], 1) and np.allclose(updates["blocks.mlp.up.kernel"], 1)
    assert np.allclose(updates["vocabulary.new"], 3)


@pytest.mark.parametrize("train_base", [False, True], ids=["new rows", "base rows too"])
def test_the_optimizer_keeps_two_moments_of_what_trains(train_base: bool) -> None:
    split = adapted_split(train_base=train_base)
    assert ("vocabulary.base_trained" in split.trainable) == train_base
    state = make_optimizer(OPTIMIZER).init(split.trainable)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * count_parameters(split.trainable)
    held = [jax.tree_util.keystr(path) for path, leaf in leaves(state) if leaf.ndim]
    assert len(held) == 2 * len(split.trainable)
    for path in split.trainable:
        assert sum(f"'{path}'" in name for name in held) == 2, path
    assert not any(f"'{path}'" in name for path in split.frozen for name in held)
    assert all(leaf.dtype == jnp.float32 for _, leaf in leaves(state) if leaf.ndim)


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
    # Adam's first update is the gradient's sign, plus a tenth of the weight. The step multiplies it by the rate.
    assert np.allclose(once["blocks.mlp.up.a"], 1 + 0.07, rtol=1e-4)
    assert np.allclose(once["vocabulary.new"], 1 - 0.04, rtol=1e-4)
    assert np.array_equal(thrice["blocks.mlp.up.a"], once["blocks.mlp.up.a"])
    assert np.allclose(thrice["vocabulary.new"], 3 * once["vocabulary.new"], rtol=1e-6)
    # Trained base rows are in the same group.
    for updates in (once, thrice):
        assert (updates["vocabulary.base_trained"] == updates["vocabulary.new"][0, 0]).all()


def test_large_gradients_are_clipped_to_their_global_norm() -> None:
    parameters = {"blocks.mlp.up.a": jnp.zeros(2), "vocabulary.new": jnp.zeros(2)}
    gradients = {"blocks.mlp.up.a": jnp.array([3.0, 0.0]), "vocabulary.new": jnp.array([0.0, 4.0])}
    optimizer = make_optimizer(replace(OPTIMIZER, clip_norm=0.5, beta1=0.5))
    _, state = optimizer.update(gradients, optimizer.init(parameters), parameters)
    means = [np.asarray(leaf) for path, leaf in leaves(state) if ".mu[" in jax.tree_util.keystr(path)]
    assert len(means) == 2
    # The norm is 5 and is clipped to a tenth; Adam's first mean is half of the clipped gradient.
    assert np.allclose(sum(means), [0.15, 0.2], rtol=1e-5)
