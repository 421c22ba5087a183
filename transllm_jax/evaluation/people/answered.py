"""The answers that a suite has kept, as people read them: questions and visible answers, nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transllm_jax.disk import read_json, sha256_of_json, whole_lines
from transllm_jax.errors import UserError

ITEMS, RESULTS = "items.jsonl", "results.json"


@dataclass(frozen=True)
class Answered:
    """A question of one or more turns, with the visible answer to each. An answer that is missing is empty.

    item: all that the suite kept of it.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    item: Mapping[str, Any]

    @property
    def questions(self) -> tuple[str, ...]:
        """What was asked, turn by turn."""
        return tuple(question for question, _ in self.turns)

    @property
    def answers(self) -> tuple[str, ...]:
        """What was answered, turn by turn."""
        return tuple(answer for _, answer in self.turns)

    @property
    def hash(self) -> str:
        """Of the texts."""
        return sha256_of_json(self.turns)


def read_answered(directory: Path) -> dict[str, Answered]:
    """The answered questions of a suite's directory by id. Raises UserError if it holds none that people can read."""
    path = directory / ITEMS
    if not path.exists():
        raise UserError(f"{path} does not exist; evaluate the system first: transllm evaluate SYSTEM --suite ...")
    found = {}
    for number, line in enumerate(whole_lines(path), 1):
        try:
            item = json.loads(line)
            one = Answered(str(item["id"]), _turns(item), item)
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number} holds no question with a visible answer; people compare answers of suites such as "
                "mt_bench, alpaca_eval, questions and answers"
            ) from None
        found[one.id] = one
    if not found:
        raise UserError(f"{path} is empty; evaluate the system first: transllm evaluate SYSTEM --suite ...")
    return found


def suites_in(results: Path) -> dict[str, list[str]]:
    """Which systems each suite of a directory of results (`RESULTS/SYSTEM/SUITE`) was run on."""
    found: dict[str, list[str]] = {}
    for path in sorted(results.glob(f"*/*/{ITEMS}")):
        found.setdefault(path.parent.name, []).append(path.parent.parent.name)
    return found


def preferences(
    first: Mapping[str, Answered],
    second: Mapping[str, Answered],
    directories: tuple[Path, Path],
    names: tuple[str, str],
) -> dict[str, float]:
    """What the suite's judge says of each question: 1 the first system is better, 0 the second, ½ a tie.

    A pairwise verdict counts where one system was the other's baseline; elsewhere, the two scores are compared. Empty
    if there is neither; a question without a verdict is left out.
    """
    for mine, against, directory, turned in (
        (first, names[1], directories[0], False),
        (second, names[0], directories[1], True),
    ):
        if _baseline(directory) == against:
            scores = {id: _score(one) for id, one in mine.items()}
            return {id: 1 - score if turned else score for id, score in scores.items() if score is not None}
    if _baseline(directories[0]) is not None or _baseline(directories[1]) is not None:
        return {}
    pairs = ((id, _score(one), _score(second[id])) for id, one in first.items() if id in second)
    return {id: 0.5 + (a > b) / 2 - (a < b) / 2 for id, a, b in pairs if a is not None and b is not None}


def _turns(item: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The turns of an item in one of its forms: `question` and `visible`, or `turns`, each with both."""
    if "turns" not in item:
        return ((_text(item["question"]), _text(item["visible"])),)
    asked = item.get("questions") or [turn["question"] for turn in item["turns"]]
    return tuple((_text(one), _text(turn["visible"])) for one, turn in zip(asked, item["turns"], strict=True))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _score(one: Answered) -> float | None:
    score = one.item.get("score")
    return float(score) if isinstance(score, (int, float)) else None


def _baseline(directory: Path) -> str | None:
    path = directory / RESULTS
    made_with = read_json(path).get("made_with") if path.exists() else None
    baseline = made_with.get("baseline") if isinstance(made_with, Mapping) else None
    return baseline if isinstance(baseline, str) else None
