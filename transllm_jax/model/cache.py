"""The cache of keys and values, and the two passes over it: a piece of a prompt, and one token of an answer.

A row's token at position p has its keys and values at place p of the row. Attention goes over the cache in chunks of
fixed size and place, with a running softmax (arXiv 2112.05682). Chunks that a row has not reached change nothing, to
the bit: a row's result does not depend on how long the other rows are, and short rows cost little.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transllm_jax.model.attention import masked_scores
from transllm_jax.model.layout import Layout
from transllm_jax.model.llama import Block, Llama

# Keys that attention reads at once. The number of places of a cache is a multiple of it.
CHUNK = 128


class Cache(NamedTuple):
    """Keys and values, [L, B, K, S, H] each. What lies at or after a row's length is never read."""

    k: jax.Array
    v: jax.Array

    @property
    def size(self) -> int:
        """The number of places S of a row."""
        return int(self.k.shape[3])

    def written(
        self, k: jax.Array, v: jax.Array, starts: jax.Array, layout: Layout, rows: jax.Array | None = None
    ) -> Cache:
        """The cache with k and v [L, R, K, T, H] in its `rows` [R], from the places `starts` [R] on.

        Without `rows`, each goes to the row of its own number. A row or a start beyond the end is left out; before the
        end, all T places have to be there.
        """
        own = rows is None
        numbers = jnp.arange(k.shape[1]) if rows is None else rows
        if not _is_written_in_place(layout):
            places = starts[:, None] + jnp.arange(k.shape[3])

            def put(cache: jax.Array, new: jax.Array) -> jax.Array:
                # The two indexed axes come first in what is written.
                new = new.transpose(1, 3, 0, 2, 4)
                return cache.at[:, numbers[:, None], :, places].set(new, mode="drop", unique_indices=True)

            return Cache(put(self.k, k), put(self.v, v))
        if layout.cache_sharding is None:
            return Cache(_put_rows(self.k, k, numbers, starts), _put_rows(self.v, v, numbers, starts))
        spec = layout.cache_sharding.spec
        batch = spec[1]

        def put_own(cache: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
            return _put_rows(cache, new, jnp.arange(cache.shape[1]), starts)

        def put_any(cache: jax.Array, new: jax.Array, starts: jax.Array, rows: jax.Array) -> jax.Array:
            new = jax.lax.all_gather(new, batch, axis=1, tiled=True)
            return _put_rows(cache, new, rows - jax.lax.axis_index(batch) * cache.shape[1], starts)

        given = (starts,) if own else (starts, numbers)
        on_mesh = jax.shard_map(
            put_own if own else put_any,
            mesh=layout.mesh,
            in_specs=(spec, spec, *[PartitionSpec(batch) if own else PartitionSpec()] * len(given)),
            out_specs=spec,
            check_vma=False,
        )
        return Cache(on_mesh(self.k, k, *given), on_mesh(self.v, v, *given))

    def copied(self, source: Cache, rows: jax.Array, lengths: jax.Array, layout: Layout) -> Cache:
        """The cache with the first `lengths` [R] places of the source's rows (L, R, K, S, H) in its `rows` [R]."""

        def copy(chunk: jax.Array, cache: Cache) -> Cache:
            start = (0, 0, 0, chunk * CHUNK, 0)
            shape = (*source.k.shape[:3], CHUNK, source.k.shape[4])
            k, v = (jax.lax.dynamic_slice(part, start, shape) for part in source)
            return cache.written(k, v, jnp.full(len(rows), chunk * CHUNK), layout, rows)

        return jax.lax.fori_loop(0, _chunks(lengths), copy, self)


def _is_written_in_place(layout: Layout) -> bool:
    """Whether the cache is written a row at a time.

    For a scatter, a TPU's compiler brings the whole cache into another order of axes, and back, for each token.
    """
    return layout.platform == "tpu"


def _put_rows(cache: jax.Array, new: jax.Array, rows: jax.Array, starts: jax.Array) -> jax.Array:
    """`Cache.written` for keys or values on one device: row i of `new` goes to row `rows[i]`, if there is one."""
    width = new.shape[3]

    def put(number: jax.Array, cache: jax.Array) -> jax.Array:
        row, start, zero = rows[number], starts[number], jnp.zeros_like(number)
        there = (row >= 0) & (row < cache.shape[1]) & (start < cache.shape[3])
        at = (zero, jnp.clip(row, 0, cache.shape[1] - 1), zero, jnp.minimum(start, cache.shape[3] - width), zero)
        mine = jax.lax.dynamic_slice_in_dim(new, number, 1, axis=1)
        kept = jax.lax.dynamic_slice(cache, at, mine.shape)
        return jax.lax.dynamic_update_slice(cache, jnp.where(there, mine, kept), at)

    return jax.lax.fori_loop(0, len(rows), put, cache)


def empty_cache(model: Llama, rows: int, size: int) -> Cache:
    """A cache for `rows` texts of up to `size` tokens, a multiple of CHUNK."""
    config = model.config
    shape = (config.num_hidden_layers, rows, config.num_key_value_heads, size, config.head_dim)
    k, v = (model.layout.constrain(jnp.zeros(shape, model.vocabulary.dtype), *_AXES) for _ in "kv")
    return Cache(k, v)


_AXES = (None, "batch", "kv_heads", None, None)


def _chunks(lengths: jax.Array) -> jax.Array:
    """How many chunks hold the first places of all rows."""
    return -(-jnp.max(lengths) // CHUNK)


def read(
    model: Llama,
    cache: Cache,
    tokens: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    totals: jax.Array,
    *,
    adapters: bool,
) -> tuple[jax.Array, Cache]:
    """Read a piece of each row's prompt: its tokens [B, W] from position `starts` [B] on, of which `counts` [B] count.

    Everything before `starts` has to be in the cache. totals [B]: the lengths of the whole prompts, on which the angles
    of dynamic RoPE scaling depend. Returns the hidden state of each row's last token that counts,
    [B, D], and the cache with the piece. A row with count 0 is left as it is, and its state means nothing.
    """
    width = tokens.shape[1]
    positions = starts[:, None] + jnp.arange(width)
    # A query attends to no later key, so what is padding behind a piece is not seen.
    ends = totals[:, None] - 1
    angles = model.angles(jnp.concatenate([jnp.minimum(positions, ends), ends], axis=1))
    cos, sin = (part[:, :, :-1] for part in angles)
    lengths = jnp.where(counts > 0, starts, 0)
    x, k, v = _layers(model, model.blocks, cache, tokens, positions, (cos, sin), lengths, adapters)
    last = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    # What is padding is written, too: behind the end of the text, where nothing is read.
    return _output_states(model, last), cache.written(k, v, jnp.where(counts > 0, starts, cache.size), model.layout)


def decode(
    model: Llama,
    layers: Sequence[Block],
    cache: Cache,
    tokens: jax.Array,
    lengths: jax.Array,
    active: jax.Array,
    *,
    adapters: bool,
) -> tuple[jax.Array, Cache]:
    """One token [B] for each row, at position `lengths` [B] -> (hidden [B, D], the cache with the token).

    layers: see `unstacked`; if there are none, the model's own are used. Rows that are not `active` [B] are left as
    they are, and their states mean nothing.
    """
    lengths = jnp.where(active, lengths, 0)
    positions = lengths[:, None]
    angles = model.angles(positions)
    x, k, v = _layers(model, layers or model.blocks, cache, tokens[:, None], positions, angles, lengths, adapters)
    # Always 0. The last layer's keys are known before its attention: if they could be written before it, XLA
    # would copy the cache for each token. An optimization_barrier is removed on a CPU, and this is not.
    after = jnp.isnan(x[:, :, 0]).astype(jnp.int32)
    places = jnp.where(active, lengths, cache.size) + after[:, 0]
    return _output_states(model, x[:, 0]), cache.written(k, v, places, model.layout)


def unstacked(model: Llama) -> tuple[Block, ...]:
    """The layers one by one, in arrays of their own: as much memory again.

    A loop over stacked layers copies each layer's weights before it uses them. On a CPU this costs more than the
    products of a single token.
    """
    count = model.config.num_hidden_layers
    return tuple(jax.tree.map(partial(_layer, number=number), model.blocks) for number in range(count))


@jax.jit
def _layer(stack: jax.Array, number: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)


def _layers(
    model: Llama,
    blocks: Block | Sequence[Block],
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    lengths: jax.Array,
    adapters: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens [B, T] at positions [B, T] after the first `lengths` [B] places -> x [B, T, D], k and v [L, B, K, T, H].

    With one token a row the layout is that for decoding.
    """
    layout = model.layout.decoding if tokens.shape[1] == 1 else model.layout

    def layer(x: jax.Array, block: Block, index: jax.Array | int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            # Cut by rows, like the cache, so that attention needs no communication.
            q = model.layout.constrain(q, "batch", "heads", None, None)
            k, v = (model.layout.constrain(kv, "batch", "kv_heads", None, None) for kv in (k, v))
            window = model.config.sliding_window
            return _attend(q, k, v, cache, index, positions, lengths, window), (k, v)

        return block(x, angles, attend, adapters=adapters, layout=layout)

    x = model.vocabulary.embed(tokens, adapters=adapters)
    if not isinstance(blocks, Block):
        made = []
        for index, block in enumerate(blocks):
            x, new = layer(x, block, index)
            made.append(new)
        k, v = (jnp.stack(parts) for parts in zip(*made, strict=True))
        return x, k, v
    numbers = jnp.arange(model.config.num_hidden_layers)
    x, (k, v) = jax.lax.scan(lambda x, given: layer(x, *given), x, (blocks, numbers))
    return x, k, v


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Cache,
    layer: jax.Array | int,
    positions: jax.Array,
    lengths: jax.Array,
    window: int | None,
) -> jax.Array:
    """Attention of new tokens to themselves, up to each one's own, and to the first `lengths` [B] places of the cache.

    q [B, N, T, H], k and v [B, K, T, H], positions [B, T]; returns [B, N, T, H]. Sums are in float32.
    """
    batch, heads, length, size = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads * length, size)

    def weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("BKTS,BKSH->BKTH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)

    def seen(places: jax.Array) -> jax.Array:
        """Which places [B, S] the window lets each query see, [B, T, S]."""
        causal = places[:, None, :] <= positions[:, :, None]
        return causal if window is None else causal & (places[:, None, :] > positions[:, :, None] - window)

    scores = masked_scores(grouped, k, seen(positions)[:, None])
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    begun = peak, jnp.sum(weights, axis=-1, keepdims=True), weighted(weights, v)

    def attend_to(chunk: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, out = sums
        shape = (1, batch, kv_heads, CHUNK, size)
        keys, values = (jax.lax.dynamic_slice(part, (layer, 0, 0, chunk * CHUNK, 0), shape)[0] for part in cache)
        places = jnp.broadcast_to(chunk * CHUNK + jnp.arange(CHUNK), (batch, CHUNK))
        mask = seen(places) & (places < lengths[:, None])[:, None]
        scores = masked_scores(grouped, keys, mask[:, None])
        higher = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrunk = jnp.exp(scores - higher), jnp.exp(peak - higher)
        total = total * shrunk + jnp.sum(weights, axis=-1, keepdims=True)
        return higher, total, out * shrunk + weighted(weights, values)

    _, total, out = jax.lax.fori_loop(0, _chunks(lengths), attend_to, begun)
    return (out / total).astype(v.dtype).reshape(batch, heads, length, size)


def _output_states(model: Llama, x: jax.Array) -> jax.Array:
    """States [B, D] normalised and placed for the output product: they move, because the table is far larger."""
    layout = model.layout.decoding
    # Cut like the table along D, else the whole table may be gathered for a product with few rows.
    return layout.constrain(model.final_norm(layout.constrain(x, "batch", None)), "batch", "embed_table")
