"""Choosing a token: every filter against its definition, and draws that depend on the seed and the number alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transllm_jax.errors import UserError
from transllm_jax.generation.sampling import Sampling, choose, draw_of

VOCAB = 61
_choose = jax.jit(choose)


def chosen_by(
    logits: Any, settings: Sequence[Sampling], number: int = 0, seen: Any = None, scored: bool = False
) -> tuple[list[int], np.ndarray]:
    """The ids, and their log-probabilities, of rows of logits with a setting each."""
    rows = len(settings)
    logits = jnp.asarray(logits, jnp.float32)
    seen = jnp.zeros(logits.shape, bool) if seen is None else jnp.asarray(seen)
    draw = draw_of(settings, [scored] * rows)
    ids, logprobs = _choose(logits, draw, jnp.full(rows, number), seen, jnp.ones(rows, bool))
    return ids.tolist(), np.asarray(logprobs)


def sample(logits: Sequence[float], sampling: Sampling, count: int = 4000) -> np.ndarray:
    """The share of each id among `count` rows of equal logits."""
    rows = np.broadcast_to(np.asarray(logits, np.float32), (count, len(logits)))
    chosen, _ = chosen_by(rows, [sampling.for_row(row) for row in range(count)], 3)
    return np.bincount(chosen, minlength=len(logits)) / count


def test_samples_have_the_distribution_that_was_asked_for() -> None:
    probabilities = np.array([0.15, 0.5, 0.05, 0.3])
    logits = np.log(probabilities).tolist()
    assert np.abs(sample(logits, Sampling(1.0)) - probabilities).max() < 0.03
    # Temperature 1/2 squares the probabilities.
    squares = probabilities**2 / (probabilities**2).sum()
    assert np.abs(sample(logits, Sampling(0.5)) - squares).max() < 0.03
    # The fewest likely tokens whose mass reaches top_p, in their own proportions.
    assert np.abs(sample(logits, Sampling(1.0, top_p=0.7)) - np.array([0, 0.625, 0, 0.375])).max() < 0.03
    assert sample(logits, Sampling(1.0, top_p=0.45)).tolist() == [0, 1, 0, 0]
    assert sample(logits, Sampling(0.0)).tolist() == [0, 1, 0, 0]


def filtered(logits: np.ndarray, sampling: Sampling, seen: np.ndarray) -> np.ndarray:
    """The probabilities after penalty, temperature, top-k, top-p and min-p, each filter on what the one before left."""
    penalty = sampling.repetition_penalty
    scores = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits) / sampling.temperature
    shares = np.exp(scores) / np.exp(scores).sum()

    def keep(tokens: Any) -> None:
        nonlocal shares
        kept = np.zeros_like(shares)
        kept[tokens] = shares[tokens]
        shares = kept / kept.sum()

    if sampling.top_k:
        keep(np.argsort(-shares)[: sampling.top_k])
    order, mass, nucleus = np.argsort(-shares), 0.0, []
    for token in order:
        if mass < sampling.top_p:
            nucleus.append(token)
        mass += shares[token]
    keep(nucleus)
    keep(shares >= sampling.min_p * shares.max())
    return shares


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, top_k=5),
        Sampling(0.7, top_k=1000),
        Sampling(1.0, min_p=0.2),
        Sampling(1.3, min_p=1.0),
        Sampling(1.0, repetition_penalty=1.8),
        Sampling(0.8, repetition_penalty=0.6),
        Sampling(0.9, top_p=0.6, top_k=8, min_p=0.1, repetition_penalty=1.3),
    ],
)
def test_a_filter_leaves_what_its_definition_leaves(sampling: Sampling) -> None:
    rng = np.random.default_rng(3)
    logits, seen = rng.standard_normal(12), np.arange(12) % 2 == 1
    wanted = filtered(logits, sampling, seen)
    count = 6000
    rows = [sampling.for_row(row) for row in range(count)]
    ids, _ = chosen_by(np.tile(logits, (count, 1)), rows, 1, np.tile(seen, (count, 1)))
    found = np.bincount(ids, minlength=12) / count
    assert not found[wanted == 0].any() and np.abs(found - wanted).max() < 0.03
    plain = filtered(logits, Sampling(sampling.temperature), seen)
    assert np.abs(wanted - plain).max() > 0.02 or sampling.top_k > len(logits)


def test_the_penalty_counts_for_greedy_choices() -> None:
    logits = np.array([[2.0, 1.5, -0.1, -0.2]] * 3)
    seen = np.array([[True, False, False, False], [True, True, False, False], [False] * 4])
    assert chosen_by(logits, [Sampling(repetition_penalty=2.0)] * 3, seen=seen)[0] == [1, 0, 0]
    # Negative logits of known tokens get further away.
    logits = np.array([[-1.0, -1.5]])
    assert chosen_by(logits, [Sampling(repetition_penalty=2.0)], seen=np.array([[True, False]]))[0] == [1]


def test_rows_of_all_settings_share_a_batch_and_do_not_matter_to_each_other() -> None:
    settings = [
        Sampling(),
        Sampling(1.0, seed=3),
        Sampling(0.8, top_p=0.9, seed=2**40 + 7),
        Sampling(1.2, top_k=4, seed=1),
        Sampling(1.0, min_p=0.05, seed=9),
        Sampling(repetition_penalty=1.4),
    ]
    rng = np.random.default_rng(0)
    logits, seen = rng.standard_normal((6, VOCAB)), rng.random((6, VOCAB)) < 0.2
    together, _ = chosen_by(logits, settings, 5, seen)
    for row, sampling in enumerate(settings):
        assert chosen_by(logits[[row]], [sampling], 5, seen[[row]])[0] == [together[row]]
    order = [4, 2, 0, 5, 1, 3]
    assert chosen_by(logits[order], [settings[row] for row in order], 5, seen[order])[0] == [together[r] for r in order]


def test_log_probabilities_are_the_models_own() -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((3, VOCAB)).astype(np.float32)
    logits[:, 7] = -np.inf
    settings = [Sampling(), Sampling(0.5, top_k=3, seed=4), Sampling(repetition_penalty=3.0)]
    ids, logprobs = chosen_by(logits, settings, seen=logits > 1, scored=True)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs, exact[range(3), ids], rtol=1e-5)


def test_a_small_nucleus_is_greedy() -> None:
    logits = jax.random.normal(jax.random.key(0), (200, VOCAB))

    def chosen(sampling: Sampling) -> list[int]:
        return chosen_by(logits, [sampling.for_row(row) for row in range(200)])[0]

    greedy = logits.argmax(axis=-1).tolist()
    assert chosen(Sampling()) == greedy
    assert chosen(Sampling(1.5, top_p=1e-6, seed=3)) == greedy
    assert chosen(Sampling(1.5, top_k=1, seed=3)) == greedy
    assert np.mean(np.equal(chosen(Sampling(1.5, seed=3)), greedy)) < 0.5


def test_a_draw_depends_on_seed_row_and_step_alone() -> None:
    logits = jnp.zeros((3, 1000))
    rows = [5, 2, 9]

    def draw(order: list[int], step: int = 1, seed: int = 0) -> list[int]:
        settings = [Sampling(1.0, seed=seed).for_row(rows[place]) for place in order]
        return chosen_by(logits[jnp.asarray(order)], settings, step)[0]

    first = draw([0, 1, 2])
    assert len(set(first)) == 3
    assert draw([2, 0]) == [first[2], first[0]]
    assert not set(draw([0, 1, 2], step=2)) & set(first)
    assert not set(draw([0, 1, 2], seed=1)) & set(first)
    # The upper half of a seed counts, too.
    assert (
        chosen_by(logits[:1], [Sampling(1.0, seed=1)])[0] != chosen_by(logits[:1], [Sampling(1.0, seed=1 + 2**32)])[0]
    )


def test_impossible_sampling_is_refused() -> None:
    for arguments in ((-0.1, 1.0), (1.0, 0.0), (1.0, 1.1)):
        with pytest.raises(UserError, match="sampling"):
            Sampling(*arguments)
    for options in ({"top_k": -1}, {"min_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0.0}):
        with pytest.raises(UserError, match="sampling"):
            Sampling(**options)
