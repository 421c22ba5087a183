"""Cross-entropy over two vocabulary blocks, in chunks of tokens: the full [tokens, vocabulary] logits never exist.

The gradient is computed in the forward pass, chunk by chunk, because the logits exist only there. It is taken with
respect to the hidden states and to each of the two blocks that trains.
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

# Tokens per chunk. At V = 50,000 the float32 logits of 256 tokens take 50 MB, little next to a step's activations.
# Accelerators take larger chunks, because each chunk reads and writes the whole gradient of the new rows.
CHUNK, LARGE_CHUNK = 256, 1024
# The mesh axes over which the tables' axis D is sharded, and the sharding of tokens [B, T].
_TABLE, _TOKENS = ("fsdp", "tensor"), PartitionSpec(("data", "fsdp"), "tensor")


class _LossOptions(NamedTuple):
    """Compile-time options; see `cross_entropy`."""

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
    weight * (-log p(label) + z_loss * log(Z)^2), where Z is the softmax's denominator (arXiv 2204.02311). It is
    differentiable with respect to `hidden`, to `new` if `train_new`, and to `base` if `train_base`, whose gradient then
    takes [V, D] in float32. The tokens' losses are for reporting and have no gradient.
    New rows that are `padding` get no probability and a gradient of exactly 0.
    Chunks without a weighted token are skipped, so masked tokens cost almost nothing.
    Tables are cast to the dtype of the hidden states; their gradients have the dtype of the tables.
    On a mesh each device computes its own tokens of [B, T] with all-gathered tables; the gradient of a table is
    reduce-scattered to the table's sharding. Raises ValueError if the mesh does not divide B and T.
    """
    if chunk is None:
        chunk = CHUNK if layout.platform == "cpu" else LARGE_CHUNK
    if layout.mesh is not None and (
        labels.shape[0] % layout.batch_parts or labels.shape[1] % layout.size("tensor") or labels.ndim != 2
    ):
        raise ValueError(f"labels {labels.shape} are not divided by the mesh {dict(layout.mesh.shape)}")
    options = _LossOptions(chunk, train_base, train_new and new is not None, padding, z_loss, layout)
    total, losses = _cross_entropy(hidden, base, new, labels, weights, options)
    return total, jax.lax.stop_gradient(losses)


# The gradients of the objective: hidden states, base rows [V, D] and new rows [n, D]; None for rows that do not train.
_Gradients = tuple[jax.Array, jax.Array | None, jax.Array | None]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cross_entropy(
    hidden: jax.Array,
    base: jax.Array,
    new: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    options: _LossOptions,
) -> tuple[jax.Array, jax.Array]:
    return _on_all_devices(_loss, hidden, base, new, labels, weights, options)[0]


def _forward(
    hidden: jax.Array,
    base: jax.Array,
    new: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    options: _LossOptions,
) -> tuple[tuple[jax.Array, jax.Array], _Gradients]:
    result, (d_hidden, d_base, d_new) = _on_all_devices(
        _loss_and_gradients, hidden, base, new, labels, weights, options
    )
    # Rounded once, after the sum over devices.
    d_base = None if d_base is None else d_base.astype(base.dtype)
    d_new = None if d_new is None or new is None else d_new.astype(new.dtype)
    return result, (d_hidden, d_base, d_new)


def _backward(
    options: _LossOptions, gradients: _Gradients, g: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None, None, None]:
    d_hidden, d_base, d_new = (None if d is None else d * g[0].astype(d.dtype) for d in gradients)
    return d_hidden, d_base, d_new, None, None


_cross_entropy.defvjp(_forward, _backward)

_Result = tuple[tuple[jax.Array, jax.Array], _Gradients]


