"""Cross-entropy over two vocabulary blocks, in chunks of tokens: the full [tokens, vocabulary] logits never exist.

The gradient is computed in the forward pass, chunk by chunk, because that is where the logits are: with respect to the
hidden states and to those of the two blocks that train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transllm_jax.model.layout import AXES, SINGLE, Layout, sum_scattered
from transllm_jax.model.vocabulary import Padding, mask_padding

# Tokens a chunk: at V = 50,000 a chunk's float32 logits take 50 MB, small beside a step's activations. On accelerators
# more: each chunk passes over the gradient of the new rows.
CHUNK, LARGE_CHUNK = 256, 1024
# How an axis of the tables is cut, and how tokens [B, T] are.
_TABLE, _TOKENS = ("fsdp", "tensor"), PartitionSpec(("data", "fsdp"), "tensor")


class _Options(NamedTuple):
    """What is known when the program is compiled."""

    chunk: int
    train_base: bool
    train_new: bool
    padding: Padding
    z_loss: float
    layout: Layout


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
    weight * (-log p(label) + z_loss * log(Z)^2), Z being the softmax's denominator (arXiv 2204.02311). It is
    differentiable in `hidden`, in `new` with `train_new`, and in `base` with `train_base`, whose gradient then takes
    [V, D] in float32; without these they get none, nor do the tokens' losses, which are for reading.
    Of the new rows, those that are `padding` get no probability, and a gradient of exactly 0.
    A chunk without a weighted token is skipped, so masked tokens cost nothing where they stand together.
    Tables are rounded to the type of the hidden states, and their gradients are as the tables are.
    On a mesh each device takes its own tokens of [B, T], with whole tables that are gathered for it, and the gradient
    of a table is summed into where the table is kept. Raises ValueError where the mesh does not divide B and T.
    """
    if chunk is None:
        chunk = CHUNK if layout.platform == "cpu" else LARGE_CHUNK
    if layout.mesh is not None and (
        labels.shape[0] % layout.batch_parts or labels.shape[1] % layout.size("tensor") or labels.ndim != 2
    ):
        raise ValueError(f"labels {labels.shape} are not divided by the mesh {dict(layout.mesh.shape)}")
    options = _Options(chunk, train_base, train_new and new is not None, padding, z_loss, layout)
    total, losses = _cross_entropy(hidden, base, new, labels, weights, options)
    return total, jax.lax.stop_gradient(losses)


# The gradients of the objective: hidden states, base rows [V, D] and new rows [n, D]; None where rows do not train.
_Slopes = tuple[jax.Array, jax.Array | None, jax.Array | None]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cross_entropy(
    hidden: jax.Array, base: jax.Array, new: jax.Array | None, labels: jax.Array, weights: jax.Array, options: _Options
) -> tuple[jax.Array, jax.Array]:
    return _on_all_devices(_value, hidden, base, new, labels, weights, options)[0]


def _forward(
    hidden: jax.Array, base: jax.Array, new: jax.Array | None, labels: jax.Array, weights: jax.Array, options: _Options
) -> tuple[tuple[jax.Array, jax.Array], _Slopes]:
    found, (of_hidden, of_base, of_new) = _on_all_devices(
        _value_and_slopes, hidden, base, new, labels, weights, options
    )
    # Rounded once, after the sum over devices.
    of_base = None if of_base is None else of_base.astype(base.dtype)
    of_new = None if of_new is None or new is None else of_new.astype(new.dtype)
    return found, (of_hidden, of_base, of_new)


def _backward(
    options: _Options, slopes: _Slopes, g: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None, None, None]:
    of_hidden, of_base, of_new = (None if slope is None else slope * g[0].astype(slope.dtype) for slope in slopes)
    return of_hidden, of_base, of_new, None, None


_cross_entropy.defvjp(_forward, _backward)

_Result = tuple[tuple[jax.Array, jax.Array], _Slopes]


def _on_all_devices(
    local: Callable[..., Any],
    hidden: jax.Array,
    base: jax.Array,
    new: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    options: _Options,
) -> _Result:
    """`local` of each device's tokens, with whole tables, and sums over the devices of what is one for all."""
    mesh = options.layout.mesh
    if mesh is None:
        new = None if new is None else new.astype(hidden.dtype)
        return local(hidden, base.astype(hidden.dtype), new, labels, weights, options)

    def whole(table: jax.Array | None) -> jax.Array | None:
        if table is None:
            return None
        return jax.lax.all_gather(table.astype(hidden.dtype), _TABLE, axis=1, tiled=True)

    parts = options.layout.size(*_TABLE)

    def summed(table: jax.Array | None) -> jax.Array | None:
        if table is None:
            return None
        by_part = table.reshape(table.shape[0], parts, -1).swapaxes(0, 1)
        return jax.lax.psum(sum_scattered(by_part, _TABLE), "data")

    def device(
        hidden: jax.Array, base: jax.Array, new: jax.Array | None, labels: jax.Array, weights: jax.Array
    ) -> _Result:
        (total, losses), slopes = local(hidden, whole(base), whole(new), labels, weights, options)
        slope, of_base, of_new = slopes
        return (jax.lax.psum(total, AXES), losses), (slope, summed(of_base), summed(of_new))

    table, states = PartitionSpec(None, _TABLE), PartitionSpec(*_TOKENS, None)
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(states, table, table, _TOKENS, _TOKENS),
        out_specs=((PartitionSpec(), _TOKENS), (states, table, table)),
        check_vma=False,
    )(hidden, base, new, labels, weights)


