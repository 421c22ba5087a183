"""The report in the terminal, the files that its results are read from, and `transllm status`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from report_sample import QUESTION, jsonl, sample, terminal

from transllm_jax.commands.status import status_table
from transllm_jax.evaluation.page import report
from transllm_jax.evaluation.page.report import (
    conversation_panel,
    summary_table,
    time_sentence,
    write_report,
)
from transllm_jax.stages.report import SKIPPED, SKIPPED_ROWS, _speed, _trained
from transllm_jax.stages.steps import artifact
from transllm_jax.training.record.ledger import Ledger


def test_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "report.html"
    write_report(json.loads(json.dumps(sample())), path)
    first = path.read_bytes()
    assert first.decode("utf-8").startswith("<!doctype html>") and first.rstrip().endswith(b"</html>")

    results = sample()
    results["title"] = "another"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_report(results, path)
    assert path.read_bytes() == first
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]
    write_report(results, path)
    assert b"another" in path.read_bytes()


def test_summary_table() -> None:
    text = terminal(summary_table(sample()))
    line = next(line for line in text.splitlines() if "Thai bits/byte" in line)
    for part in ("↓", "1.532", "1.632", "1.183", "1.191", "1.206", "−21.3 %"):
        assert part in line
    assert next(line for line in text.splitlines() if "Well-formed chains" in line).count("–") == 3
    assert "87.5 %" in text and "original" in text and "transfer" in text
    assert "English drift, KL: change since translate" in text
    narrow = terminal(summary_table(sample()), width=80)
    assert "…" not in narrow and len(narrow.splitlines()) == len(text.splitlines())


def test_conversation_panel() -> None:
    results = sample()
    text = terminal(conversation_panel(results))
    places = [text.index(piece) for piece in (QUESTION, "How can I sleep better?", "Go to bed", "ลองเข้านอน")]
    assert places == sorted(places)
    results["conversations"][1]["raw"] = "[red]x[/red] [INST] \x1b[2J"
    broken = terminal(conversation_panel(results, 1))
    assert "not well formed" in broken and "[red]x[/red] [INST]" in broken and "\x1b" not in broken
    assert "not measured" in terminal(conversation_panel(results, 7))


def test_the_goal_of_well_formed_chains_says_how_different_they_are() -> None:
    from transllm_jax.stages.report import _variety, goals

    chain = {"question_en": "What is it?", "answer_en": "A cat.", "answer_target": "แมว"}
    answers = [{"chain": chain}, {"chain": chain}, {"chain": None}, {"chain": {**chain, "question_en": "Why?"}}]
    measured = {"well_formed_chains": {"transfer": 0.75}}
    goal = next(g for g in goals(measured, "Thai", _variety(answers)) if g["name"] == "Well-formed chains")
    assert goal["measured"] == "75 %; 2 different English questions in 3 chains" and goal["met"] is False
    unmeasured = [g for g in goals({}, "Thai", "") if g["met"] is not None]
    assert unmeasured == []


@pytest.mark.parametrize(
    ("trained", "lost", "restarts", "sentence"),
    [
        (0.83, 240.0, 2, "trained 83 % of 2 h 10 min; 4 min 0 s lost to 2 restarts"),
        (0.8349, 0.0, 1, "trained 83 % of 2 h 10 min; nothing lost to 1 restart"),
        (0.9996, 0.0, 0, "trained 99.96 % of 2 h 10 min"),
        (0.0, 0.0, 0, "trained 0 % of 2 h 10 min"),
        (0.0004, 0.0, 0, "trained 0.04 % of 2 h 10 min"),
    ],
)
def test_the_sentence_about_time(trained: float, lost: float, restarts: int, sentence: str) -> None:
    counted = {"total": 7800.0, "trained": trained, "lost": lost, "restarts": restarts}
    assert time_sentence(counted) == sentence


def test_status_ends_with_the_time(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("title: x\n")
    without = terminal(status_table(tmp_path))
    now = 0.0
    with Ledger(tmp_path / "ledger.jsonl", clock=lambda: now) as book, book.stage("pretrain"):
        with book.spend("step"):
            now = 75.0
        now = 100.0
    assert terminal(status_table(tmp_path)) == f"{without}\ntrained 75 % of 1 min 40 s\n"


def test_the_results_of_a_stage_are_read_from_its_files(tmp_path: Path) -> None:
    places = [f"a: a.txt:{line}" for line in range(SKIPPED_ROWS + 2)]
    updates = [{"step": step, "loss": "nan", "gradient_norm": "nan", "rows": places} for step in range(SKIPPED + 1)]
    jsonl(tmp_path / "skipped.jsonl", *updates)
    jsonl(tmp_path / "validation.jsonl", {"step": 2, "bits_per_byte": 1.5}, {"step": 4, "bits_per_byte": math.nan})
    sources = {"a": {"rows": 3, "left_out": {"contaminated": 1}}}
    found = _trained(tmp_path, {"sources": sources, "skipped": SKIPPED + 1, "best": 2})
    assert found["sources"] == sources and (found["skipped"], found["best"]) == (SKIPPED + 1, 2)
    # A number that is not finite has no name in JSON.
    assert found["validation"] == [{"step": 2, "bits_per_byte": 1.5}, {"step": 4, "bits_per_byte": None}]
    assert [update["step"] for update in found["skipped_updates"]] == list(range(SKIPPED))
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


def test_status_of_a_stage_that_has_begun(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("title: x\n")

    def line() -> str:
        lines = terminal(status_table(tmp_path), width=200).splitlines()
        return re.sub(r" +", " ", next(line for line in lines if line.startswith("pretrain "))).strip()

    place = artifact(tmp_path, "pretrain")
    assert line() == "pretrain to do"
    place.begin({})
    assert line() == "pretrain begun"
    jsonl(place.directory / "metrics.jsonl", {"step": 7, "loss": 2.34567})
    assert line() == "pretrain begun step 7, loss 2.346"
    jsonl(place.directory / "metrics.jsonl", {"step": 7, "loss": 2.3}, {"step": 8, "loss": None})
    assert line() == "pretrain begun step 8, loss not finite"
    jsonl(place.directory / "skipped.jsonl", {"step": 8})
    assert line() == "pretrain begun step 8, loss not finite; 1 update skipped, not finite"
    scores = [(2, 1.5), (4, 1.25), (6, 1.25), (7, math.nan), (8, 1.4)]
    jsonl(place.directory / "validation.jsonl", *({"step": step, "bits_per_byte": bits} for step, bits in scores))
    jsonl(place.directory / "skipped.jsonl", {"step": 3}, {"step": 8})
    best = "best so far 1.250 bits a byte at step 6"
    assert line() == f"pretrain begun step 8, loss not finite; {best}; 2 updates skipped, not finite"
    place.finish({}, {"text": "8 steps [all]", "seconds": 3.2})
    assert line() == "pretrain done 3 s 8 steps [all]"