def _on_all_devices(
    local: Callable[..., Any],
    hidden: jax.Array,
    base: jax.Array,
    new: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    options: _LossOptions,
) -> _Result:
    """Run `local` on each device's tokens with whole tables; the objective and the tables' gradients are summed."""
    mesh = options.layout.mesh
    if mesh is None:
        new = None if new is None else new.astype(hidden.dtype)
        return local(hidden, base.astype(hidden.dtype), new, labels, weights, options)

    def gathered(table: jax.Array | None) -> jax.Array | None:
        if table is None:
            return None
        return jax.lax.all_gather(table.astype(hidden.dtype), _TABLE, axis=1, tiled=True)

    parts = options.layout.size(*_TABLE)

    def scattered(gradient: jax.Array | None) -> jax.Array | None:
        if gradient is None:
            return None
        by_part = gradient.reshape(gradient.shape[0], parts, -1).swapaxes(0, 1)
        return jax.lax.psum(sum_scattered(by_part, _TABLE), "data")

    def device(
        hidden: jax.Array, base: jax.Array, new: jax.Array | None, labels: jax.Array, weights: jax.Array
    ) -> _Result:
        (total, losses), gradients = local(hidden, gathered(base), gathered(new), labels, weights, options)
        d_hidden, d_base, d_new = gradients
        return (jax.lax.psum(total, AXES), losses), (d_hidden, scattered(d_base), scattered(d_new))

    table, states = PartitionSpec(None, _TABLE), PartitionSpec(*_TOKENS, None)
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(states, table, table, _TOKENS, _TOKENS),
        out_specs=((PartitionSpec(), _TOKENS), (states, table, table)),
        check_vma=False,
    )(hidden, base, new, labels, weights)