class _Chunks(NamedTuple):
    """Tokens in chunks: states [n, C, D], labels and weights [n, C], and the token at each of their places."""

    hidden: jax.Array
    labels: jax.Array
    weights: jax.Array
    order: jax.Array

    def back(self, values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Values by chunk [n, C, ..] in the tokens' own order, as [*shape, ..]."""
        flat = values.reshape(-1, *values.shape[2:])
        size = math.prod(shape)
        return (
            jnp.zeros_like(flat).at[self.order].set(flat, unique_indices=True)[:size].reshape(*shape, *flat.shape[1:])
        )


def _chunks(hidden: jax.Array, labels: jax.Array, weights: jax.Array, chunk: int) -> _Chunks:
    flat = hidden.reshape(-1, hidden.shape[-1])
    tokens = flat.shape[0]
    chunk = min(chunk, tokens)
    room = -tokens % chunk
    flat = jnp.pad(flat, ((0, room), (0, 0)))
    labels = jnp.pad(labels.reshape(-1), (0, room))
    weights = jnp.pad(weights.reshape(-1).astype(jnp.float32), (0, room))
    # Weighted tokens first: the chunks that remain hold none and are skipped.
    order = jnp.argsort(weights <= 0, stable=True)
    states, chosen, of = (array[order].reshape(-1, chunk, *array.shape[1:]) for array in (flat, labels, weights))
    return _Chunks(states, chosen, of, order)


def _value(
    hidden: jax.Array, base: jax.Array, new: jax.Array | None, labels: jax.Array, weights: jax.Array, options: _Options
) -> tuple[tuple[jax.Array, jax.Array], tuple[None, None, None]]:
    """The objective and the losses, and nothing of a gradient."""
    new = jnp.zeros((0, base.shape[1]), base.dtype) if new is None else new
    chunks = _chunks(hidden, labels, weights, options.chunk)

    def body(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h, label, weight = inputs

        def compute() -> tuple[jax.Array, jax.Array]:
            logits = _log_sum_exp(h, base, new, label, options.padding)
            return _objective(logits, weight, options), logits.losses * weight

        def skip() -> tuple[jax.Array, jax.Array]:
            return jnp.float32(0), jnp.zeros_like(weight)

        value, losses = jax.lax.cond(jnp.any(weight > 0), compute, skip)
        return total + value, losses

    total, losses = jax.lax.scan(body, jnp.float32(0), chunks[:3])
    return (total, chunks.back(losses, labels.shape)), (None, None, None)


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
    right = mask_padding(right, padding, size)
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


# The objective so far, and the gradients of new rows and base rows so far.
_Carry = tuple[jax.Array, jax.Array | None, jax.Array | None]


def _value_and_slopes(
    hidden: jax.Array, base: jax.Array, new: jax.Array | None, labels: jax.Array, weights: jax.Array, options: _Options
) -> _Result:
    """The objective and the losses, and the objective's gradients; of tables in float32, to be summed."""
    new = jnp.zeros((0, base.shape[1]), base.dtype) if new is None else new
    chunks = _chunks(hidden, labels, weights, options.chunk)
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
            # Added here: a skipped chunk does not pass over the tables.
            new_rows = None if rows is None else rows + _outer(right, h)
            grown = None if table is None else table + _outer(left, h)
            return _objective(logits, weight, options), logits.losses * weight, new_rows, grown, slope.astype(h.dtype)

        def skip() -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array]:
            return jnp.float32(0), jnp.zeros_like(weight), rows, table, jnp.zeros_like(h)

        value, losses, new_rows, grown, slope = jax.lax.cond(jnp.any(weight > 0), compute, skip)
        return (total + value, new_rows, grown), (losses, slope)

    rows = jnp.zeros(new.shape, jnp.float32) if options.train_new else None
    table = jnp.zeros(base.shape, jnp.float32) if options.train_base else None
    (total, rows, table), (losses, slopes) = jax.lax.scan(body, (jnp.float32(0), rows, table), chunks[:3])
    shape = labels.shape
    return (total, chunks.back(losses, shape)), (chunks.back(slopes, shape), table, rows)


def _outer(slopes: jax.Array, h: jax.Array) -> jax.Array:
    """The gradient of rows: slopes of their logits [C, V] and states [C, D] -> float32 [V, D]."""
    return jnp.einsum("CV,CD->VD", slopes, h, preferred_element_type=jnp.float32)
