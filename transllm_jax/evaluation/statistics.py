"""Intervals of means, paired differences and other statistics of questions that are a sample of all such questions.

Rows of one cluster (the two turns of a question, its repeats, its annotators) are not independent: clusters are what is
sampled, and `Interval.samples` is their number. What each method covers on simulated data is tested
(tests/evaluation/test_statistics.py); at small sizes the ordinary percentile bootstrap covers 84% in place of 95%.

- Shares (all values 0, ½ or 1: right answers, wins with ties as halves): Wilson's interval for 0 and 1 without
  clusters; elsewhere two rows of 0 and two of 1 are added (Agresti and Coull 1998), each as heavy as the design effect
  of the clusters. A bootstrap says that 10 right answers of 10 are 100% to 100%; this says 72% to 100%.
- Differences of shares: a row is added as a half -1, a half +1 and one 0 (Agresti and Min 2005).
- All else: the bias-corrected and accelerated bootstrap (Efron 1987) of clusters, with the quantiles of Student's t
  (Hesterberg 2015), since bootstrap intervals of few samples are too short. All samples equal, or one sample: it has no
  width, because the sample says nothing about the spread; `samples` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
from scipy.special import stdtrit

from transllm_jax.evaluation.suites.results import Interval

T = TypeVar("T")

# Rows that are added to shares: how many of the lowest, the middle and the highest value.
_SHARE = (2.0, 0.0, 2.0)
_DIFFERENCE = (0.5, 1.0, 0.5)

# Numbers of one array of resamples: 16 MiB.
_AT_ONCE = 2**21

# For the acceleration, clusters are left out in at most so many groups.
_GROUPS = 200


def mean_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    share: bool | None = None,
) -> Interval:
    """The mean of values. clusters: of each value; None: each is its own.

    share: whether the values are parts of one, each 0, ½ or 1. None: if they look so. Say False for other scales,
    such as scores of 1 to 10, because all of them could be 1. Raises ValueError if there are no values.
    """
    numbers = _numbers(values)
    sums, sizes = _by_cluster(numbers, clusters)
    if share or (share is None and _is_share(numbers)):
        if clusters is None and bool(np.isin(numbers, (0, 1)).all()):
            return _wilson(numbers, level)
        return _with_added(numbers, sums, sizes, (0.0, 0.5, 1.0), _SHARE, level)
    return _bootstrap_mean(sums, sizes, level, resamples, seed)


def paired_interval(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    share: bool | None = None,
) -> Interval:
    """The mean of first - second, which are values of the same questions in the same order.

    Raises ValueError if they are not of one length, or empty. The rest as `mean_interval`.
    """
    one, other = _numbers(first), _numbers(second)
    if one.shape != other.shape:
        raise ValueError(f"{len(one)} and {len(other)} values cannot be paired")
    differences = one - other
    sums, sizes = _by_cluster(differences, clusters)
    if share or (share is None and _is_share(one) and _is_share(other)):
        return _with_added(differences, sums, sizes, (-1.0, 0.0, 1.0), _DIFFERENCE, level)
    return _bootstrap_mean(sums, sizes, level, resamples, seed)


def statistic_interval(
    items: Sequence[T],
    statistic: Callable[[Sequence[T]], float],
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A statistic of items that is no mean of theirs, such as a corpus chrF or a ratio of sums.

    statistic: is called with items of whole clusters, some of them several times: `resamples` times and up to 200 times
    more. Resamples of which it is NaN (it is not defined) are left out. Raises ValueError if it is not defined of the
    items themselves, or of half of the resamples, and if there are no items.
    """
    members = _members(len(items), clusters)
    value = float(statistic(items))
    if not np.isfinite(value):
        raise ValueError("the statistic of the items is not a finite number")
    if len(members) == 1:
        return Interval(value, value, value, 1, level)
    random = np.random.default_rng(seed)

    def of(chosen: Sequence[int] | np.ndarray[Any, Any]) -> float:
        return float(statistic([items[row] for cluster in chosen for row in members[cluster]]))

    found = np.array([of(random.integers(0, len(members), len(members))) for _ in range(resamples)])
    without = np.array([of(rest) for rest in _left_out(len(members))])
    found, without = found[np.isfinite(found)], without[np.isfinite(without)]
    if len(found) < resamples / 2:
        raise ValueError(f"the statistic is not defined of {resamples - len(found)} of {resamples} resamples")
    return _bca(value, found, without, len(members), level)


