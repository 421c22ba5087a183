"""Intervals over seeds and questions, and differences to the full method on the same seeds and questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev

import numpy as np

from transllm_jax.ablation.results import Asked, Found
from transllm_jax.evaluation.statistics import mean_interval, paired_interval, students_quantile
from transllm_jax.evaluation.suites.results import Interval

RESAMPLES, LEVEL = 4000, 0.95

# Says of an answer whether something holds; None for questions that do not count.
Holds = Callable[[Asked], bool | None]


def right(asked: Asked) -> bool | None:
    """Whether the answer in the target language is right."""
    return asked.right


def understood(asked: Asked) -> bool | None:
    """Whether the chain has understood the question."""
    return asked.understood


def chain_english(asked: Asked) -> bool | None:
    """Whether the English in the chain is right."""
    return asked.chain_english


def english(asked: Asked) -> bool | None:
    """Whether the answer is right if asked in English."""
    return asked.english


def failed_by(reason: str) -> Holds:
    """Whether the chain failed for this reason; of questions that are not asked in chains, None."""

    def holds(asked: Asked) -> bool | None:
        return None if asked.understood is None and asked.reason is None else asked.reason == reason

    return holds


def share(runs: Sequence[Found], holds: Holds) -> Interval | None:
    """The share of questions of which it holds, over all runs of a variant; None if none counts.

    With one seed the interval is that of `mean_interval`. With several it is a bootstrap that draws questions and
    seeds independently of each other: a question that is hard is hard for every seed (Owen, The pigeonhole bootstrap,
    2007).
    """
    matrix = _matrix(runs, holds)
    if matrix is None:
        return None
    # Where the answers to all questions are alike, there is nothing to draw from.
    alike = bool((matrix == matrix[0, 0]).all())
    return mean_interval(matrix[0].tolist()) if len(matrix) == 1 or alike else _crossed(matrix)


def difference(runs: Sequence[Found], full: Sequence[Found], holds: Holds) -> Interval | None:
    """How much more often it holds for a variant than for the full method, with the same seeds and questions.

    None if no seed is common to both, or if it is not known for both.
    """
    pairs = _paired(runs, full)
    both = _matrix([one for pair in pairs for one in pair], holds)
    if both is None:
        return None
    first, second = both[0::2], both[1::2]
    if len(first) == 1:
        return paired_interval(first[0].tolist(), second[0].tolist())
    return _crossed(first - second)


def number(runs: Sequence[Found], name: str) -> Interval | None:
    """A measure that a run has once: its mean over seeds, with Student's interval if there are several seeds."""
    return _over_seeds([one.metrics.get(name) for one in runs])


def number_difference(runs: Sequence[Found], full: Sequence[Found], name: str) -> Interval | None:
    """How much more of it a variant has than the full method with the same seed."""
    pairs = [(one.metrics.get(name), two.metrics.get(name)) for one, two in _paired(runs, full)]
    return _over_seeds([one - two for one, two in pairs if one is not None and two is not None])


def _paired(runs: Iterable[Found], full: Iterable[Found]) -> list[tuple[Found, Found]]:
    """The runs of a variant with those of the full method of the same seed; the original, without a seed, with all."""
    runs = list(runs)
    by_seed: Mapping[int | None, Found] = {one.seed: one for one in full}
    if len(runs) == 1 and runs[0].seed is None:
        return [(runs[0], other) for other in by_seed.values()]
    return [(one, by_seed[one.seed]) for one in runs if one.seed in by_seed]


def _matrix(runs: Sequence[Found], holds: Holds) -> np.ndarray | None:
    """[seeds, questions] of 0 and 1: the questions that count, in all runs."""
    rows = [{asked.id: value for asked in one.questions if (value := holds(asked)) is not None} for one in runs]
    common = [id for id in rows[0] if all(id in row for row in rows)] if rows else []
    return np.array([[float(row[id]) for id in common] for row in rows]) if common else None


def _crossed(matrix: np.ndarray) -> Interval:
    seeds, questions = matrix.shape
    draw = np.random.default_rng(0)
    # How often each question, and each seed, is drawn.
    of_questions = draw.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES) / questions
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    means = np.einsum("rs,sq,rq->r", of_seeds, matrix, of_questions, optimize=True)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(matrix.mean()), float(low), float(high), questions, LEVEL)


def _over_seeds(values: Iterable[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = fmean(known)
    if len(known) == 1:
        return Interval(mean, mean, mean, 1, LEVEL)
    half = students_quantile(len(known) - 1, LEVEL) * stdev(known) / len(known) ** 0.5
    return Interval(mean, mean - half, mean + half, len(known), LEVEL)
