"""What a run has recorded so far, as the findings read it, and what a finding is.

Plain numbers, from files that every run writes (`stages/recorded.py` reads them). What was not recorded is missing or
None; a finding that needs it is then not made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transllm_jax.evaluation.page.measures import number, section

# The page that has a section for each finding, under the finding's topic.
PAGE = "docs/reading-a-run.md"


@dataclass(frozen=True)
class Training:
    """A training stage, begun or done.

    losses: the rows of metrics.jsonl. validation: step and bits per byte of each validation on the same text. skipped:
    how many updates were skipped because they were not finite. sources: by name, what the stage's summary says of each
    (empty until the stage is done).
    """

    losses: Sequence[Mapping[str, Any]] = ()
    validation: Sequence[Mapping[str, Any]] = ()
    skipped: int = 0
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorded:
    """A run.

    settings: the content of run.yaml. metrics: value by measure and point. training: the training stages that have
    begun, by name. chains: counts of the answers at point `transfer`: `answers`, and how many are `well_formed`,
    `cut_off` by the limit of tokens, and `broken_off`, which is both cut off and not well-formed; and how many
    `different_questions` the well-formed ones have. asked: by point, the counts of questions with known answers by kind
    (`evaluation.answers.count`). vocabulary: vocabulary/report.json. recover: the summary of stage `recover`. ledger:
    its summary.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    training: Mapping[str, Training] = field(default_factory=dict)
    chains: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    vocabulary: Mapping[str, Any] = field(default_factory=dict)
    recover: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)

    def measured(self, measure: str, point: str) -> float | None:
        """A measure at a point; None if it was not measured."""
        return number(section(self.metrics, measure).get(point))

    def setting(self, key: str) -> Any:
        """The value of a dotted config key; None if it is unset or not known."""
        value: Any = self.settings
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def language(self) -> str:
        """The target language's name."""
        return str(self.setting("language.name") or "target language")


@dataclass(frozen=True)
class Finding:
    """Something that the numbers of a run show, and what to turn.

    topic: the heading of its section in `PAGE`. stage: where it was seen. what: a sentence with its number. turn: what
    to do, in one sentence. keys: the config keys to turn, most promising first.
    """

    topic: str
    stage: str
    what: str
    turn: str
    keys: tuple[str, ...]

    def written(self, run: Recorded) -> dict[str, Any]:
        """The finding as JSON, for results.json. `keys` holds each key with its present value, if that is a number."""
        return {
            "topic": self.topic,
            "stage": self.stage,
            "what": self.what,
            "turn": self.turn,
            "keys": {key: _plain(run.setting(key)) for key in self.keys},
        }


def _plain(value: Any) -> float | int | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