class _Chunks(NamedTuple):
    """Tokens in n chunks of C: states [n, C, D], labels and weights [n, C]; order [n * C]: the token at each place."""

    hidden: jax.Array
    labels: jax.Array
    weights: jax.Array
    order: jax.Array

    def undo(self, values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Values by chunk [n, C, ..], put back in the tokens' original order, as [*shape, ..]."""
        flat = values.reshape(-1, *values.shape[2:])
        in_order = jnp.zeros_like(flat).at[self.order].set(flat, unique_indices=True)
        return in_order[: math.prod(shape)].reshape(*shape, *flat.shape[1:])


def _chunks(hidden: jax.Array, labels: jax.Array, weights: jax.Array, chunk: int) -> _Chunks:
    flat = hidden.reshape(-1, hidden.shape[-1])
    tokens = flat.shape[0]
    chunk = min(chunk, tokens)
    room = -tokens % chunk
    flat = jnp.pad(flat, ((0, room), (0, 0)))
    labels = jnp.pad(labels.reshape(-1), (0, room))
    weights = jnp.pad(weights.reshape(-1).astype(jnp.float32), (0, room))
    # Weighted tokens come first, so that the last chunks have none and are skipped.
    order = jnp.argsort(weights <= 0, stable=True)
    states, labels, weights = (array[order].reshape(-1, chunk, *array.shape[1:]) for array in (flat, labels, weights))
    return _Chunks(states, labels, weights, order)


def _loss(
    hidden: jax.Array,
    base: jax.Array,
    new: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    options: _LossOptions,
) -> tuple[tuple[jax.Array, jax.Array], tuple[None, None, None]]:
    """The objective and each token's loss, without gradients."""
    new = jnp.zeros((0, base.shape[1]), base.dtype) if new is None else new
    chunks = _chunks(hidden, labels, weights, options.chunk)

    def body(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h, label, weight = inputs

        def compute() -> tuple[jax.Array, jax.Array]:
            logp = _log_probs(h, base, new, label, options.padding)
            return _objective(logp, weight, options), logp.losses * weight

        def skip() -> tuple[jax.Array, jax.Array]:
            return jnp.float32(0), jnp.zeros_like(weight)

        value, losses = jax.lax.cond(jnp.any(weight > 0), compute, skip)
        return total + value, losses

    total, losses = jax.lax.scan(body, jnp.float32(0), chunks[:3])
    return (total, chunks.undo(losses, labels.shape)), (None, None, None)


class _LogProbs(NamedTuple):
    """For a chunk: log p of base rows [C, V] and of new rows [C, n], log(Z) [C], and -log p of the labels [C]."""

    base: jax.Array
    new: jax.Array
    log_z: jax.Array
    losses: jax.Array


def _log_probs(h: jax.Array, base: jax.Array, new: jax.Array, label: jax.Array, padding: Padding) -> _LogProbs:
    size = base.shape[0]
    of_base = jnp.einsum("CD,VD->CV", h, base, preferred_element_type=jnp.float32)
    of_new = jnp.einsum("CD,VD->CV", h, new, preferred_element_type=jnp.float32)
    of_new = mask_padding(of_new, padding, size)
    peak = jnp.max(of_base, axis=-1)
    if new.shape[0]:
        peak = jnp.maximum(peak, jnp.max(of_new, axis=-1))
    peak = peak[:, None]
    total = jnp.sum(jnp.exp(of_base - peak), axis=-1) + jnp.sum(jnp.exp(of_new - peak), axis=-1)
    log_z = peak + jnp.log(total)[:, None]
    of_base, of_new = of_base - log_z, of_new - log_z
    chosen = jnp.take_along_axis(of_base, jnp.minimum(label, size - 1)[:, None], axis=-1)[:, 0]
    if new.shape[0]:
        added = jnp.take_along_axis(of_new, jnp.maximum(label - size, 0)[:, None], axis=-1)[:, 0]
        chosen = jnp.where(label < size, chosen, added)
    return _LogProbs(of_base, of_new, log_z[:, 0], -chosen)


def _objective(logp: _LogProbs, weight: jax.Array, options: _LossOptions) -> jax.Array:
    losses = logp.losses
    if options.z_loss:
        losses = losses + options.z_loss * logp.log_z**2
    return jnp.sum(losses * weight)


# The objective so far, and the gradients of new rows and base rows so far.
_Carry = tuple[jax.Array, jax.Array | None, jax.Array | None]


def _loss_and_gradients(
    hidden: jax.Array,
    base: jax.Array,
    new: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    options: _LossOptions,
) -> _Result:
    """The objective, each token's loss, and the objective's gradients; those of tables stay float32, to be summed."""
    new = jnp.zeros((0, base.shape[1]), base.dtype) if new is None else new
    chunks = _chunks(hidden, labels, weights, options.chunk)

    def body(carry: _Carry, inputs: tuple[jax.Array, ...]) -> tuple[_Carry, tuple[jax.Array, jax.Array]]:
        h, label, weight = inputs
        total, d_new, d_base = carry

        def compute() -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array]:
            logp = _log_probs(h, base, new, label, options.padding)
            of_base, of_new = (d.astype(base.dtype) for d in _logit_gradients(logp, label, weight, options))
            d_h = of_base @ base + of_new @ new
            # Added inside the branch, so that a skipped chunk does not read and write the tables' gradients.
            next_new = None if d_new is None else d_new + _row_gradients(of_new, h)
            next_base = None if d_base is None else d_base + _row_gradients(of_base, h)
            return _objective(logp, weight, options), logp.losses * weight, next_new, next_base, d_h.astype(h.dtype)

        def skip() -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array]:
            return jnp.float32(0), jnp.zeros_like(weight), d_new, d_base, jnp.zeros_like(h)

        value, losses, next_new, next_base, d_h = jax.lax.cond(jnp.any(weight > 0), compute, skip)
        return (total + value, next_new, next_base), (losses, d_h)

    d_new = jnp.zeros(new.shape, jnp.float32) if options.train_new else None
    d_base = jnp.zeros(base.shape, jnp.float32) if options.train_base else None
    (total, d_new, d_base), (losses, d_hidden) = jax.lax.scan(body, (jnp.float32(0), d_new, d_base), chunks[:3])
    shape = labels.shape
    return (total, chunks.undo(losses, shape)), (chunks.undo(d_hidden, shape), d_base, d_new)


def _logit_gradients(
    logp: _LogProbs, label: jax.Array, weight: jax.Array, options: _LossOptions
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


def _row_gradients(of_logits: jax.Array, h: jax.Array) -> jax.Array:
    """The gradient of a table's rows: gradients of their logits [C, V] and states [C, D] -> float32 [V, D]."""
    return jnp.einsum("CV,CD->VD", of_logits, h, preferred_element_type=jnp.float32)
