"""The cache of keys and values."""

from __future__ import annotations

import pytest
from cache_writing import check_both_ways

from transllm_jax.model.layout import SINGLE


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_row_at_a_time_or_by_a_scatter_the_same_is_written(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_both_ways(SINGLE, tokens, monkeypatch)
