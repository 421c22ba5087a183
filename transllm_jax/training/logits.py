"""What the losses over the vocabulary share: its two blocks on a mesh, and chunks of tokens.

The full [tokens, vocabulary] logits never exist: a loss is computed in chunks of tokens, and its gradient in the
forward pass, chunk by chunk, because the logits exist only there. It is taken with respect to the hidden states and to
each of the two blocks that trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transllm_jax.model.layout import AXES, Layout, sum_scattered
from transllm_jax.model.vocabulary import Padding, mask_padding

# Tokens per chunk. At V = 50,000 the float32 logits of 256 tokens take 50 MB, little next to a step's activations.
# Accelerators take larger chunks, because each chunk reads and writes the whole gradient of the new rows.
CHUNK, LARGE_CHUNK = 256, 1024
# The mesh axes over which the tables' axis D is sharded, and the sharding of tokens [B, T].
_TABLE, _TOKENS = ("fsdp", "tensor"), PartitionSpec(("data", "fsdp"), "tensor")


class Options(NamedTuple):
    """Compile-time options of a loss over the vocabulary. chunk: tokens at once."""

    chunk: int
    train_base: bool
    train_new: bool
    padding: Padding
    z_loss: float
    layout: Layout


def options_of(
    shape: tuple[int, ...],
    chunk: int | None,
    *,
    train_base: bool,
    train_new: bool,
    padding: Padding,
    z_loss: float,
    layout: Layout,
) -> Options:
    """The options for tokens of a shape. Raises ValueError if the mesh does not divide it."""
    if chunk is None:
        chunk = CHUNK if layout.platform == "cpu" else LARGE_CHUNK
    if layout.mesh is not None and (
        len(shape) != 2 or shape[0] % layout.batch_parts or shape[1] % layout.size("tensor")
    ):
        raise ValueError(f"labels {shape} are not divided by the mesh {dict(layout.mesh.shape)}")
    return Options(chunk, train_base, train_new, padding, z_loss, layout)


class Tables(NamedTuple):
    """Output rows: base [V, D], new [n, D] or None, and the original's [V, D], or None if they are the base rows."""

    base: jax.Array
    new: jax.Array | None
    original: jax.Array | None = None

    def each(self, change: Callable[[jax.Array], jax.Array]) -> Tables:
        """The tables, each changed."""
        new, original = (None if table is None else change(table) for table in (self.new, self.original))
        return Tables(change(self.base), new, original)


# The gradients of the objective: hidden states, base rows [V, D] and new rows [n, D]; None for rows that do not train.
Gradients = tuple[jax.Array, jax.Array | None, jax.Array | None]
# The objective, each token's loss, and the gradients.
Result = tuple[tuple[jax.Array, jax.Array], Gradients]


def on_all_devices(
    local: Callable[..., Any],
    hidden: jax.Array,
    tables: Tables,
    targets: jax.Array,
    weights: jax.Array,
    options: Options,
) -> Result:
    """Run `local` on each device's tokens with whole tables; the objective and the tables' gradients are summed.

    hidden [B, T, D], weights [B, T]; targets [B, T] or [B, T, D].
    """
    mesh = options.layout.mesh
    if mesh is None:
        return local(hidden, tables.each(lambda table: table.astype(hidden.dtype)), targets, weights, options)

    def gathered(table: jax.Array) -> jax.Array:
        return jax.lax.all_gather(table.astype(hidden.dtype), _TABLE, axis=1, tiled=True)

    parts = options.layout.size(*_TABLE)

    def scattered(gradient: jax.Array | None) -> jax.Array | None:
        if gradient is None:
            return None
        by_part = gradient.reshape(gradient.shape[0], parts, -1).swapaxes(0, 1)
        return jax.lax.psum(sum_scattered(by_part, _TABLE), "data")

    def device(hidden: jax.Array, tables: Tables, targets: jax.Array, weights: jax.Array) -> Result:
        (total, losses), gradients = local(hidden, tables.each(gathered), targets, weights, options)
        d_hidden, d_base, d_new = gradients
        return (jax.lax.psum(total, AXES), losses), (d_hidden, scattered(d_base), scattered(d_new))

    table, states = PartitionSpec(None, _TABLE), PartitionSpec(*_TOKENS, None)
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(states, table, states if targets.ndim == 3 else _TOKENS, _TOKENS),
        out_specs=((PartitionSpec(), _TOKENS), (states, table, table)),
        check_vma=False,
    )(hidden, tables, targets, weights)