def corrected_interval(
    judged: Sequence[float], rows: Sequence[int], people: Sequence[float], *, level: float = 0.95
) -> Interval:
    """A judge's share over all questions, corrected by people, who judged a random part of them.

    It is the judge's mean plus the mean of people - judge where both judged: prediction-powered inference (Angelopoulos
    et al. 2023, arXiv 2301.09633). It is right whatever the judge's faults are, and is narrower than the people's own
    interval if the judge agrees with them. judged: of all questions, 0 to 1. rows: the different places in `judged` of
    what people judged. people: their means there, 0 to 1. `samples` is how many these are.

    The people's questions are among the judge's, so with n of N questions the variance is that of people's values / N
    and that of the differences x (1/n - 1/N). Rows are added as for shares and their differences, since few people may
    agree with the judge, or with each other, by chance. Raises ValueError if people judged none.
    """
    all_judged, truth = _numbers(judged), _numbers(people)
    differences = truth - all_judged[list(rows)]
    count, whole = len(truth), len(all_judged)
    if len(set(rows)) != count:
        raise ValueError("each question that people judged counts once")
    ones = np.ones(count)
    shift, of_shift = _added_rows(differences, ones, (-1.0, 0.0, 1.0), _DIFFERENCE, 1.0)
    _, of_people = _added_rows(truth, ones, (0.0, 0.5, 1.0), _SHARE, 1.0)
    variance = of_people * count / whole + of_shift * (1 - count / whole)
    tail = students_quantile(max(count - 1, 1), level)
    middle, half = float(all_judged.mean()) + shift, tail * float(np.sqrt(variance))
    value = float(all_judged.mean() + differences.mean())
    return _interval(min(max(value, 0.0), 1.0), middle - half, middle + half, count, level, (0.0, 1.0))


def students_quantile(degrees: int, level: float) -> float:
    """By how many standard errors the interval of a mean reaches to each side, with so many degrees of freedom."""
    return float(stdtrit(degrees, 0.5 + level / 2))


def _numbers(values: Sequence[float]) -> np.ndarray[Any, Any]:
    numbers = np.asarray(values, np.float64)
    if not numbers.size or not np.isfinite(numbers).all():
        raise ValueError("an interval needs at least one value, and finite ones")
    return numbers


def _is_share(values: np.ndarray[Any, Any]) -> bool:
    return bool(np.isin(values, (0, 0.5, 1)).all())


def _members(count: int, clusters: Sequence[Hashable] | None) -> list[list[int]]:
    """The rows of each cluster, in the order in which the clusters come first."""
    if not count:
        raise ValueError("an interval needs at least one item")
    rows: dict[Hashable, list[int]] = {}
    for row, cluster in zip(range(count), range(count) if clusters is None else clusters, strict=True):
        rows.setdefault(cluster, []).append(row)
    return list(rows.values())


