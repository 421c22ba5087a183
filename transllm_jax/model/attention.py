"""Grouped-query attention and its masks, in the layout [B, heads, T, H]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Not -inf: a row whose keys are all masked (padding) must stay finite, and its softmax harmless.
MASKED = -1e30


def causal_mask(segment_ids: jax.Array, window: int | None = None) -> jax.Array:
    """[B, T] segment ids (0 is padding) -> bool [B, 1, T, T]: same segment, no later key, the last `window` keys."""
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = jnp.tril(jnp.ones((length, length), bool))
    if window is not None:
        # Tokens of a segment stand side by side, so places differ as positions do.
        seen &= ~jnp.tril(seen, -window)
    # Padding attends to itself, so that no row is empty; nothing real attends to padding.
    return (same & seen)[:, None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention (arXiv 2305.13245).

    q [B, N, T, H], k and v [B, K, S, H] with N a multiple of K, mask bool broadcastable to [B, 1, T, S];
    returns [B, N, T, H]. The softmax is in float32. No gradient reaches the mask.
    """
    batch, heads, length, size = q.shape
    kv_heads = k.shape[1]
    # Query heads that share a key head stand one below the other: one product for all, and k is never repeated.
    q = q.reshape(batch, kv_heads, heads // kv_heads * length, size)
    return _attend(q, k, v, mask).reshape(batch, heads, length, size)


def _weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax weights, float32 [B, K, N / K * T, S], of q [B, K, N / K * T, H] and k [B, K, S, H]."""
    scores = jnp.einsum("BKTH,BKSH->BKTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    apart = scores.reshape(*scores.shape[:2], -1, mask.shape[2], scores.shape[3])
    return jax.nn.softmax(jnp.where(mask[:, :, None], apart, MASKED), axis=-1).reshape(scores.shape)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.einsum("BKTS,BKSH->BKTH", _weights(q, k, mask).astype(v.dtype), v)


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    weights = _weights(q, k, mask).astype(v.dtype)
    # The weights alone are kept, not the scores beside them: half the memory, and less to move.
    return jnp.einsum("BKTS,BKSH->BKTH", weights, v), (q, k, v, weights)


def _attend_backward(residuals: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights = residuals
    to_v = jnp.einsum("BKTS,BKTH->BKSH", weights, g)
    slope = jnp.einsum("BKTH,BKSH->BKTS", g, v, preferred_element_type=jnp.float32)
    full = weights.astype(jnp.float32)
    # The softmax's derivative; a masked score has weight 0, so nothing flows through it.
    slope = full * (slope - jnp.sum(full * slope, axis=-1, keepdims=True)) * q.shape[-1] ** -0.5
    slope = slope.astype(q.dtype)
    return jnp.einsum("BKTS,BKSH->BKTH", slope, k), jnp.einsum("BKTS,BKTH->BKSH", slope, q), to_v, None


_attend.defvjp(_attend_forward, _attend_backward)
