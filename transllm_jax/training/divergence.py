"""KL divergence from the original model to the trained one, token by token, over the base vocabulary.

The teacher's distribution has no new tokens, so probability that the trained model gives to these counts as lost.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transllm_jax.model.layout import SINGLE, Layout
from transllm_jax.model.vocabulary import Padding
from transllm_jax.training.logits import (
    ChunkLoss,
    Options,
    Tables,
    log_probs,
    new_rows_of,
    objective,
    options_of,
)


def divergence(
    hidden: jax.Array,
    teacher: jax.Array,
    base: jax.Array,
    new: jax.Array | None,
    original: jax.Array | None,
    weights: jax.Array,
    chunk: int | None = None,
    *,
    train_base: bool = False,
    train_new: bool = True,
    padding: Padding = (),
    layout: Layout = SINGLE,
) -> tuple[jax.Array, jax.Array]:
    """The sum over tokens of weight * KL(teacher || student) in nats, a float32 scalar, and each token's part, [...].

    hidden and teacher [..., D]: the states of the trained and of the original model that predict the same token;
    base [V, D], new [n, D] or None: the output rows of the trained model; original [V, D]: those of the original model,
    or None if they are `base`; weights [...]. Gradients, chunks and meshes are those of `loss.cross_entropy`; the
    teacher has no gradient.
    """
    train_new = train_new and new is not None
    options = options_of(
        weights.shape, chunk, train_base=train_base, train_new=train_new, padding=padding, z_loss=0.0, layout=layout
    )
    original = None if original is None else jax.lax.stop_gradient(original)
    total, losses = objective(
        hidden, Tables(base, new, original), jax.lax.stop_gradient(teacher), weights, _of_chunk, options
    )
    return total, jax.lax.stop_gradient(losses)


def _of_chunk(
    h: jax.Array, tables: Tables, teacher: jax.Array, weight: jax.Array, options: Options, gradients: bool
) -> ChunkLoss:
    original = tables.base if tables.original is None else tables.original
    scores = jnp.einsum("CD,VD->CV", teacher, original, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(scores, axis=-1)
    p, log_q = jnp.exp(log_p), log_probs(h, tables.base, new_rows_of(tables), options.padding)
    losses = jnp.sum(p * (log_p - log_q.base), axis=-1) * weight
    if not gradients:
        return jnp.sum(losses), losses, None
    # d KL / d logit = q - p, where p of a new token is 0.
    scale = weight[:, None]
    return jnp.sum(losses), losses, ((jnp.exp(log_q.base) - p) * scale, jnp.exp(log_q.new) * scale)
