"""The key and value cache for decoding, and the two passes that fill it: prefill, and one token at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transllm_jax.model.attention import attend, causal_mask
from transllm_jax.model.llama import Block, Llama


class Cache(NamedTuple):
    """Keys and values [L, B, K, S, H]; `valid`, bool [B, S]: slots with a real token; `end`: the next slot to write.

    Rows are padded on the left, so all rows write the same slot. A row's next position is its number of real tokens.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array
    end: jax.Array


def prefill(model: Llama, tokens: jax.Array, valid: jax.Array, size: int, *, adapters: bool) -> tuple[jax.Array, Cache]:
    """Read left-padded prompts [B, P] (`valid` False on padding) into a cache of `size` slots.

    Returns the hidden state of each row's last token, [B, D], and the cache.
    """
    length = tokens.shape[1]
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    angles = model.angles(positions)
    mask = causal_mask(valid.astype(jnp.int32), model.config.sliding_window)

    def attend_whole(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        return attend(q, k, v, mask), (k, v)

    def layer(x: jax.Array, block: Block) -> tuple[jax.Array, Any]:
        return block(x, angles, attend_whole, adapters=adapters, layout=model.layout)

    x, (k, v) = jax.lax.scan(layer, model.vocabulary.embed(tokens, adapters=adapters), model.blocks)
    k, v = (model.layout.constrain(kv, None, "batch", "kv_heads", None, None) for kv in (k, v))
    padding = [(0, 0)] * 3 + [(0, size - length), (0, 0)]
    cache = Cache(
        k=jnp.pad(k, padding),
        v=jnp.pad(v, padding),
        valid=jnp.pad(valid, [(0, 0), (0, size - length)]),
        end=jnp.int32(length),
    )
    return _output_states(model, x[:, -1]), cache


def _output_states(model: Llama, x: jax.Array) -> jax.Array:
    """States [B, D] normalised and placed for the output product: they move, because the table is far larger."""
    return model.final_norm(model.layout.decoding.constrain(x, "batch", None))


def decode(model: Llama, tokens: jax.Array, cache: Cache, *, adapters: bool) -> tuple[jax.Array, Cache]:
    """One token for each row, [B] -> (hidden [B, D], the cache with the token appended)."""
    layers = model.config.num_hidden_layers
    positions = jnp.sum(cache.valid, axis=1, keepdims=True)
    angles = model.angles(positions)
    valid = jax.lax.dynamic_update_index_in_dim(cache.valid, jnp.ones(tokens.shape, bool), cache.end, axis=1)
    attended = valid
    if model.config.sliding_window is not None:
        # A row's real tokens are contiguous, so slots differ by as much as positions.
        attended = valid & (jnp.arange(valid.shape[1]) > cache.end - model.config.sliding_window)
    mask = attended[:, None, None, :]

    # The cache is the scan's carry, so it is updated in place; as an output it would be copied at every token.
    def layer(
        carry: tuple[jax.Array, jax.Array, jax.Array], inputs: tuple[Block, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        x, keys, values = carry
        block, index = inputs

        def attend_cached(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            # Cut by rows, like the cache, so that attention needs no communication.
            q = model.layout.constrain(q, "batch", "heads", None, None)
            k, v = (model.layout.constrain(kv, "batch", "kv_heads", None, None) for kv in (k, v))
            start = (index, 0, 0, cache.end, 0)
            new_keys = jax.lax.dynamic_update_slice(keys, k[None], start)
            new_values = jax.lax.dynamic_update_slice(values, v[None], start)
            return attend(q, new_keys[index], new_values[index], mask), (new_keys, new_values)

        x, (keys, values) = block(x, angles, attend_cached, adapters=adapters, layout=model.layout.decoding)
        return (x, keys, values), None

    x = model.vocabulary.embed(tokens[:, None], adapters=adapters)
    (x, k, v), _ = jax.lax.scan(layer, (x, cache.k, cache.v), (model.blocks, jnp.arange(layers)))
    return _output_states(model, x[:, 0]), Cache(k, v, valid, cache.end + 1)
