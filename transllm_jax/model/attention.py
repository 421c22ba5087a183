"""Rotary positions and grouped-query attention, in the layout [B, heads, T, H]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Not -inf: a row whose keys are all masked (padding) must stay finite, and its softmax harmless.
MASKED = -1e30


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, 1, T, H / 2] for positions [B, T] (RoPE, arXiv 2104.09864, in Hugging Face's layout)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn x [B, heads, T, H] by its positions; the first half of H pairs with the second."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """[B, T] segment ids (0 is padding) -> bool [B, 1, T, T]: same segment, and no later key."""
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    # Padding attends to itself, so that no row is empty; nothing real attends to padding.
    return (same & jnp.tril(jnp.ones((length, length), bool)))[:, None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention (arXiv 2305.13245).

    q [B, N, T, H], k and v [B, K, S, H] with N a multiple of K, mask bool broadcastable to [B, 1, T, S];
    returns [B, N, T, H]. The softmax is in float32.
    """
    batch, heads, length, size = q.shape
    kv_heads = k.shape[1]
    # Query heads that share a key head stand one below the other: one product for all, and k is never repeated.
    q = q.reshape(batch, kv_heads, heads // kv_heads * length, size)
    scores = jnp.einsum("BKTH,BKSH->BKTS", q, k, preferred_element_type=jnp.float32) * size**-0.5
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    scores = jnp.where(mask[:, :, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads * length, -1)
    out = jnp.einsum("BKTS,BKSH->BKTH", weights, v)
    return out.reshape(batch, heads, length, size)
