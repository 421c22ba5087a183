"""Cross-entropy over two vocabulary blocks, in chunks of tokens: the full [tokens, vocabulary] logits never exist.

The gradient is computed in the forward pass, chunk by chunk, because that is where the logits are: with respect to the
hidden states and the new rows. Frozen base rows get none; those that train get theirs where `train_base` says so.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from transllm_jax.model.vocabulary import Padding, without

# Tokens a chunk: at V = 50,000 a chunk's float32 logits take 50 MB, small beside a step's activations.
CHUNK = 256


def cross_entropy(
    hidden: jax.Array,
    base: jax.Array,
    new: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    chunk: int = CHUNK,
    *,
    train_base: bool = False,
    padding: Padding = (),
) -> jax.Array:
    """The sum over tokens of weight * -log p(label), in nats, float32.

    hidden [..., D], base [V, D], new [n, D] or None, labels and weights [...]. Differentiable in `hidden` and `new`,
    and with `train_base` in `base`, whose gradient then takes [V, D] in float32 (without, `base` gets none).
    Of the new rows, those that are `padding` get no probability, and a gradient of exactly 0.
    A chunk without a weighted token is skipped, so masked tokens cost nothing where they stand together.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
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
    return _cross_entropy(flat[order], base, new, labels[order], weights[order], chunk, train_base, padding)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _cross_entropy(
    hidden: jax.Array,
    base: jax.Array,
    new: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    chunk: int,
    train_base: bool,
    padding: Padding,
) -> jax.Array:
    def body(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        h, label, weight = inputs

        def compute() -> jax.Array:
            _, _, losses = _log_sum_exp(h, base, new, label, padding)
            return jnp.sum(losses * weight)

        return total + jax.lax.cond(jnp.any(weight > 0), compute, lambda: jnp.float32(0)), None

    total, _ = jax.lax.scan(body, jnp.float32(0), _chunks(chunk, hidden, labels, weights))
    return total


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(array.reshape(-1, chunk, *array.shape[1:]) for array in arrays)


def _log_sum_exp(
    h: jax.Array, base: jax.Array, new: jax.Array, label: jax.Array, padding: Padding
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits of both blocks less the log-sum-exp of both together, and -log p of the label: [C, V], [C, n], [C]."""
    size = base.shape[0]
    left = jnp.einsum("CD,VD->CV", h, base, preferred_element_type=jnp.float32)
    right = jnp.einsum("CD,VD->CV", h, new, preferred_element_type=jnp.float32)
    right = without(right, padding, size)
    peak = jnp.max(left, axis=-1)
    if new.shape[0]:
        peak = jnp.maximum(peak, jnp.max(right, axis=-1))
    peak = peak[:, None]
    total = jnp.sum(jnp.exp(left - peak), axis=-1) + jnp.sum(jnp.exp(right - peak), axis=-1)
    normaliser = peak + jnp.log(total)[:, None]
    left, right = left - normaliser, right - normaliser
    chosen = jnp.take_along_axis(left, jnp.minimum(label, size - 1)[:, None], axis=-1)[:, 0]
    if new.shape[0]:
        added = jnp.take_along_axis(right, jnp.maximum(label - size, 0)[:, None], axis=-1)[:, 0]
        chosen = jnp.where(label < size, chosen, added)
    return left, right, -chosen


# The losses' sum, the gradient of the new rows [n, D], and that of the base rows [V, D], None where they are frozen.
_Sums = tuple[jax.Array, jax.Array, jax.Array | None]


def _forward(
    hidden: jax.Array,
    base: jax.Array,
    new: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    chunk: int,
    train_base: bool,
    padding: Padding,
) -> tuple[jax.Array, _Sums]:
    size = base.shape[0]

    def body(carry: _Sums, inputs: tuple[jax.Array, ...]) -> tuple[_Sums, jax.Array]:
        h, label, weight = inputs
        table = carry[2]

        def compute() -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
            left, right, losses = _log_sum_exp(h, base, new, label, padding)
            scale = weight[:, None]
            # d loss / d logit = p - 1[label]
            left = (jnp.exp(left) - (jnp.arange(size) == label[:, None])) * scale
            right = (jnp.exp(right) - (jnp.arange(size, size + new.shape[0]) == label[:, None])) * scale
            left, right = left.astype(base.dtype), right.astype(base.dtype)
            slope = left @ base + right @ new
            rows = _outer(right, h)
            # Added here, not below as the new rows' are: a skipped chunk does not pass over the whole table.
            grown = None if table is None else table + _outer(left, h)
            return jnp.sum(losses * weight), rows, grown, slope.astype(h.dtype)

        def skip() -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
            return jnp.float32(0), jnp.zeros(new.shape, jnp.float32), table, jnp.zeros_like(h)

        loss, rows, grown, slope = jax.lax.cond(jnp.any(weight > 0), compute, skip)
        return (carry[0] + loss, carry[1] + rows, grown), slope

    table = jnp.zeros(base.shape, jnp.float32) if train_base else None
    start = (jnp.float32(0), jnp.zeros(new.shape, jnp.float32), table)
    (total, rows, table), slopes = jax.lax.scan(body, start, _chunks(chunk, hidden, labels, weights))
    table = None if table is None else table.astype(base.dtype)
    return total, (slopes.reshape(hidden.shape), rows.astype(new.dtype), table)


def _outer(slopes: jax.Array, h: jax.Array) -> jax.Array:
    """The gradient of rows: slopes of their logits [C, V] and states [C, D] -> float32 [V, D]."""
    return jnp.einsum("CV,CD->VD", slopes, h, preferred_element_type=jnp.float32)


def _backward(
    chunk: int, train_base: bool, padding: Padding, residuals: _Sums, g: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array, None, None]:
    slope, rows, table = residuals
    of_base = None if table is None else table * g.astype(table.dtype)
    return slope * g.astype(slope.dtype), of_base, rows * g.astype(rows.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)
