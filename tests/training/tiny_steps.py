"""Shared by the tests of the step: models of which adapters or all weights train, batches, and steps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import random_weights, tiny_config
from tiny_training import NEW, VOCAB, adapted_split

from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.parameters import Split, abstract, assemble, load_frozen
from transllm_jax.training.optimizer import OptimizerConfig, schedule
from transllm_jax.training.step import Batch, Metrics, initial_state, make_step

ROWS, LENGTH = 8, 12
RATES = OptimizerConfig(1e-2, steps=8, warmup_steps=3, new_rows_multiplier=2.0, weight_decay=0.01)
# An optimizer that remembers the last gradient, and whose update is always 1.
GRADIENTS = optax.GradientTransformationExtraArgs(
    lambda parameters: jax.tree.map(jnp.zeros_like, parameters),
    lambda gradient, state, parameters=None, *, finite: (jax.tree.map(jnp.ones_like, gradient), gradient),
)
FAMILY = replace(tiny_config(VOCAB, tied=False), attention_bias=True, mlp_bias=True)


def full_split(config: LlamaConfig = FAMILY, dtype: Any = jnp.float32, **options: Any) -> Split:
    """All weights train, and new rows."""
    frozen = load_frozen(config, random_weights(config), dtype)
    rows = {path: leaf.shape for path, leaf in abstract(config, None, NEW).trainable.items()}
    rng = np.random.default_rng(1)
    drawn = {path: 0.1 * rng.standard_normal(shape, dtype=np.float32) for path, shape in sorted(rows.items())}
    return assemble(config, frozen, trainable={**frozen, **drawn}, **options)


def batch_of(rows: int = ROWS, seed: int = 0) -> Batch:
    """Random tokens of the whole vocabulary. The number of weighted tokens differs from row to row; in one it is 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB + NEW, (rows, LENGTH), dtype=np.int32)
    counted = rng.permutation(np.arange(rows) * (LENGTH - 1) // max(rows - 1, 1))
    weights = (np.arange(LENGTH) < counted[:, None]).astype(np.float32)
    batch = {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
        "segment_ids": np.ones_like(tokens),
        "labels": np.roll(tokens, -1, axis=1),
        "weights": weights,
        "sources": np.arange(rows, dtype=np.int32) % 3,
    }
    return {field: jnp.asarray(values) for field, values in batch.items()}


def rows_of(batch: Batch, chosen: Any) -> Batch:
    return {field: values[chosen] for field, values in batch.items()}


def in_parts(batch: Batch, accumulate: int) -> Batch:
    """The batch that a step with `accumulate` takes: its rows in this many parts."""
    if accumulate == 1:
        return batch
    return {field: values.reshape(accumulate, -1, *values.shape[1:]) for field, values in batch.items()}


def near(ours: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Raises unless arrays are equal up to float32 rounding, relative to each array's largest value."""
    assert ours.keys() == wanted.keys()
    for path, values in wanted.items():
        scale = np.abs(values).max()
        assert scale > 0 and np.abs(np.asarray(ours[path]) - values).max() < tolerance * scale, path


@cache
def stepper(accumulate: int = 1, dropout: bool = False, z_loss: float = 0.0) -> Any:
    """A compiled step of `adapted_split`, made once for all tests."""
    return make_step(
        adapted_split().structure,
        GRADIENTS,
        schedule(RATES),
        seed=11,
        dropout=dropout,
        remat="none",
        accumulate=accumulate,
        z_loss=z_loss,
        sources=3,
    )


def gradient_of(step: Any, batch: Batch, split: Split | None = None) -> tuple[dict[str, np.ndarray], Metrics]:
    """The gradient that a step gives its optimizer, and the step's metrics."""
    split = split or adapted_split()
    state, metrics = step(initial_state(split.trainable, GRADIENTS), split.frozen, batch)
    return {path: np.asarray(values) for path, values in state.optimizer.items()}, metrics


ADAPTERS = {
    f"blocks.{part}.{name}.{factor}"
    for part, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down")))
    for name in names
    for factor in "ab"
}
NEW_ROWS = {"vocabulary.new", "vocabulary.output_new"}