def _by_cluster(
    values: np.ndarray[Any, Any], clusters: Sequence[Hashable] | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The sum and the number of the values of each cluster."""
    if clusters is None:
        return values, np.ones_like(values)
    members = _members(len(values), clusters)
    return np.array([values[rows].sum() for rows in members]), np.array([float(len(rows)) for rows in members])


def _wilson(values: np.ndarray[Any, Any], level: float) -> Interval:
    count, share, z = len(values), float(values.mean()), NormalDist().inv_cdf(0.5 + level / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return _interval(share, middle - half, middle + half, count, level, (0.0, 1.0))


def _with_added(
    values: np.ndarray[Any, Any],
    sums: np.ndarray[Any, Any],
    sizes: np.ndarray[Any, Any],
    added: tuple[float, float, float],
    weights: tuple[float, float, float],
    level: float,
) -> Interval:
    """The interval of a mean with added rows, in which each row counts as the design effect of the clusters."""
    count, clusters, mean = float(sizes.sum()), len(sums), float(values.mean())
    # All rows of a cluster alike: the most that a design effect can be, and what is assumed without any spread.
    most = float((sizes**2).sum()) / count
    spread = float(((values - mean) ** 2).sum())
    effect = min(max(float(((sums - mean * sizes) ** 2).sum()) / spread, 1.0), most) if spread else most
    middle, variance = _added_rows(sums, sizes, added, weights, effect)
    # Without clusters the added rows suffice; the spread between few clusters is known less well.
    tail = NormalDist().inv_cdf(0.5 + level / 2)
    if clusters < count and clusters > 1:
        tail = students_quantile(clusters - 1, level)
    half = tail * float(np.sqrt(variance))
    return _interval(mean, middle - half, middle + half, clusters, level, (added[0], added[2]))


def _added_rows(
    sums: np.ndarray[Any, Any],
    sizes: np.ndarray[Any, Any],
    added: tuple[float, float, float],
    weights: tuple[float, float, float],
    effect: float,
) -> tuple[float, float]:
    """The mean over clusters and added rows, each of which counts as `effect` rows, and the mean's variance."""
    values, counts = np.array(added), effect * np.array(weights)
    total = sizes.sum() + counts.sum()
    mean = (sums.sum() + (values * counts).sum()) / total
    squares = ((sums - mean * sizes) ** 2).sum() + effect * (counts * (values - mean) ** 2).sum()
    return float(mean), float(squares / total**2)


def _bootstrap_mean(
    sums: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any], level: float, resamples: int, seed: int
) -> Interval:
    count, mean = len(sums), float(sums.sum()) / float(sizes.sum())
    if count == 1:
        return Interval(mean, mean, mean, 1, level)
    random = np.random.default_rng(seed)
    found = np.empty(resamples)
    step = max(1, _AT_ONCE // count)
    for start in range(0, resamples, step):
        chosen = random.integers(0, count, (min(step, resamples - start), count))
        found[start : start + step] = sums[chosen].sum(1) / sizes[chosen].sum(1)
    without = (sums.sum() - sums) / (sizes.sum() - sizes)
    return _bca(mean, found, without, count, level)


def _left_out(count: int) -> list[list[int]]:
    """For the jackknife: the clusters that are left if each in turn, or each of 200 groups, is left out."""
    groups = min(count, _GROUPS)
    return [[number for number in range(count) if number % groups != group] for group in range(groups)]


def _bca(
    value: float, found: np.ndarray[Any, Any], without: np.ndarray[Any, Any], count: int, level: float
) -> Interval:
    """From resamples, and from values with a part of the clusters left out: the BCa interval at Student's quantiles."""
    normal = NormalDist()
    # Numbers that differ by rounding alone are equal.
    near = 1e-12 * max(1.0, abs(value))
    below = float(((found < value - near).mean() + (found <= value + near).mean()) / 2)
    bias = normal.inv_cdf(min(max(below, 0.5 / len(found)), 1 - 0.5 / len(found)))
    influence = without.mean() - without if len(without) else np.zeros(1)
    squares = float((influence**2).sum())
    acceleration = float((influence**3).sum()) / (6 * squares**1.5) if squares > near**2 else 0.0
    tail = students_quantile(count - 1, level) * float(np.sqrt(count / (count - 1)))
    ends = []
    for side in (-tail, tail):
        stretch = 1 - acceleration * (bias + side)
        # Beyond the pole the transformation turns round; its limit is the end of the resamples.
        at = normal.cdf(bias + (bias + side) / stretch) if stretch > 0 else float(side > 0)
        ends.append(float(np.quantile(found, at)))
    return _interval(value, ends[0], ends[1], count, level, (-np.inf, np.inf))


def _interval(
    value: float, low: float, high: float, samples: int, level: float, within: tuple[float, float]
) -> Interval:
    low, high = max(min(low, value), within[0]), min(max(high, value), within[1])
    return Interval(float(value), float(low), float(high), samples, level)
