"""The learning-rate schedule and the optimizer, over the trainable arrays only.

The optimizer returns updates that the training step multiplies by the learning rate. The rate is a function of the step
number in the training state: a checkpoint needs nothing else for it, and a skipped update does not delay the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transllm_jax.choices import Schedule
from transllm_jax.model.parameters import BASE_ROWS

# Optimizer steps done so far -> the learning rate of the next, float32; usable inside a JAX transform.
Rate = Callable[[jax.Array | int], jax.Array]

# The vocabulary rows that train: the new rows, and copies of the base rows.
_ROWS = ("vocabulary.new", "vocabulary.output_new", *BASE_ROWS)


@dataclass(frozen=True)
class OptimizerConfig:
    """`learning_rate` is the peak of adapters and weights; the vocabulary rows' is `new_rows_multiplier` times that.

    Vocabulary rows are the new rows, and the copies of base rows if they train. After `warmup_steps` the rate follows
    `schedule`: `cosine` and `linear` fall to `final_fraction` of the peak at `steps`; `wsd` (arXiv 2404.06395) stays at
    the peak and falls linearly to it in the last `decay_steps`; `constant` stays at the peak.
    """

    learning_rate: float
    steps: int
    warmup_steps: int
    final_fraction: float = 0.1
    new_rows_multiplier: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    schedule: Schedule = "cosine"
    decay_steps: int = 0

    def __post_init__(self) -> None:
        if self.schedule == "wsd" and not 1 <= self.decay_steps <= self.steps - self.warmup_steps:
            raise ValueError(
                f"decay_steps is {self.decay_steps}; schedule wsd wants 1 to {self.steps - self.warmup_steps}, "
                "the steps after the warm-up"
            )


def schedule(config: OptimizerConfig) -> Rate:
    """The learning rate by step: linear warm-up, then what `config.schedule` says."""
    warmup, peak = config.warmup_steps, config.learning_rate
    # The steps at which the decay begins and ends.
    start = config.steps - config.decay_steps if config.schedule == "wsd" else warmup
    end = max(config.steps, start + 1)

    def rate(step: jax.Array | int) -> jax.Array:
        fallen = jnp.clip((step - start) / (end - start), 0.0, 1.0)
        if config.schedule == "cosine":
            fallen = (1 - jnp.cos(jnp.pi * fallen)) / 2
        elif config.schedule == "constant":
            fallen = jnp.zeros_like(fallen)
        factor = 1 - (1 - config.final_fraction) * fallen
        # The warm-up does not start from 0: the first step would train nothing.
        risen = jnp.minimum((step + 1) / (warmup + 1), 1.0)
        return jnp.float32(peak) * jnp.where(step < warmup, risen, factor)

    return rate


def parameter_group(path: str) -> str:
    """The group of a trainable array: `new_rows` (and copies of base rows), `adapters`, or the base's own `weights`."""
    if path in _ROWS:
        return "new_rows"
    return "adapters" if path.endswith((".a", ".b")) else "weights"


def _decays(tree: Mapping[str, Any]) -> dict[str, bool]:
    """Which arrays weight decay shrinks: all but biases and the norms' scales, whose neutral value is 1."""
    return {path: not path.endswith((".scale", ".bias")) for path in tree}


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW with global-norm clipping, without the learning rate, for a flat dictionary (path -> trainable array).

    The caller multiplies the updates by minus the learning rate. `update` takes `finite`, a bool: if it is false, the
    state stays as it is, bit for bit, and the caller must discard the update. The moments are float32, like the arrays.
    """

    def labels(tree: Mapping[str, Any]) -> dict[str, str]:
        return {path: parameter_group(path) for path in tree}

    scales = {
        "adapters": optax.identity(),
        "new_rows": optax.scale(config.new_rows_multiplier),
        "weights": optax.identity(),
    }
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask=_decays),
        optax.partition(scales, labels),
    )


def _adam(beta1: float, beta2: float) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, bit for bit, but its state does not change if the gradient is not `finite`."""
    adam = optax.scale_by_adam(beta1, beta2, eps=(eps := 1e-8))

    def update(
        gradient: Any, state: optax.ScaleByAdamState, params: Any = None, *, finite: Any = True, **extra: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        _, moved = adam.update(gradient, state)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        # Computed from the moments that are kept. From `moved`, both would be in memory at once, after a copy.
        mean, square = (optax.tree.bias_correction(*of, state.count) for of in ((state.mu, beta1), (state.nu, beta2)))
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), state

    return optax.GradientTransformationExtraArgs(adam.init, update)