class Chunks(NamedTuple):
    """Tokens in n chunks of C: states [n, C, D], targets [n, C, ..] and weights [n, C].

    order [n * C]: the token at each place.
    """

    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array
    order: jax.Array

    def undo(self, values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Values by chunk [n, C, ..], put back in the tokens' original order, as [*shape, ..]."""
        flat = values.reshape(-1, *values.shape[2:])
        in_order = jnp.zeros_like(flat).at[self.order].set(flat, unique_indices=True)
        return in_order[: math.prod(shape)].reshape(*shape, *flat.shape[1:])


def chunks_of(hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int) -> Chunks:
    """The tokens in chunks of at most `chunk`: those with a weight come first, so that the last have none."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    tokens = flat.shape[0]
    chunk = min(chunk, tokens)
    room = -tokens % chunk

    def padded(array: jax.Array) -> jax.Array:
        return jnp.pad(array, [(0, room)] + [(0, 0)] * (array.ndim - 1))

    flat, targets = padded(flat), padded(targets.reshape(tokens, *targets.shape[weights.ndim :]))
    weights = padded(weights.reshape(-1).astype(jnp.float32))
    order = jnp.argsort(weights <= 0, stable=True)
    states, targets, weights = (array[order].reshape(-1, chunk, *array.shape[1:]) for array in (flat, targets, weights))
    return Chunks(states, targets, weights, order)


class LogProbs(NamedTuple):
    """For a chunk: log p of base rows [C, V] and of new rows [C, n], and log(Z) [C], all float32."""

    base: jax.Array
    new: jax.Array
    log_z: jax.Array


def log_probs(h: jax.Array, base: jax.Array, new: jax.Array, padding: Padding) -> LogProbs:
    """States [C, D] and output rows -> log p over both blocks; new rows that are `padding` get no probability."""
    of_base = jnp.einsum("CD,VD->CV", h, base, preferred_element_type=jnp.float32)
    of_new = jnp.einsum("CD,VD->CV", h, new, preferred_element_type=jnp.float32)
    of_new = mask_padding(of_new, padding, base.shape[0])
    peak = jnp.max(of_base, axis=-1)
    if new.shape[0]:
        peak = jnp.maximum(peak, jnp.max(of_new, axis=-1))
    peak = peak[:, None]
    total = jnp.sum(jnp.exp(of_base - peak), axis=-1) + jnp.sum(jnp.exp(of_new - peak), axis=-1)
    log_z = peak + jnp.log(total)[:, None]
    return LogProbs(of_base - log_z, of_new - log_z, log_z[:, 0])


def new_rows_of(tables: Tables) -> jax.Array:
    """The new rows [n, D]; n is 0 if there are none."""
    return jnp.zeros((0, tables.base.shape[1]), tables.base.dtype) if tables.new is None else tables.new


# For a chunk: its objective, each token's loss [C], and the gradients of the logits [C, V] and [C, n] if wanted.
ChunkLoss = tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]
# (states [C, D], tables, targets [C, ..], weights [C], options, whether gradients are wanted) -> ChunkLoss.
OfChunk = Callable[[jax.Array, Tables, jax.Array, jax.Array, Options, bool], ChunkLoss]


def without_gradients(
    of_chunk: OfChunk, hidden: jax.Array, tables: Tables, targets: jax.Array, weights: jax.Array, options: Options
) -> tuple[tuple[jax.Array, jax.Array], tuple[None, None, None]]:
    """The objective and each token's loss. Chunks without a weighted token are skipped."""
    tables = tables._replace(new=new_rows_of(tables))
    chunks = chunks_of(hidden, targets, weights, options.chunk)

    def body(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h, target, weight = inputs

        def compute() -> tuple[jax.Array, jax.Array]:
            return of_chunk(h, tables, target, weight, options, False)[:2]

        def skip() -> tuple[jax.Array, jax.Array]:
            return jnp.float32(0), jnp.zeros_like(weight)

        value, losses = jax.lax.cond(jnp.any(weight > 0), compute, skip)
        return total + value, losses

    total, losses = jax.lax.scan(body, jnp.float32(0), chunks[:3])
    return (total, chunks.undo(losses, weights.shape)), (None, None, None)


# The objective so far, and the gradients of new rows and base rows so far.
_Carry = tuple[jax.Array, jax.Array | None, jax.Array | None]


def with_gradients(
    of_chunk: OfChunk, hidden: jax.Array, tables: Tables, targets: jax.Array, weights: jax.Array, options: Options
) -> Result:
    """The objective, each token's loss, and the objective's gradients; those of tables stay float32, to be summed."""
    tables = tables._replace(new=new_rows_of(tables))
    base, new = tables.base, new_rows_of(tables)
    chunks = chunks_of(hidden, targets, weights, options.chunk)

    def body(carry: _Carry, inputs: tuple[jax.Array, ...]) -> tuple[_Carry, tuple[jax.Array, jax.Array]]:
        h, target, weight = inputs
        total, d_new, d_base = carry

        def compute() -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array]:
            value, losses, gradients = of_chunk(h, tables, target, weight, options, True)
            assert gradients is not None
            of_base, of_new = (d.astype(base.dtype) for d in gradients)
            d_h = of_base @ base + of_new @ new
            # Added inside the branch, so that a skipped chunk does not read and write the tables' gradients.
            next_new = None if d_new is None else d_new + _row_gradients(of_new, h)
            next_base = None if d_base is None else d_base + _row_gradients(of_base, h)
            return value, losses, next_new, next_base, d_h.astype(h.dtype)

        def skip() -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array]:
            return jnp.float32(0), jnp.zeros_like(weight), d_new, d_base, jnp.zeros_like(h)

        value, losses, next_new, next_base, d_h = jax.lax.cond(jnp.any(weight > 0), compute, skip)
        return (total + value, next_new, next_base), (losses, d_h)

    d_new = jnp.zeros(new.shape, jnp.float32) if options.train_new else None
    d_base = jnp.zeros(base.shape, jnp.float32) if options.train_base else None
    (total, d_new, d_base), (losses, d_hidden) = jax.lax.scan(body, (jnp.float32(0), d_new, d_base), chunks[:3])
    shape = weights.shape
    return (total, chunks.undo(losses, shape)), (chunks.undo(d_hidden, shape), d_base, d_new)


