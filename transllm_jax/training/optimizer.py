"""The learning-rate schedule and the optimizer, over the trainable arrays only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax


@dataclass(frozen=True)
class OptimizerConfig:
    """`learning_rate` is the adapters' peak; the vocabulary rows' is `new_rows_multiplier` times that.

    Those are the new rows, and the base rows where they train.
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


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up, then a cosine down to `final_fraction` of the peak, in optimizer steps."""
    return optax.warmup_cosine_decay_schedule(
        # Not from 0: the first step would train nothing.
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def group(path: str) -> str:
    """The group of a trainable array: `new_rows`, all rows of the vocabulary that train, or `adapters`."""
    return "new_rows" if path.startswith("vocabulary.") else "adapters"


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with global-norm clipping for a flat dictionary of trainable arrays (path -> array).

    The moments are float32, as the arrays are; nothing is kept for frozen weights, which never get here.
    """

    def labels(tree: Mapping[str, Any]) -> dict[str, str]:
        return {path: group(path) for path in tree}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay),
        optax.partition({"adapters": optax.identity(), "new_rows": optax.scale(config.new_rows_multiplier)}, labels),
        optax.scale_by_learning_rate(schedule(config)),
    )


def moments_size(optimizer_state: Any) -> int:
    """The number of values in the optimizer's state, its scalars (step counts) aside."""
    return sum(leaf.size for leaf in jax.tree.leaves(optimizer_state) if leaf.ndim)
