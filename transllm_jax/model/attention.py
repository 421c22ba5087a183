"""Grouped-query attention and its masks, in the layout [B, heads, T, H].

`attend` is the plain formula under any mask. `attend_causally` is the same for whole rows, with its own backward pass:
it goes through the queries block by block, skips keys that no query of the block attends to, and keeps no weights.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The checkpoint name of attention's output and log-sum-exp, by which rematerialisation can save them.
ATTENDED = "attention"

# Not -inf: the softmax of a query whose keys are all masked (padding) must stay finite.
MASKED = -1e30
# The fewest queries in a block, and the most blocks in a row. With n blocks, (n + 1) / 2n of the square is computed.
# Shorter blocks save no more time (at 512 tokens on a CPU, with the backward pass: 0.84 s in one block, 0.55 in two,
# 0.42 in four, 0.39 in eight), and each block is compiled separately.
BLOCK, MOST_BLOCKS = 128, 8


def causal_mask(segment_ids: jax.Array, window: int | None = None) -> jax.Array:
    """Segment ids [B, T] (0 is padding) -> bool [B, 1, T, T]: same segment, no later key, the last `window` keys."""
    length = segment_ids.shape[1]
    return _block_mask(segment_ids, _Block(0, length, 0), window)[:, None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention (arXiv 2305.13245).

    q [B, N, T, H], k and v [B, K, S, H] with N a multiple of K, mask bool broadcastable to [B, 1, T, S];
    returns [B, N, T, H]. The softmax is in float32.
    """
    batch, heads, length, size = q.shape
    kv_heads = k.shape[1]
    # Query heads that share a key head are stacked along T: one product for all, and k is never repeated.
    q = q.reshape(batch, kv_heads, heads // kv_heads * length, size)
    weights = jax.nn.softmax(masked_scores(q, k, mask), axis=-1)
    return jnp.einsum("BKTS,BKSH->BKTH", weights.astype(v.dtype), v).reshape(batch, heads, length, size)


def attend_causally(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None = None
) -> jax.Array:
    """`attend` under the `causal_mask` of segment ids [B, T]; q [B, N, T, H], k and v [B, K, T, H] -> [B, N, T, H].

    For the backward pass it keeps its inputs and one number per query; autodiff would keep weights [B, N, T, T].
    """
    batch, heads, length, size = q.shape
    q = q.reshape(batch, k.shape[1], heads // k.shape[1], length, size)
    return _attend_causally(q, k, v, segment_ids, window).reshape(batch, heads, length, size)


def masked_scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, K, G * T, H] and k [B, K, S, H] -> masked float32 scores [B, K, G * T, S]; mask [B, 1, T, S]."""
    scores = jnp.einsum("BKTH,BKSH->BKTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    grouped = scores.reshape(*scores.shape[:2], -1, mask.shape[2], scores.shape[3])
    return jnp.where(mask[:, :, None], grouped, MASKED).reshape(scores.shape)


class _Block(NamedTuple):
    """The queries [start, stop), which attend to keys in [first_key, stop) only."""

    start: int
    stop: int
    first_key: int

    def queries(self, x: jax.Array) -> jax.Array:
        """The block's queries of x [B, K, G, T, H], as [B, K, G * t, H]."""
        part = x[:, :, :, self.start : self.stop]
        return part.reshape(*part.shape[:2], -1, part.shape[-1])

    def keys(self, x: jax.Array) -> jax.Array:
        """The keys of x [B, K, T, H] that the block attends to, [B, K, s, H]."""
        return x[:, :, self.first_key : self.stop]

    def split_groups(self, x: jax.Array, groups: int) -> jax.Array:
        """[B, K, G * t, H] -> [B, K, G, t, H]."""
        return x.reshape(*x.shape[:2], groups, self.stop - self.start, x.shape[-1])


def _blocks(length: int, window: int | None) -> list[_Block]:
    size = max(BLOCK, -(-length // MOST_BLOCKS))
    return [
        _Block(start, min(start + size, length), 0 if window is None else max(0, start - window + 1))
        for start in range(0, length, size)
    ]


def _block_mask(segment_ids: jax.Array, block: _Block, window: int | None) -> jax.Array:
    """Which keys each query of a block attends to, bool [B, t, s]."""
    queries, keys = jnp.arange(block.start, block.stop)[:, None], jnp.arange(block.first_key, block.stop)
    # Padding attends to itself, so that no row is empty; nothing real attends to padding.
    same_segment = segment_ids[:, block.start : block.stop, None] == segment_ids[:, None, block.first_key : block.stop]
    causal = keys <= queries
    if window is not None:
        # A segment's tokens are contiguous, so indices in the row differ by as much as positions.
        causal &= keys > queries - window
    return same_segment & causal


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_causally(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None) -> jax.Array:
    """`attend_causally` with q and the result as [B, K, G, T, H]."""
    return _forward(q, k, v, segment_ids, window)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    outs, log_sums = [], []
    for block in _blocks(q.shape[3], window):
        scores = masked_scores(block.queries(q), block.keys(k), _block_mask(segment_ids, block, window)[:, None])
        peak = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        values = block.keys(v)
        out = jnp.einsum("BKTS,BKSH->BKTH", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
        outs.append(block.split_groups((out / total).astype(v.dtype), q.shape[2]))
        log_sums.append(block.split_groups(peak + jnp.log(total), q.shape[2]))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), ATTENDED)
    log_sum = checkpoint_name(jnp.concatenate(log_sums, axis=3), ATTENDED)
    return out, (q, k, v, segment_ids, log_sum)


def _backward(
    window: int | None, residuals: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segment_ids, log_sum = residuals
    grad_q = []
    # In float32, because a key's gradient is a sum over blocks.
    grad_k, grad_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for block in _blocks(q.shape[3], window):
        queries, keys, grad_out = block.queries(q), block.keys(k), block.queries(g)
        scores = masked_scores(queries, keys, _block_mask(segment_ids, block, window)[:, None])
        weights = jnp.exp(scores - block.queries(log_sum))
        grad_weights = jnp.einsum("BKTH,BKSH->BKTS", grad_out, block.keys(v), preferred_element_type=jnp.float32)
        # The softmax's derivative. A masked score has weight 0, so its gradient is 0.
        grad_scores = weights * (grad_weights - jnp.sum(weights * grad_weights, axis=-1, keepdims=True))
        grad_scores = (grad_scores * q.shape[-1] ** -0.5).astype(q.dtype)
        grad_q.append(block.split_groups(jnp.einsum("BKTS,BKSH->BKTH", grad_scores, keys), q.shape[2]))
        attended = (slice(None), slice(None), slice(block.first_key, block.stop))
        grad_k = grad_k.at[attended].add(_sum_over_queries(grad_scores, queries))
        grad_v = grad_v.at[attended].add(_sum_over_queries(weights.astype(v.dtype), grad_out))
    return jnp.concatenate(grad_q, axis=3), grad_k.astype(k.dtype), grad_v.astype(v.dtype), None


def _sum_over_queries(left: jax.Array, right: jax.Array) -> jax.Array:
    """[B, K, G * t, s] and [B, K, G * t, H] -> float32 [B, K, s, H]."""
    return jnp.einsum("BKTS,BKTH->BKSH", left, right, preferred_element_type=jnp.float32)


_attend_causally.defvjp(_forward, _backward)
