"""Attention in blocks: it equals the plain formula and needs less memory."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradient_checks import outputs_and_gradients, require_near

from transllm_jax.model import attention
from transllm_jax.model.attention import attend, attend_causally, causal_mask


def attention_inputs(length: int, dtype: Any = jnp.float32) -> tuple[list[jax.Array], np.ndarray]:
    """q, k and v of 4 heads on 2, and the segment ids of two rows: two documents and padding, and one document."""
    rng = np.random.default_rng(0)
    parts = [jnp.asarray(rng.standard_normal((2, count, length, 6)), dtype) for count in (4, 2, 2)]
    segments = np.ones((2, length), np.int32)
    segments[0, length // 3 : -2], segments[0, -2:] = 2, 0
    return parts, segments


def test_attention_and_its_gradients_match_the_formula() -> None:
    (q, k, v), segments = attention_inputs(9)
    allowed = (segments[:, :, None] == segments[:, None, :]) & (np.arange(9)[:, None] >= np.arange(9))

    def formula(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(part, 2, axis=1) for part in (k, v))
        scores = jnp.where(allowed[:, None], q @ k.swapaxes(-1, -2) / 6**0.5, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1) @ v

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, causal_mask(jnp.asarray(segments)))

    def in_blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_causally(q, k, v, jnp.asarray(segments))

    wanted = outputs_and_gradients(formula, q, k, v)
    require_near(outputs_and_gradients(plain, q, k, v), wanted)
    require_near(outputs_and_gradients(in_blocks, q, k, v), wanted)


@pytest.mark.parametrize("window", [None, 2, 4, 6, 50])
def test_attention_in_blocks_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(attention, "MOST_BLOCKS", 12)
    (q, k, v), segments = attention_inputs(12)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, causal_mask(jnp.asarray(segments), window))

    wanted = outputs_and_gradients(plain, q, k, v)
    for block in (4, 5):
        monkeypatch.setattr(attention, "BLOCK", block)

        # A new function for each size, because compiled functions are cached by their identity.
        def in_blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attend_causally(q, k, v, jnp.asarray(segments), window)

        require_near(outputs_and_gradients(in_blocks, q, k, v), wanted)


def test_attention_in_blocks_skips_masked_blocks_and_keeps_no_weights() -> None:
    (q, k, v), segments = attention_inputs(512)

    def kept_and_computed(window: int | None) -> tuple[int, int]:
        """Numbers kept for the backward pass, and scores computed in the forward pass."""

        def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attend_causally(q, k, v, jnp.asarray(segments), window)

        pull = jax.eval_shape(lambda *given: jax.vjp(ours, *given)[1], q, k, v)
        forward = jax.make_jaxpr(ours)(q, k, v)
        scores = re.findall(r"f32\[2,2,(\d+),(\d+)\] = exp", str(forward))
        return sum(leaf.size for leaf in jax.tree.leaves(pull)), sum(int(rows) * int(keys) for rows, keys in scores)

    square = 2 * 512 * 512  # for the two query heads of a key head
    kept, computed = kept_and_computed(None)
    # q, k, v, the segment ids, and one number a query: far less than the weights, which are 4 squares.
    assert kept == q.size + k.size + v.size + segments.size + q.size // 6
    assert computed == square * 5 // 8
    # Each block of 128 attends to itself and to the 127 keys before it.
    assert kept_and_computed(128) == (kept, 2 * 128 * (128 + 3 * 255))


def test_attention_in_blocks_is_as_exact_in_bfloat16() -> None:
    parts, segments = attention_inputs(300, jnp.bfloat16)

    def errors(function: Any, *more: Any) -> list[float]:
        ours = outputs_and_gradients(lambda q, k, v: function(q, k, v, *more), *parts)
        wanted = outputs_and_gradients(
            lambda q, k, v: attend(q, k, v, causal_mask(jnp.asarray(segments))),
            *(part.astype(jnp.float32) for part in parts),
        )
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(ours))
        return [
            float(np.abs(left.astype(np.float32) - right).mean())
            for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True)
        ]

    plain = errors(attend, causal_mask(jnp.asarray(segments)))
    blocked = errors(attend_causally, jnp.asarray(segments))
    assert all(0 < ours < 1.5 * theirs for ours, theirs in zip(blocked, plain, strict=True))
