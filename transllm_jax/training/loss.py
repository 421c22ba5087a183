"""Cross-entropy over two vocabulary blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transllm_jax.model.layout import SINGLE, Layout
from transllm_jax.model.vocabulary import Padding
from transllm_jax.training.logits import (
    ChunkLoss,
    LogProbs,
    Options,
    Tables,
    log_probs,
    new_rows_of,
    objective,
    options_of,
)


def cross_entropy(
    hidden: jax.Array,
    base: jax.Array,
    new: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    chunk: int | None = None,
    *,
    train_base: bool = False,
    train_new: bool = True,
    padding: Padding = (),
    z_loss: float = 0.0,
    layout: Layout = SINGLE,
) -> tuple[jax.Array, jax.Array]:
    """The objective, a float32 scalar, and each token's weight * -log p(label) in nats, float32 [...].

    hidden [..., D], base [V, D], new [n, D] or None, labels and weights [...]. The objective is the sum over tokens of
    weight * (-log p(label) + z_loss * log(Z)^2), where Z is the softmax's denominator (arXiv 2204.02311). It is
    differentiable with respect to `hidden`, to `new` if `train_new`, and to `base` if `train_base`, whose gradient then
    takes [V, D] in float32. The tokens' losses are for reporting and have no gradient.
    New rows that are `padding` get no probability and a gradient of exactly 0.
    Chunks without a weighted token are skipped, so masked tokens cost almost nothing.
    Tables are cast to the dtype of the hidden states; their gradients have the dtype of the tables.
    On a mesh each device computes its own tokens of [B, T] with all-gathered tables; the gradient of a table is
    reduce-scattered to the table's sharding. Raises ValueError if the mesh does not divide B and T.
    """
    train_new = train_new and new is not None
    options = options_of(
        labels.shape, chunk, train_base=train_base, train_new=train_new, padding=padding, z_loss=z_loss, layout=layout
    )
    total, losses = objective(hidden, Tables(base, new), labels, weights, _of_chunk, options)
    return total, jax.lax.stop_gradient(losses)


def _of_chunk(
    h: jax.Array, tables: Tables, label: jax.Array, weight: jax.Array, options: Options, gradients: bool
) -> ChunkLoss:
    logp = log_probs(h, tables.base, new_rows_of(tables), options.padding)
    losses = -_chosen(logp, label)
    minimised = losses + options.z_loss * logp.log_z**2 if options.z_loss else losses
    found = _logit_gradients(logp, label, weight, options) if gradients else None
    return jnp.sum(minimised * weight), losses * weight, found


def _chosen(logp: LogProbs, label: jax.Array) -> jax.Array:
    """log p of the labels, [C]."""
    size = logp.base.shape[1]
    chosen = jnp.take_along_axis(logp.base, jnp.minimum(label, size - 1)[:, None], axis=-1)[:, 0]
    if logp.new.shape[1]:
        added = jnp.take_along_axis(logp.new, jnp.maximum(label - size, 0)[:, None], axis=-1)[:, 0]
        chosen = jnp.where(label < size, chosen, added)
    return chosen


def _logit_gradients(
    logp: LogProbs, label: jax.Array, weight: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """The gradients of the objective with respect to the logits of base rows [C, V] and new rows [C, n], float32."""
    scale = weight[:, None]
    of_base, of_new = jnp.exp(logp.base), jnp.exp(logp.new)
    if options.z_loss:
        # d log(Z)^2 / d logit = 2 log(Z) p
        factor = 1 + 2 * options.z_loss * logp.log_z[:, None]
        of_base, of_new = of_base * factor, of_new * factor
    # d loss / d logit = p - 1[label]
    size, rows = of_base.shape[1], of_new.shape[1]
    of_base = (of_base - (jnp.arange(size) == label[:, None])) * scale
    of_new = (of_new - (jnp.arange(size, size + rows) == label[:, None])) * scale
    return of_base, of_new
