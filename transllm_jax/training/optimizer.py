"""The learning-rate schedule and the optimizer, over the trainable arrays only.

The optimizer gives updates before the rate, and the step multiplies by it: the rate is a function of the step in the
training state, so nothing else has to be restored for it, and a skipped update delays no schedule.
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

# The rows of the vocabulary that train apart from the weights of the base.
_ROWS = ("vocabulary.new", "vocabulary.output_new", *BASE_ROWS)


@dataclass(frozen=True)
class OptimizerConfig:
    """`learning_rate` is the peak of adapters and weights; the vocabulary rows' is `new_rows_multiplier` times that.

    Those are the new rows, and the copies of base rows where they train. After `warmup_steps` the rate follows
    `schedule`: down to `final_fraction` of the peak at `steps`, as a half cosine or a line; `wsd` (arXiv 2404.06395)
    stays at the peak and falls as a line in the last `decay_steps`; `constant` stays.
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
    # The step at which the fall begins, and that at which it ends.
    start = config.steps - config.decay_steps if config.schedule == "wsd" else warmup
    end = max(config.steps, start + 1)

    def rate(step: jax.Array | int) -> jax.Array:
        fallen = jnp.clip((step - start) / (end - start), 0.0, 1.0)
        if config.schedule == "cosine":
            fallen = (1 - jnp.cos(jnp.pi * fallen)) / 2
        elif config.schedule == "constant":
            fallen = jnp.zeros_like(fallen)
        factor = 1 - (1 - config.final_fraction) * fallen
        # Not from 0: the first step would train nothing.
        risen = jnp.minimum((step + 1) / (warmup + 1), 1.0)
        return jnp.float32(peak) * jnp.where(step < warmup, risen, factor)

    return rate


def group(path: str) -> str:
    """The group of a trainable array: `new_rows` (and copies of base rows), `adapters`, or the base's own `weights`."""
    if path in _ROWS:
        return "new_rows"
    return "adapters" if path.endswith((".a", ".b")) else "weights"


def _decays(tree: Mapping[str, Any]) -> dict[str, bool]:
    """Which arrays weight decay shrinks: not the norms' scales, which are 1 in rest, nor biases."""
    return {path: not path.endswith((".scale", ".bias")) for path in tree}


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW with global-norm clipping for a flat dictionary of trainable arrays (path -> array), before the rate.

    What it gives is to be multiplied by minus the learning rate. Its `update` takes `finite`, a bool: where it is false
    the state stays as it is, bit for bit, and the update is to be thrown away. The moments are float32, as the arrays
    are; nothing is kept for frozen weights, which never get here.
    """

    def labels(tree: Mapping[str, Any]) -> dict[str, str]:
        return {path: group(path) for path in tree}

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
    """optax.scale_by_adam, to the bit, that keeps its state where the gradient is not `finite`."""
    adam = optax.scale_by_adam(beta1, beta2, eps=(eps := 1e-8))

    def update(
        gradient: Any, state: optax.ScaleByAdamState, params: Any = None, *, finite: Any = True, **extra: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        _, moved = adam.update(gradient, state)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        # Worked out from the moments that are kept: from others, both would be in memory, and these be copied first.
        mean, square = (optax.tree.bias_correction(*of, state.count) for of in ((state.mu, beta1), (state.nu, beta2)))
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), state

    return optax.GradientTransformationExtraArgs(adam.init, update)
