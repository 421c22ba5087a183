"""What people's judgements come to: win rates, how far people agree with each other and with the judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, Literal

import numpy as np

from transllm_jax.errors import UserError
from transllm_jax.evaluation.people.read import Judgement
from transllm_jax.evaluation.statistics import corrected_interval, mean_interval, paired_interval, statistic_interval
from transllm_jax.evaluation.suites.results import Interval

Level = Literal["nominal", "ordinal"]

# Krippendorff's alpha takes a millisecond.
_RESAMPLES = 1000


def check_krippendorff() -> None:
    """Raises UserError if the library that computes alpha is not installed."""
    try:
        import krippendorff  # noqa: F401
    except ImportError:
        raise UserError(
            "sheets need krippendorff, which is not installed: pip install 'transllm-jax[sheets]'"
        ) from None


def pair_results(
    pair: Mapping[str, Any], judgements: Sequence[Judgement], judge: Mapping[str, float] | None
) -> dict[str, Any]:
    """All numbers of one pair of systems, as JSON; each interval as the dict of an `Interval`.

    pair: of the key. judge: its preferences by question (1 the first system, 0 the second, ½ a tie); None without a
    judge. Every question that was drawn is in the denominator: `best` and `worst` are the win rates if those that
    nobody judged were all won, or lost.
    """
    by_question: dict[str, list[Judgement]] = {}
    for one in judgements:
        by_question.setdefault(one.id, []).append(one)
    drawn = pair["drawn"]
    equal = set(pair["equal"])
    known = {id: 0.5 for id in drawn if id in equal}
    known |= {id: float(np.mean([one.won for one in by_question[id]])) for id in drawn if id in by_question}
    total, missing = sum(known.values()), len(drawn) - len(known)
    sides = Counter(one.side for one in judgements)
    return {
        "first": pair["first"],
        "second": pair["second"],
        "asked": pair["asked"],
        "drawn": len(drawn),
        "equal": sum(id in equal for id in drawn),
        "judged": len(by_question),
        "judgements": len(judgements),
        "people": len({one.annotator for one in judgements}),
        "wins": {name: sum(one.won == won for one in judgements) for name, won in _OUTCOMES.items()},
        "sides": {side: sides[side] for side in ("A", "B", "tie")},
        "win_rate": _recorded(mean_interval([*known.values()], share=True) if known else None),
        "best": (total + missing) / len(drawn),
        "worst": total / len(drawn),
        "alpha": alpha(_coded(judgements), "nominal"),
        "people_agree": _recorded(_people_agree(by_question)),
        "ratings": _ratings(judgements),
        "judge": None if not judge else _judge(judge, by_question, known, equal, drawn),
    }


_OUTCOMES = {"first": 1.0, "second": 0.0, "tie": 0.5}


def alpha(
    units: Mapping[Any, Mapping[int, float]], level: Level, cluster: Callable[[Any], Hashable] = lambda unit: unit
) -> dict[str, Any]:
    """Krippendorff's alpha with its interval, which resamples questions. As JSON.

    units: by unit, each person's value. cluster: the question of a unit, if that is not the unit itself. `value` is
    None where it is not defined, and `why` says so: if no unit has values of two people, or if all values are equal. Of
    `pairable` units, which have values of two or more.
    """
    clusters = [cluster(unit) for unit, values in units.items() if len(values) > 1]
    pairable = [values for values in units.values() if len(values) > 1]
    found = {"level": level, "units": len(units), "pairable": len(pairable)}
    if not pairable:
        return {**found, "interval": None, "why": "no row was judged by two people"}
    if len({value for values in pairable for value in values.values()}) < 2:
        return {**found, "interval": None, "why": "all judgements are equal"}
    interval = statistic_interval(pairable, _alpha_of(level), clusters, resamples=_RESAMPLES)
    return {**found, "interval": _recorded(interval), "why": None}


def _alpha_of(level: Level) -> Callable[[Sequence[Mapping[int, float]]], float]:
    import krippendorff

    def value(units: Sequence[Mapping[int, float]]) -> float:
        people = sorted({person for values in units for person in values})
        table = np.array([[values.get(person, np.nan) for values in units] for person in people])
        if len(np.unique(table[~np.isnan(table)])) < 2:
            return float("nan")
        return float(krippendorff.alpha(reliability_data=table, level_of_measurement=level))

    return value


def _coded(judgements: Sequence[Judgement]) -> dict[str, dict[int, float]]:
    units: dict[str, dict[int, float]] = {}
    for one in judgements:
        units.setdefault(one.id, {})[one.annotator] = one.won
    return units


def _people_agree(by_question: Mapping[str, Sequence[Judgement]]) -> Interval | None:
    """The share of pairs of people who said the same of a question."""
    same, clusters = [], []
    for id, ones in by_question.items():
        for one, other in combinations(ones, 2):
            same.append(float(one.won == other.won))
            clusters.append(id)
    return mean_interval(same, clusters, share=True) if same else None


def _ratings(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    """The mean ratings of both systems, their difference, and ordinal alpha over each answer's ratings."""
    rated = [(one, one.ratings) for one in judgements if one.ratings is not None]
    if not rated:
        return None
    clusters = [one.id for one, _ in rated]
    first, second = ([float(ratings[place]) for _, ratings in rated] for place in (0, 1))
    units: dict[tuple[str, int], dict[int, float]] = {}
    for one, ratings in rated:
        for place in (0, 1):
            units.setdefault((one.id, place), {})[one.annotator] = float(ratings[place])
    return {
        "first": _recorded(mean_interval(first, clusters, share=False)),
        "second": _recorded(mean_interval(second, clusters, share=False)),
        "difference": _recorded(paired_interval(first, second, clusters, share=False)),
        "alpha": alpha(units, "ordinal", lambda unit: unit[0]),
    }


def _judge(
    judge: Mapping[str, float],
    by_question: Mapping[str, Sequence[Judgement]],
    known: Mapping[str, float],
    equal: set[str],
    drawn: Sequence[str],
) -> dict[str, Any]:
    """The judge beside people: its win rate, the same corrected, and how often both say the same."""
    # Nobody has to judge equal answers, and they are no question of taste: for the judge, too, they are ties.
    said = {id: 0.5 if id in equal else won for id, won in judge.items()}
    ids = sorted(said)
    places = {id: place for place, id in enumerate(ids)}
    both = [id for id in drawn if id in known and id in said]
    same: list[float] = []
    clusters: list[str] = []
    decided: list[float] = []
    decided_clusters: list[str] = []
    table: Counter[str] = Counter()
    for id, ones in by_question.items():
        if id not in said:
            continue
        verdict = _outcome(said[id])
        for one in ones:
            mine = _outcome(one.won)
            table[f"{mine}, judge {verdict}"] += 1
            same.append(float(mine == verdict))
            clusters.append(id)
            if "tie" not in (mine, verdict):
                decided.append(float(mine == verdict))
                decided_clusters.append(id)
    values = [said[id] for id in ids]
    return {
        "verdicts": len(ids),
        "both": len(both),
        "win_rate": _recorded(mean_interval(values, share=True)),
        "corrected": _recorded(
            corrected_interval(values, [places[id] for id in both], [known[id] for id in both]) if both else None
        ),
        "agree": _recorded(mean_interval(same, clusters, share=True) if same else None),
        "agree_without_ties": _recorded(mean_interval(decided, decided_clusters, share=True) if decided else None),
        "people_and_judge": dict(sorted(table.items())),
    }


def _outcome(won: float) -> str:
    return "tie" if won == 0.5 else "first" if won > 0.5 else "second"


def _recorded(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else asdict(interval)
