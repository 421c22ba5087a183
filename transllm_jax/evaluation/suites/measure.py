"""Measures over items: their values, intervals, and the difference between two systems on the same items.

Every measure here is a function of sums over items: a mean, a ratio of sums (bits per byte), or a score of a corpus
(chrF, from counts of n-grams). So a resampled value costs a sum, and not the scoring of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from transllm_jax.evaluation.statistics import mean_interval, paired_interval, statistic_interval
from transllm_jax.evaluation.suites.results import Interval

Item = Mapping[str, Any]

# Fields of items that hold what was asked: an id may be a place in a file, and another file has others there.
_ASKED = ("question", "questions", "source", "instruction", "original", "text")


def key_of(item: Item) -> tuple[Hashable, ...]:
    """What two items of different systems have in common if both were asked the same."""
    return item["id"], *(str(item.get(name)) for name in _ASKED)


@dataclass(frozen=True)
class Measure:
    """One number over items.

    parts: an item's numbers, which are summed; None for an item that does not count. value: the measure, given the sums
    of the parts; None for the mean of the first of them. percent: whether it is a share of one, and shown as such.
    """

    name: str
    parts: Callable[[Item], Sequence[float] | None]
    value: Callable[[np.ndarray], float] | None = None
    higher_is_better: bool = True
    percent: bool = False

    def interval(self, items: Iterable[Item]) -> Interval | None:
        """The value with its interval; None if no item counts. Items of one `cluster` are resampled together."""
        rows = self._rows(items)
        if not rows:
            return None
        clusters = clusters_of(cluster for cluster, _ in rows.values())
        parts = [values for _, values in rows.values()]
        if self.value is None:
            return mean_interval([values[0] for values in parts], clusters, share=self.percent)
        return statistic_interval(range(len(parts)), self._over(np.array(parts)), clusters)

    def difference(self, items: Iterable[Item], others: Iterable[Item]) -> Interval | None:
        """How much higher the value of `items` is than that of `others`, over those that count and ask the same."""
        mine, theirs = self._rows(items), self._rows(others)
        both = [key for key in mine if key in theirs]
        if not both:
            return None
        clusters = clusters_of(mine[key][0] for key in both)
        first, second = (np.array([rows[key][1] for key in both]) for rows in (mine, theirs))
        if self.value is None:
            return paired_interval(first[:, 0].tolist(), second[:, 0].tolist(), clusters, share=self.percent)
        one, other = self._over(first), self._over(second)
        return statistic_interval(range(len(both)), lambda chosen: one(chosen) - other(chosen), clusters)

    def _over(self, parts: np.ndarray) -> Callable[[Sequence[int]], float]:
        """The value over chosen rows of parts [items, n]."""
        value = self.value
        assert value is not None
        return lambda chosen: value(parts[np.asarray(chosen)].sum(axis=0))

    def _rows(self, items: Iterable[Item]) -> dict[tuple[Hashable, ...], tuple[Hashable, Sequence[float]]]:
        found = {}
        for item in items:
            parts = self.parts(item)
            if parts is not None:
                found[key_of(item)] = item.get("cluster", item["id"]), parts
        return found


def clusters_of(given: Iterable[Hashable]) -> list[Hashable] | None:
    """The clusters, or None if each item is its own."""
    clusters = list(given)
    return None if len(set(clusters)) == len(clusters) else clusters


def mean_of(name: str, field: str | None = None, **options: Any) -> Measure:
    """The mean of a field of the items, over those in which it is not None; by default the field of the same name."""

    def parts(item: Item) -> Sequence[float] | None:
        value = item.get(field or name)
        return None if value is None else (float(value),)

    return Measure(name, parts, **options)


def ratio_of(name: str, above: str, below: str, **options: Any) -> Measure:
    """The sum of one field over that of another, over items that have both."""

    def parts(item: Item) -> Sequence[float] | None:
        return None if item.get(above) is None else (float(item[above]), float(item[below]))

    return Measure(name, parts, lambda sums: float(sums[0] / sums[1]), **options)


def measured(measures: Iterable[Measure], items: Sequence[Item]) -> dict[str, Any]:
    """The measures by name, each as an `Interval`'s dict, or None."""
    found = {measure.name: measure.interval(items) for measure in measures}
    return {name: None if interval is None else asdict(interval) for name, interval in found.items()}


def by_group(measures: Sequence[Measure], items: Sequence[Item], group: Callable[[Item], str]) -> dict[str, Any]:
    """The measures of each group of items, in the order of the items. One group alone is none."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(group(item), []).append(item)
    return {} if len(groups) < 2 else {name: measured(measures, some) for name, some in groups.items()}
