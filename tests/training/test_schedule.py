"""The rates of the schedules, and what the optimizer does to each group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_weights
from tiny_steps import ADAPTERS, FAMILY, NEW_ROWS, RATES, tree_bytes

from transllm_jax.model.parameters import BASE_ROWS
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, parameter_group, schedule

# A frozen array that was given away with the state.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")


def test_the_rates_of_each_schedule() -> None:
    def rates(**changes: Any) -> list[float]:
        config = OptimizerConfig(0.5, steps=20, warmup_steps=4, final_fraction=0.2)
        rate = schedule(replace(config, **changes))
        compiled = jax.jit(rate)
        values = [float(rate(step)) for step in range(23)]
        # As the step computes them: of a number on the device.
        assert np.allclose(values, [compiled(jnp.int32(step)) for step in range(23)], rtol=1e-6)
        return values

    rising = [0.1, 0.2, 0.3, 0.4]
    cosine = [0.1 + 0.4 * (1 + np.cos(np.pi * step / 16)) / 2 for step in range(17)]
    linear = [0.5 - 0.4 * step / 16 for step in range(17)]
    stable = [0.5] * 12 + [0.5 - 0.4 * step / 5 for step in range(6)]
    for changes, wanted in (
        ({}, rising + cosine),
        ({"schedule": "linear"}, rising + linear),
        # Steps 4 to 14 at the peak, 15 the first of the last five, which is still there.
        ({"schedule": "wsd", "decay_steps": 5}, rising + stable[1:]),
        ({"schedule": "constant"}, rising + [0.5] * 17),
        ({"schedule": "constant", "warmup_steps": 0}, [0.5] * 21),
        ({"warmup_steps": 0, "schedule": "linear"}, [0.5 - 0.4 * step / 20 for step in range(21)]),
        ({"warmup_steps": 0, "schedule": "wsd", "decay_steps": 20}, [0.5 - 0.4 * step / 20 for step in range(21)]),
    ):
        values = rates(**changes)
        assert np.allclose(values, [*wanted, wanted[-1], wanted[-1]], rtol=1e-5), changes
    # Nothing but warm-up ends just below the peak.
    assert np.isclose(rates(warmup_steps=20)[19], 0.5 * 20 / 21, rtol=1e-5)


@pytest.mark.parametrize("decay_steps", [0, 17])
def test_a_decay_that_does_not_fit_is_refused(decay_steps: int) -> None:
    with pytest.raises(ValueError, match=f"decay_steps is {decay_steps}; schedule wsd wants 1 to 16"):
        OptimizerConfig(0.5, steps=20, warmup_steps=4, schedule="wsd", decay_steps=decay_steps)


def test_moments_are_those_of_optax_or_stay() -> None:
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


def test_each_array_is_of_its_group() -> None:
    assert {parameter_group(path) for path in ADAPTERS} == {"adapters"}
    assert {parameter_group(path) for path in NEW_ROWS | set(BASE_ROWS)} == {"new_rows"}
    assert {parameter_group(path) for path in random_weights(FAMILY)} == {"weights"}
    # The weights' rate has no multiplier.
    parameters = {path: jnp.ones(2) for path in ("vocabulary.base", "vocabulary.new", "blocks.mlp.up.kernel")}
    optimizer = make_optimizer(replace(RATES, new_rows_multiplier=3.0, weight_decay=0.0))
    updates, _ = optimizer.update(parameters, optimizer.init(parameters), parameters)
    # Adam's first step is the gradient's sign; the rate is the step's to apply.
    assert np.allclose(updates["vocabulary.base"], 1) and np.allclose(updates["blocks.mlp.up.kernel"], 1)
    assert np.allclose(updates["vocabulary.new"], 3)