def _row_gradients(of_logits: jax.Array, h: jax.Array) -> jax.Array:
    """The gradient of a table's rows: gradients of their logits [C, V] and states [C, D] -> float32 [V, D]."""
    return jnp.einsum("CV,CD->VD", of_logits, h, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def objective(
    hidden: jax.Array, tables: Tables, targets: jax.Array, weights: jax.Array, of_chunk: OfChunk, options: Options
) -> tuple[jax.Array, jax.Array]:
    """The sum of a loss over all tokens, a float32 scalar, and each token's part, [...].

    hidden [..., D], targets [...] or [..., D], weights [...]; of_chunk: the loss. Differentiable with respect to
    `hidden`, and to the base and new rows if `options` say that they train.
    """
    return on_all_devices(partial(without_gradients, of_chunk), hidden, tables, targets, weights, options)[0]


def _forward(
    hidden: jax.Array, tables: Tables, targets: jax.Array, weights: jax.Array, of_chunk: OfChunk, options: Options
) -> tuple[tuple[jax.Array, jax.Array], Gradients]:
    local = partial(with_gradients, of_chunk)
    result, (d_hidden, d_base, d_new) = on_all_devices(local, hidden, tables, targets, weights, options)
    # Rounded once, after the sum over devices.
    d_base = None if d_base is None else d_base.astype(tables.base.dtype)
    d_new = None if d_new is None or tables.new is None else d_new.astype(tables.new.dtype)
    return result, (d_hidden, d_base, d_new)


def _backward(
    of_chunk: OfChunk, options: Options, gradients: Gradients, g: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, tuple[jax.Array | None, ...], None, None]:
    d_hidden, d_base, d_new = (None if d is None else d * g[0].astype(d.dtype) for d in gradients)
    return d_hidden, Tables(d_base, d_new, None), None, None  # type: ignore[arg-type]


objective.defvjp(_forward, _backward)
