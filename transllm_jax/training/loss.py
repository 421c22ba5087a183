"""Cross-entropy over two vocabulary blocks, in chunks of tokens: the full [tokens, vocabulary] logits never exist.

The gradient is computed in the forward pass, chunk by chunk, because that is where the logits are: with respect to the
hidden states and to those of the two blocks that train.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transllm_jax.model.vocabulary import Padding, without

# Tokens a chunk: at V = 50,000 a chunk's float32 logits take 50 MB, small beside a step's activations.
CHUNK = 256


class _Options(NamedTuple):
    """What is known when the program is compiled."""

    chunk: int
    train_base: bool
    train_new: bool
    padding: Padding
    z_loss: float


def cross_entropy(
    hidden: jax.Array,
    base: jax.Array,
    new: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    chunk: int = CHUNK,
    *,
    train_base: bool = False,
    train_new: bool = True,
    padding: Padding = (),
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """The objective, a float32 scalar, and each token's weight * -log p(label) in nats, float32 [...].

    hidden [..., D], base [V, D], new [n, D] or None, labels and weights [...]. The objective is the sum over tokens of
    weight * (-log p(label) + z_loss * log(Z)^2), Z being the softmax's denominator (arXiv 2204.02311). It is
    differentiable in `hidden`, in `new` with `train_new`, and in `base` with `train_base`, whose gradient then takes
    [V, D] in float32; without these they get none, nor do the tokens' losses, which are for reading.
    Of the new rows, those that are `padding` get no probability, and a gradient of exactly 0.
    A chunk without a weighted token is skipped, so masked tokens cost nothing where they stand together.
    """
    shape = labels.shape
    flat = hidden.reshape(-1, hidden.shape[-1])
    train_new = train_new and new is not None
    if new is None:
        new = jnp.zeros((0, base.shape[1]), base.dtype)
    tokens = flat.shape[0]
    chunk = min(chunk, tokens)
    room = -tokens % chunk
    flat = jnp.pad(flat, ((0, room), (0, 0)))
    labels = jnp.pad(labels.reshape(-1), (0, room))
    weights = jnp.pad(weights.reshape(-1).astype(jnp.float32), (0, room))
    # Weighted tokens first: the chunks that remain hold none and are skipped.
    order = jnp.argsort(weights <= 0, stable=True)
    options = _Options(chunk, train_base, train_new, padding, z_loss)
    total, losses = _cross_entropy(flat[order], base, new, labels[order], weights[order], options)
    given = jnp.zeros_like(losses).at[order].set(losses, unique_indices=True)
    return total, jax.lax.stop_gradient(given[:tokens].reshape(shape))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cross_entropy(
    hidden: jax.Array, base: jax.Array, new: jax.Array, labels: jax.Array, weights: jax.Array, options: _Options
) -> tuple[jax.Array, jax.Array]:
    def body(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h, label, weight = inputs

        def compute() -> tuple[jax.Array, jax.Array]:
            logits = _log_sum_exp(h, base, new, label, options.padding)
            return _objective(logits, weight, options), logits.losses * weight

        def skip() -> tuple[jax.Array, jax.Array]:
            return jnp.float32(0), jnp.zeros_like(weight)

        value, losses = jax.lax.cond(jnp.any(weight > 0), compute, skip)
        return total + value, losses

    total, losses = jax.lax.scan(body, jnp.float32(0), _chunks(options.chunk, hidden, labels, weights))
    return total, losses.reshape(-1)


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(array.reshape(-1, chunk, *array.shape[1:]) for array in arrays)


class _Logits(NamedTuple):
    """Of a chunk's tokens: log p of base rows [C, V] and new rows [C, n], log(Z) [C], -log p of the labels [C]."""

    left: jax.Array
    right: jax.Array
    log_z: jax.Array
    losses: jax.Array


