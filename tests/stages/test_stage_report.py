"""The results from which the report of a run is made."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from transllm_jax.stages.report import SKIPPED_ROWS, SKIPPED_SHOWN, _speed, _trained, _variety, goals


def jsonl(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_results_are_read_from_the_files_of_a_stage(tmp_path: Path) -> None:
    places = [f"a: a.txt:{line}" for line in range(SKIPPED_ROWS + 2)]
    updates = [
        {"step": step, "loss": "nan", "gradient_norm": "nan", "rows": places} for step in range(SKIPPED_SHOWN + 1)
    ]
    jsonl(tmp_path / "skipped.jsonl", *updates)
    jsonl(tmp_path / "validation.jsonl", {"step": 2, "bits_per_byte": 1.5}, {"step": 4, "bits_per_byte": math.nan})
    sources = {"a": {"rows": 3, "left_out": {"contaminated": 1}}}
    found = _trained(tmp_path, {"sources": sources, "skipped": SKIPPED_SHOWN + 1, "best": 2})
    assert found["sources"] == sources and (found["skipped"], found["best"]) == (SKIPPED_SHOWN + 1, 2)
    # JSON cannot write a number that is not finite.
    assert found["validation"] == [{"step": 2, "bits_per_byte": 1.5}, {"step": 4, "bits_per_byte": None}]
    assert [update["step"] for update in found["skipped_updates"]] == list(range(SKIPPED_SHOWN))
    assert {tuple(update["rows"]) for update in found["skipped_updates"]} == {tuple(places[:SKIPPED_ROWS])}
    assert {update["more_rows"] for update in found["skipped_updates"]} == {2}

    slow = [{"step": step, "memory_bytes": size} for step, size in ((1, 100), (2, 300), (3, 200))]
    slow[1] |= {"tokens_per_second": 50.0, "model_flops_utilisation": 0.4}
    slow[2] |= {"tokens_per_second": 70.0, "model_flops_utilisation": 0.2}
    jsonl(tmp_path / "speed.jsonl", *slow)
    speed = {"tokens_per_second": 64.0, "model_flops_utilisation": pytest.approx(0.3), "memory_bytes": 300}
    assert _speed(tmp_path, {"tokens_per_second": 64.0}) == speed
    assert _speed(tmp_path, {"tokens_per_second": 0.0}) == speed | {"tokens_per_second": 60.0}

    missing = tmp_path / "none"
    assert set(_speed(missing, {}).values()) == {None}
    assert _trained(missing, {}) == {
        "sources": None,
        "best": None,
        "validation": [],
        "skipped": None,
        "skipped_updates": [],
    }


def test_the_goal_of_well_formed_chains_counts_different_questions() -> None:
    chain = {"question_en": "What is it?", "answer_en": "A cat.", "answer_target": "แมว"}
    answers = [{"chain": chain}, {"chain": chain}, {"chain": None}, {"chain": {**chain, "question_en": "Why?"}}]
    measured = {"well_formed_chains": {"transfer": 0.75}}
    goal = next(g for g in goals(measured, "Thai", _variety(answers)) if g["name"] == "Well-formed chains")
    assert goal["measured"] == "75 %; 2 different English questions in 3 chains" and goal["met"] is False
    unmeasured = [g for g in goals({}, "Thai", "") if g["met"] is not None]
    assert unmeasured == []
