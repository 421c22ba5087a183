"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# Upper bounds of the seconds that are counted together.
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)

Labels = tuple[tuple[str, str], ...]


@dataclass
class _Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0


class Metrics:
    """Counters and histograms by name and labels. A label's values must be few, and none may be a user's text."""

    def __init__(self) -> None:
        self._help: dict[str, str] = {}
        self._counters: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, _Histogram]] = {}

    def count(self, name: str, meaning: str, by: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._help[name] = meaning
        values = self._counters.setdefault(name, {})
        key = tuple(sorted(labels.items()))
        values[key] = values.get(key, 0) + by

    def observe(self, name: str, meaning: str, seconds: float, **labels: str) -> None:
        """Add to a histogram of seconds."""
        self._help[name] = meaning
        found = self._histograms.setdefault(name, {}).setdefault(tuple(sorted(labels.items())), _Histogram())
        found.counts[bisect_left(SECONDS, seconds)] += 1
        found.total += seconds

    def mean(self, name: str) -> float | None:
        """The mean of a histogram over all labels; None if nothing was observed."""
        found = list(self._histograms.get(name, {}).values())
        count = sum(sum(one.counts) for one in found)
        return sum(one.total for one in found) / count if count else None

    def text(self, gauges: Iterable[tuple[str, str, Mapping[str, str], float]] = ()) -> str:
        """Everything, with values that are read now: name, meaning, labels, value."""
        lines: list[str] = []
        for name, values in self._counters.items():
            lines += self._head(name, "counter")
            lines += [f"{name}{_labels(key)} {value:g}" for key, value in values.items()]
        for name, found in self._histograms.items():
            lines += self._head(name, "histogram")
            for key, histogram in found.items():
                below = 0
                for bound, count in zip((*map(str, SECONDS), "+Inf"), histogram.counts, strict=True):
                    below += count
                    lines.append(f"{name}_bucket{_labels((*key, ('le', bound)))} {below}")
                lines += [f"{name}_sum{_labels(key)} {histogram.total:.6f}", f"{name}_count{_labels(key)} {below}"]
        told: set[str] = set()
        for name, meaning, labels, value in gauges:
            self._help[name] = meaning
            lines += [] if name in told else self._head(name, "gauge")
            told.add(name)
            lines.append(f"{name}{_labels(tuple(labels.items()))} {value:g}")
        return "\n".join(lines) + "\n"

    def _head(self, name: str, kind: str) -> list[str]:
        return [f"# HELP {name} {self._help[name]}", f"# TYPE {name} {kind}"]


def _labels(pairs: Labels) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in pairs) + "}" if pairs else ""