def _log_sum_exp(h: jax.Array, base: jax.Array, new: jax.Array, label: jax.Array, padding: Padding) -> _Logits:
    size = base.shape[0]
    left = jnp.einsum("CD,VD->CV", h, base, preferred_element_type=jnp.float32)
    right = jnp.einsum("CD,VD->CV", h, new, preferred_element_type=jnp.float32)
    right = without(right, padding, size)
    peak = jnp.max(left, axis=-1)
    if new.shape[0]:
        peak = jnp.maximum(peak, jnp.max(right, axis=-1))
    peak = peak[:, None]
    total = jnp.sum(jnp.exp(left - peak), axis=-1) + jnp.sum(jnp.exp(right - peak), axis=-1)
    log_z = peak + jnp.log(total)[:, None]
    left, right = left - log_z, right - log_z
    chosen = jnp.take_along_axis(left, jnp.minimum(label, size - 1)[:, None], axis=-1)[:, 0]
    if new.shape[0]:
        added = jnp.take_along_axis(right, jnp.maximum(label - size, 0)[:, None], axis=-1)[:, 0]
        chosen = jnp.where(label < size, chosen, added)
    return _Logits(left, right, log_z[:, 0], -chosen)


def _objective(logits: _Logits, weight: jax.Array, options: _Options) -> jax.Array:
    losses = logits.losses
    if options.z_loss:
        losses = losses + options.z_loss * logits.log_z**2
    return jnp.sum(losses * weight)


# The gradients of the objective: hidden states, base rows [V, D] and new rows [n, D]; None where rows do not train.
_Slopes = tuple[jax.Array, jax.Array | None, jax.Array | None]
# The objective so far, and the gradients of new rows and base rows so far.
_Carry = tuple[jax.Array, jax.Array | None, jax.Array | None]


def _forward(
    hidden: jax.Array, base: jax.Array, new: jax.Array, labels: jax.Array, weights: jax.Array, options: _Options
) -> tuple[tuple[jax.Array, jax.Array], _Slopes]:
    size = base.shape[0]

    def body(carry: _Carry, inputs: tuple[jax.Array, ...]) -> tuple[_Carry, tuple[jax.Array, jax.Array]]:
        h, label, weight = inputs
        total, rows, table = carry

        def compute() -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array]:
            logits = _log_sum_exp(h, base, new, label, options.padding)
            scale = weight[:, None]
            left, right = jnp.exp(logits.left), jnp.exp(logits.right)
            if options.z_loss:
                # d log(Z)^2 / d logit = 2 log(Z) p
                factor = 1 + 2 * options.z_loss * logits.log_z[:, None]
                left, right = left * factor, right * factor
            # d loss / d logit = p - 1[label]
            left = (left - (jnp.arange(size) == label[:, None])) * scale
            right = (right - (jnp.arange(size, size + new.shape[0]) == label[:, None])) * scale
            left, right = left.astype(base.dtype), right.astype(base.dtype)
            slope = left @ base + right @ new
            of_rows = None if rows is None else _outer(right, h)
            # Added here, not below as the new rows' are: a skipped chunk does not pass over the whole table.
            grown = None if table is None else table + _outer(left, h)
            return _objective(logits, weight, options), logits.losses * weight, of_rows, grown, slope.astype(h.dtype)

        def skip() -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array]:
            of_rows = None if rows is None else jnp.zeros_like(rows)
            return jnp.float32(0), jnp.zeros_like(weight), of_rows, table, jnp.zeros_like(h)

        value, losses, of_rows, grown, slope = jax.lax.cond(jnp.any(weight > 0), compute, skip)
        return (total + value, None if rows is None else rows + of_rows, grown), (losses, slope)

    rows = jnp.zeros(new.shape, jnp.float32) if options.train_new else None
    table = jnp.zeros(base.shape, jnp.float32) if options.train_base else None
    (total, rows, table), (losses, slopes) = jax.lax.scan(
        body, (jnp.float32(0), rows, table), _chunks(options.chunk, hidden, labels, weights)
    )
    of_base = None if table is None else table.astype(base.dtype)
    of_new = None if rows is None else rows.astype(new.dtype)
    return (total, losses.reshape(-1)), (slopes.reshape(hidden.shape), of_base, of_new)


def _outer(slopes: jax.Array, h: jax.Array) -> jax.Array:
    """The gradient of rows: slopes of their logits [C, V] and states [C, D] -> float32 [V, D]."""
    return jnp.einsum("CV,CD->VD", slopes, h, preferred_element_type=jnp.float32)


def _backward(
    options: _Options, slopes: _Slopes, g: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None, None, None]:
    of_hidden, of_base, of_new = (None if slope is None else slope * g[0].astype(slope.dtype) for slope in slopes)
    return of_hidden, of_base, of_new, None, None


_cross_entropy.defvjp(_forward, _backward)
