"""The cache of keys and values on a mesh: a prompt may have been read on another device than that of its slot."""

from __future__ import annotations

import jax
import pytest
from cache_writing import check_both_ways

from transllm_jax.model.mesh import make_layout


@pytest.mark.parametrize("mesh", [(1, 4, 1), (2, 2, 1), (1, 2, 2)])
def test_a_row_at_a_time_or_by_a_scatter_the_same_is_written(
    mesh: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_both_ways(make_layout(mesh, devices=jax.devices()[:4]), 3, monkeypatch)
