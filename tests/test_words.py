"""Sizes and times as people read them."""

from __future__ import annotations

import pytest

from transllm_jax.words import duration, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (47 * 3600, "47 h 0 min"),
        (79 * 3600 + 59, "3 d 7 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 KiB"), (12 * 2**10, "12 KiB"), (340 * 2**17, "42.50 MiB"), (2**27, "0.12 GiB"), (1.53 * 2**30, "1.53 GiB")],
)
def test_sizes(amount: float, text: str) -> None:
    assert size(amount) == text
