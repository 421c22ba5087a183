"""The optimizer: its rates, its moments, its groups and its clipping."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import OPTIMIZER, leaves, new_split

from transllm_jax.model.parameters import count_parameters
from transllm_jax.training.optimizer import make_optimizer, moments_size, schedule

# A frozen array that was given away with the state.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")


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
    assert moments_size(state) == 2 * count_parameters(split.trainable)
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
    means = [np.asarray(leaf) for path, leaf in leaves(state) if ".mu[" in jax.tree_util.keystr(path)]
    assert len(means) == 2
    # The gradients' norm is 5; Adam is given a tenth of them, and its first mean is half of that.
    assert np.allclose(sum(means), [0.15, 0.2], rtol=1e-5)
