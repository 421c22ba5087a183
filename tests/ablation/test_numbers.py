"""Intervals and verdicts of an ablation, on results that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from transllm_jax.ablation import numbers
from transllm_jax.ablation.page import page
from transllm_jax.ablation.results import Asked, Found


def found(name: str, seed: int | None, right: Sequence[int], *, kl: float = 0.1, tokens: int = 1000) -> Found:
    """A run's results: which of the questions were answered rightly."""
    asked = [
        Asked(f"{n}", "kind", bool(value), True, bool(value), None if value else "english", True)
        for n, value in enumerate(right)
    ]
    made_with = {"version": "1", "commit": "abc", "machine": "2 cores"}
    metrics = {"english_kl": kl, "bits_per_byte": 1.0}
    return Found(name, seed, "c", "d", made_with, tokens, 60.0, metrics, {}, asked)


def test_shares_by_hand() -> None:
    share = numbers.share([found("full", 0, [1, 1, 0, 0]), found("full", 1, [1, 0, 0, 0])], numbers.right)
    assert share is not None and share.value == 3 / 8 and share.samples == 4
    assert 0 <= share.low < 3 / 8 < share.high <= 1
    assert numbers.share([found("full", 0, [1, 0])], numbers.failed_by("english")).value == 1 / 2  # type: ignore[union-attr]
    assert numbers.share([], numbers.right) is None


def test_what_never_or_always_happens_is_not_certain() -> None:
    share = numbers.share([found("full", 0, [0] * 10)], numbers.right)
    assert share is not None and share.value == 0 and share.low == 0 and share.high == pytest.approx(0.278, abs=0.002)


def test_differences_are_paired_by_question_and_seed() -> None:
    full = [found("full", seed, [1, 1, 1, 0] * 30) for seed in (0, 1)]
    other = [found("other", seed, [1, 1, 0, 0] * 30) for seed in (1, 2)]
    difference = numbers.difference(other, full, numbers.right)
    assert difference is not None and difference.value == pytest.approx(-0.25) and difference.high < 0
    # The same questions are wrong in both, so the difference has a narrower interval than either share.
    alone = numbers.share(full, numbers.right)
    assert alone is not None
    assert numbers.difference(full, full, numbers.right).high == 0  # type: ignore[union-attr]
    assert numbers.difference([found("other", 5, [1] * 120)], full, numbers.right) is None


def test_the_interval_of_numbers_is_students() -> None:
    runs = [found("full", seed, [1], kl=kl) for seed, kl in enumerate((0.1, 0.2, 0.3))]
    interval = numbers.number(runs, "english_kl")
    assert interval is not None and interval.value == pytest.approx(0.2)
    assert interval.high - interval.value == pytest.approx(4.30265 * 0.1 / 3**0.5)
    many = numbers.number([found("full", seed, [1], kl=seed % 2) for seed in range(11)], "english_kl")
    assert many is not None and many.high - many.value == pytest.approx(2.22814 * (3 / 11) ** 0.5 / 11**0.5)


def test_only_the_same_questions_are_compared() -> None:
    full, other = found("full", 0, [1, 1, 0]), found("other", 0, [0, 0, 1, 1])
    shared = numbers.difference([other], [full], numbers.right)
    assert shared is not None and shared.samples == 3
    elsewhere = [replace(one, id=f"x{one.id}") for one in other.questions[:3]]
    assert numbers.difference([replace(other, questions=elsewhere)], [full], numbers.right) is None


def test_intervals_cover() -> None:
    """Of 200 simulated ablations, the interval of a share holds the true one in about 95 of 100."""
    draw, held = np.random.default_rng(1), 0
    for _ in range(200):
        hard = draw.beta(2, 2, 100)
        runs = [found("full", seed, (draw.random(100) < hard).astype(int).tolist()) for seed in range(3)]
        share = numbers.share(runs, numbers.right)
        assert share is not None
        held += share.low <= 0.5 <= share.high
    assert 0.9 <= held / 200 <= 1


def test_the_page_says_if_a_rival_wins() -> None:
    full = [found("full", seed, [1, 0, 0, 0] * 30) for seed in (0, 1, 2)]
    rival = [found("chains-only", seed, [1, 1, 0, 0] * 30) for seed in (0, 1, 2)]
    weak = [found("no-translate", seed, [0, 0, 0, 0] * 30, tokens=10) for seed in (0, 1, 2)]
    original = found("original", None, [0] * 120)
    text = page([*full, *rival, *weak, original], {"base-model": "give it"}, "plot.svg")
    assert "**beats the full method at equal tokens**" in text and "fewer right answers" in text
    assert "9 runs in" in text and "commit abc" in text and "With 3 seeds" in text
    assert "`base-model`" in text and "give it" in text and "![" in text
    more = page([*full, *(found("direct", seed, [1] * 120, tokens=2000) for seed in (0, 1, 2))], {}, None)
    assert "beats the full method at 2,000 tokens against 1,000" in more
