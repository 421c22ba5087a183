"""What a suite found: numbers, each with its interval and its number of samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval, and the number of samples it rests on (clusters, where samples are clustered)."""

    value: float
    low: float
    high: float
    samples: int
    level: float = 0.95


@dataclass(frozen=True)
class Results:
    """What a suite found, as its results.json: no number without its number of samples.

    score: the suite's one measure, named `measure`; None if nothing could be measured. asked: all questions, which is
    the denominator. parsed: those that have a score (an answer that a judge's verdict could be read for; elsewhere,
    that was given). best, worst: the score if all that could not be parsed were as good, or as bad, as can be. more:
    further measures, each an `Interval` as a dict, or counts. groups: the same by category or kind. notes: what a
    reader of the numbers has to know. contamination: how many of the questions occur in the training data of the
    system's run; None if that was not looked for.
    """

    suite: str
    system: str
    measure: str
    score: float | None
    interval: tuple[float, float] | None
    asked: int
    parsed: int
    higher_is_better: bool = True
    best: float | None = None
    worst: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    contamination: dict[str, Any] | None = None

    def recorded(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
