"""What people said of two systems, kept beside the results of the suite: there the report and the commands find it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transllm_jax.disk import read_json, sha256_of_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.evaluation.suites.answered import preferences, read_answered

# In a directory of results, of all suites; and in a directory of sheets, of these.
PEOPLE = "people.json"


@dataclass(frozen=True)
class Kept:
    """What people said of a pair of systems.

    sheets: the directory of the sheets. pair: the numbers of `agreement.pair_results`; without those of the judge if
    its verdicts have changed. left_out: rows of the sheets, of all pairs, that had a problem. changed: what is not as
    it was when the sheets were read; if these are the answers, people have judged other ones.
    """

    sheets: str
    pair: Mapping[str, Any]
    left_out: int
    changed: Literal["", "answers", "verdicts"] = ""


def keep(results: Path, sheets: Path, key: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Keep what was found in RESULTS/people.json, in place of what the same sheets had said before.

    results: a directory of results. sheets: the directory of the sheets. key: theirs. found: what came of them, with
    `pairs` in the order of the key's.
    """
    suite = key["suite"]
    mine = {
        "key": sha256_of_json(key),
        "sheets": str(sheets),
        "suite": suite,
        "left_out": len(found["left_out"]),
        "pairs": [
            {
                **result,
                "ids": sorted(pair["hashes"]),
                "answers": sha256_of_json(pair["hashes"]),
                "verdicts": _verdicts(results, suite, pair) if result["judge"] is not None else None,
            }
            for pair, result in zip(key["pairs"], found["pairs"], strict=True)
        ],
    }
    others = [one for one in _read(results) if one["key"] != mine["key"]]
    write_json(results / PEOPLE, {"sheets": [*others, mine]})


def kept(results: Path, suite: str) -> list[Kept]:
    """What is kept of a suite, in the order in which it was read; empty if there is nothing."""
    return [
        _checked(results, suite, one, pair) for one in _read(results) if one["suite"] == suite for pair in one["pairs"]
    ]


def answers_now(results: Path, suite: str, pair: Mapping[str, Any], ids: Iterable[str]) -> dict[str, list[str | None]]:
    """The hashes of both systems' answers to questions, as a key has them. Raises UserError if there are no answers."""
    first, second = (read_answered(results, pair[side], suite) for side in ("first", "second"))
    return {id: [answered[id].hash if id in answered else None for answered in (first, second)] for id in ids}


def _checked(results: Path, suite: str, one: Mapping[str, Any], pair: Mapping[str, Any]) -> Kept:
    try:
        is_same = sha256_of_json(answers_now(results, suite, pair, pair["ids"])) == pair["answers"]
    except UserError:
        is_same = False
    if not is_same:
        return Kept(one["sheets"], pair, one["left_out"], "answers")
    if _verdicts(results, suite, pair) != pair["verdicts"]:
        return Kept(one["sheets"], {**pair, "judge": None}, one["left_out"], "verdicts")
    return Kept(one["sheets"], pair, one["left_out"])


def _verdicts(results: Path, suite: str, pair: Mapping[str, Any]) -> str | None:
    """The hash of what the judge says now; None if it says nothing."""
    found = preferences(results, suite, pair["first"], pair["second"])
    return sha256_of_json(found) if found else None


def _read(results: Path) -> list[dict[str, Any]]:
    path = results / PEOPLE
    if not path.exists():
        return []
    found = read_json(path).get("sheets")
    if not isinstance(found, list):
        raise UserError(
            f"{path} is not what `transllm evaluate sheets read` keeps there; remove it, and read the sheets again"
        )
    return found
