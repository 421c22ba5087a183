"""Both ways to write the cache of keys and values: a row at a time, and by a scatter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transllm_jax.model import cache as cache_module
from transllm_jax.model.cache import CHUNK, Cache
from transllm_jax.model.layout import Layout

LAYERS, ROWS, HEADS, SIZE = 3, 4, 2, 2 * CHUNK


def drawn(rng: np.random.Generator, rows: int, tokens: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal((LAYERS, rows, HEADS, tokens, 2), dtype=np.float32))


def check_both_ways(layout: Layout, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cache, source = (Cache(drawn(rng, ROWS, SIZE), drawn(rng, ROWS, SIZE)) for _ in range(2))
    new = drawn(rng, ROWS, tokens), drawn(rng, ROWS, tokens)
    # At the beginning, at the end, in the middle, and nowhere.
    starts = jnp.array([0, SIZE - tokens, 7, SIZE])
    rows = jnp.array([2, ROWS, 3, 1])
    lengths = jnp.array([5, 9, CHUNK + 1, 0])

    def written() -> tuple[Cache, Cache, Cache]:
        own, moved = cache.written(*new, starts, layout), cache.written(*new, starts, layout, rows)
        return own, moved, cache.copied(source, rows, lengths, layout)

    found = []
    for in_place in (False, True):
        monkeypatch.setattr(cache_module, "_is_written_in_place", lambda _, in_place=in_place: in_place)
        found.append(jax.jit(lambda: written())())
    jax.tree.map(np.testing.assert_array_equal, *found)
    own, moved, copied = found[1]
    np.testing.assert_array_equal(own.k[:, 2, :, 7 : 7 + tokens], new[0][:, 2])
    np.testing.assert_array_equal(moved.v[:, 3, :, 7 : 7 + tokens], new[1][:, 2])
    np.testing.assert_array_equal(own.k[:, 3], cache.k[:, 3])
    np.testing.assert_array_equal(copied.k[:, 3, :, : CHUNK + 1], source.k[:, 2, :, : CHUNK + 1])
    np.testing.assert_array_equal(copied.v[:, 0], cache.v[:, 0])
