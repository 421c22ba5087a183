"""The answers that a suite has kept, as people read them: questions and visible answers, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transllm_jax.disk import read_json, sha256_of_json, whole_lines
from transllm_jax.errors import UserError

ITEMS, RESULTS = "items.jsonl", "results.json"

# (what was asked, what was answered), turn by turn.
Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Answered:
    """A question of one or more turns, with the visible answer to each. An answer that is missing is empty.

    mark: what the suite says of the answers, in words; empty if it says nothing.
    """

    id: str
    turns: Turns
    mark: str = ""

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


def read_answered(results: Path, system: str, suite: str) -> dict[str, Answered]:
    """The answered questions of a system by id, from `RESULTS/SYSTEM/SUITE`.

    A system that was only a judge's baseline has no results of its own; its answers are among those of the others.
    Raises UserError if there are none that people can read.
    """
    path = results / system / suite / ITEMS
    if path.exists():
        found = _read(path, _turns)
    else:
        compared = next((one for one in _items(results, suite) if _baseline(one.parent) == system), None)
        if compared is None:
            raise UserError(
                f"{path} does not exist; evaluate the system first: transllm evaluate SYSTEM --suite {suite}"
            )
        found = _read(compared, _baseline_turns)
    if not found:
        raise UserError(f"{path} is empty; evaluate the system first: transllm evaluate SYSTEM --suite {suite}")
    return found


def suites_in(results: Path) -> dict[str, list[str]]:
    """Which systems have answers of each suite in a directory of results, baselines of judges included."""
    found: dict[str, list[str]] = {}
    for suite in sorted({path.parent.name for path in _items(results, "*")}):
        paths = _items(results, suite)
        baselines = [_baseline(path.parent) for path in paths]
        names = [*(path.parent.parent.name for path in paths), *(name for name in baselines if name is not None)]
        found[suite] = list(dict.fromkeys(names))
    return found


def preferences(results: Path, suite: str, first: str, second: str) -> dict[str, float]:
    """What the suite's judge says of each question: 1 the first system is better, 0 the second, ½ a tie.

    Of several turns, it is the mean. The verdicts on both count where one system was the other's baseline; elsewhere
    their ratings, or scores, are compared. Empty if there is neither; a question without a verdict is left out.
    """
    for name, other, turned in ((first, second, False), (second, first, True)):
        directory = results / name / suite
        if (directory / ITEMS).exists() and _baseline(directory) == other:
            wins = _means(_values(directory, "win"))
            return {id: 1 - won if turned else won for id, won in wins.items()}
    paths = [results / name / suite for name in (first, second)]
    if not all((path / ITEMS).exists() for path in paths):
        return {}
    found = [_values(path, "rating") or ({} if _baseline(path) else _values(path, "score")) for path in paths]
    # Turns that only one of them has a verdict on say nothing about the two.
    mine, theirs = (_means({key: own[key] for key in own if all(key in both for both in found)}) for own in found)
    return {id: 0.5 + (mine[id] > theirs[id]) / 2 - (mine[id] < theirs[id]) / 2 for id in mine}


def _items(results: Path, suite: str) -> list[Path]:
    return sorted(results.glob(f"*/{suite}/{ITEMS}"))


def _rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The items with their line's number and the id of their question, of which each turn may be an item."""
    for number, line in enumerate(whole_lines(path), 1):
        try:
            item = json.loads(line)
            # Only suites of open questions have an item for each turn.
            yield number, str(item["cluster"] if "questions" in item else item["id"]), item
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}:{number} is no item of a suite; remove the line, and evaluate again") from None


def _read(path: Path, turns: Callable[[Mapping[str, Any]], Turns]) -> dict[str, Answered]:
    found: dict[str, Answered] = {}
    for number, id, item in _rows(path):
        try:
            one = Answered(id, turns(item), _mark(item) if turns is _turns else "")
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}:{number} holds no question with a visible answer; people compare answers of suites such as "
                "mt_bench, alpaca_eval, questions, answers and translation"
            ) from None
        # The item of the last turn has all turns.
        if id not in found or len(found[id].turns) < len(one.turns):
            found[id] = one
    return found


def _turns(item: Mapping[str, Any]) -> Turns:
    """Of an item in one of its forms: a translation, a question, or turns, with the questions in them or beside."""
    if "translation" in item:
        return ((_text(item["source"]), _text(item["translation"])),)
    if "turns" not in item:
        return ((_text(item["question"]), _text(item["visible"])),)
    asked = item.get("questions") or [turn["question"] for turn in item["turns"]]
    return _paired(asked, [turn["visible"] for turn in item["turns"]])


def _mark(item: Mapping[str, Any]) -> str:
    if item.get("error"):
        return "no answer"
    if isinstance(item.get("right"), bool):
        return "right" if item["right"] else "wrong"
    if isinstance(item.get("rating"), (int, float)):
        return f"rated {item['rating']:.3g}"
    wins = {1.0: "better than the baseline", 0.5: "as good as the baseline", 0.0: "worse than the baseline"}
    return wins.get(item["win"], "") if isinstance(item.get("win"), (int, float)) else ""


def _baseline_turns(item: Mapping[str, Any]) -> Turns:
    return _paired(item["questions"], item["baseline"])


def _paired(asked: Sequence[Any], answers: Sequence[Any]) -> Turns:
    return tuple((_text(one), _text(other)) for one, other in zip(asked, answers, strict=True))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _values(directory: Path, field: str) -> dict[tuple[str, str], float]:
    """A field of the items in which it is a number, by the ids of the question and of the item."""
    return {
        (id, str(item["id"])): float(item[field])
        for _, id, item in _rows(directory / ITEMS)
        if isinstance(item.get(field), (int, float))
    }


def _means(values: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """The mean of each question's values."""
    by_question: dict[str, list[float]] = {}
    for (id, _), value in values.items():
        by_question.setdefault(id, []).append(value)
    return {id: sum(own) / len(own) for id, own in by_question.items()}


def _baseline(directory: Path) -> str | None:
    path = directory / RESULTS
    made_with = read_json(path).get("made_with") if path.exists() else None
    baseline = made_with.get("baseline") if isinstance(made_with, Mapping) else None
    return baseline if isinstance(baseline, str) else None
