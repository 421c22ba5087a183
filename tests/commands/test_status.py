"""`transllm status`: the state of each stage, the time of the run, what it found, and the next command."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, copy_run
from etils import epath
from rich.console import Console

from transllm_jax.commands import status
from transllm_jax.commands.status import status_table
from transllm_jax.disk import locked, read_json
from transllm_jax.errors import UserError
from transllm_jax.evaluation.page.report import findings_lines
from transllm_jax.stages.evaluate import counts_of_chains
from transllm_jax.stages.steps import STEPS, artifact
from transllm_jax.storage import Workdir
from transllm_jax.training.record.ledger import Ledger


def terminal(renderable: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable, crop=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def jsonl(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_the_last_line_is_the_time(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("title: x\n")
    without = terminal(status_table(tmp_path))
    now = 0.0
    with Ledger(tmp_path / "ledger.jsonl", clock=lambda: now) as book, book.stage("pretrain"):
        with book.spend("step"):
            now = 75.0
        now = 100.0
    table, begin = without.split("\n\n")
    assert begin.startswith("begin ")
    assert terminal(status_table(tmp_path)) == f"{table}\n\ntrained 75 % of 1 min 40 s\n\n{begin}"


def test_a_stage_in_each_of_its_states(tmp_path: Path) -> None:
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


def last_lines(printed: str) -> list[str]:
    """The lines after the last empty one: the next commands, without their headings."""
    return [re.split(r"  +", line)[-1] for line in printed.rstrip().split("\n\n")[-1].splitlines()]


def test_a_run_that_is_not_begun(tmp_path: Path) -> None:
    place = tmp_path / "my run"
    with pytest.raises(UserError, match=r"it has no run\.yaml.*transllm run CONFIG --workdir '.*my run'"):
        status_table(place)
    place.mkdir()
    (place / "run.yaml").write_text("title: x\n")
    printed = terminal(status_table(place), width=300)
    assert "begin " in printed and "What to do next" not in printed
    assert last_lines(printed) == [f"transllm run '{place}/run.yaml' --workdir '{place}'"]
    artifact(place, "base").begin({})
    assert "go on with base " in terminal(status_table(place), width=300)
    # A narrow terminal does not break a command, which is to be copied.
    assert last_lines(terminal(status_table(place), width=40)) == last_lines(printed)


def test_a_run_at_work(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("title: x\n")
    with locked(tmp_path):
        assert last_lines(terminal(status_table(tmp_path))) == ["a run is at work here now, on base"]
    assert last_lines(terminal(status_table(tmp_path), width=300))[0].startswith("transllm run ")


def test_the_findings_of_an_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("recover: {max_new_tokens: 64}\npretrain: {learning_rate: 0.5}\n")
    artifact(tmp_path, "pretrain").begin({})
    jsonl(tmp_path / "pretrain" / "skipped.jsonl", {"step": 8})
    jsonl(tmp_path / "pretrain" / "metrics.jsonl", {"step": 8, "loss": None})
    artifact(tmp_path, "recover").finish({}, {"text": "x", "seconds": 1.0, "answers": 10, "unfinished": 5})
    printed = re.sub(r"\s+", " ", terminal(status_table(tmp_path), width=80))
    assert "What to do next docs/reading-a-run.md has a section on each 1 Updates were skipped (pretrain)." in printed
    assert "not finite in 1 of 8 steps." in printed and "pretrain.learning_rate (0.5), pretrain.clip_norm," in printed
    assert "2 Answers were cut off (recover). 5 of 10 answers" in printed and "64 tokens cut them off" in printed


def test_what_became_of_questions_with_known_answers(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("title: x\nlanguage: {code: sw, name: Swahili}\n")
    assert "Asked" not in terminal(status_table(tmp_path))
    for point, right in (("base", 1), ("vocabulary", 0), ("pretrain", 4)):
        counts = {"sum": {"asked": 5, "right": right, "asked_in_english": 5, "right_in_english": 5 - right}}
        summary = {"text": "x", "seconds": 1.0, "metrics": {}, "asked": counts}
        artifact(tmp_path, f"evaluation/{point}").finish({}, summary)
    assert (
        "Asked 5 questions in Swahili, the original answers 1 rightly, the model after pretrain 4. Asked in English, "
        "the original answers 4 rightly, the model after pretrain 1."
    ) in re.sub(r"\s+", " ", terminal(status_table(tmp_path)))


def test_a_damaged_run_file_is_named(tmp_path: Path) -> None:
    for content in ("a: [", "just text"):
        (tmp_path / "run.yaml").write_text(content)
        with pytest.raises(UserError, match=r"run\.yaml is damaged"):
            status_table(tmp_path)


def test_a_finished_run_says_what_its_report_says(transllm: Command, finished_run: Path) -> None:
    code, printed = transllm("status", finished_run)
    assert code == 0
    results = read_json(finished_run / "evaluation" / "results.json")
    assert results["findings"], "a tiny model in four steps leaves much to do"
    told = terminal(findings_lines(results["findings"]), width=300)
    assert told in printed
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    for finding in results["findings"]:
        assert f"<strong>{finding['topic']}</strong>" in page
    assert last_lines(printed)[0] == f"transllm chat {finished_run} --show-chain"
    assert last_lines(printed)[2] == f"transllm convert to-peft {finished_run} DST"


def test_the_command_to_go_on_goes_on(transllm: Command, finished_run: Path, tmp_path: Path) -> None:
    copy_run(finished_run, tmp_path)
    workdir = tmp_path / "run"
    for step in STEPS:
        if step.name in ("export", "report"):
            shutil.rmtree(workdir / step.directory)
    code, printed = transllm("status", workdir)
    (command,) = last_lines(printed)
    assert code == 0 and command.startswith("transllm run ") and "go on with export" in printed
    assert transllm(*shlex.split(command)[1:])[0] == 0
    assert last_lines(transllm("status", workdir)[1])[0].startswith("transllm chat ")


def test_counts_of_an_evaluation_are_in_its_manifest(finished_run: Path) -> None:
    for point in ("base", "transfer"):
        place = finished_run / "evaluation" / point
        summary, results = read_json(place / "manifest.json")["summary"], read_json(place / "results.json")
        assert summary["metrics"] == results["metrics"]
        # A random model hardly ever ends an answer by itself.
        assert summary["chains"]["answers"] == 3 and summary["chains"]["cut_off"] > 0
        assert summary["chains"]["cut_off"] == sum(answer["cut_off"] for answer in results["answers"])


def test_counts_of_chains() -> None:
    chain = {"question_en": "What?", "answer_en": "A cat.", "answer_target": "แมว"}
    other = {**chain, "question_en": "Why?"}
    answers = [
        {"chain": found, "cut_off": cut}
        for found, cut in ((chain, False), (chain, True), (other, True), (None, True), (None, False))
    ]
    counts = {"answers": 5, "well_formed": 3, "different_questions": 2, "cut_off": 3, "broken_off": 1}
    assert counts_of_chains(answers) == counts


def test_a_run_on_a_store_pulls_only_small_files(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_run(finished_run, tmp_path)
    store, pulled = epath.Path(tmp_path / "store"), []
    there = Workdir(tmp_path / "run", store)
    for name in ("run.yaml", "ledger.jsonl", *(step.directory for step in STEPS if step.name != "report")):
        there.push(name)

    class Elsewhere(Workdir):
        name = "gs://bucket/run"

        def pull(self, name: str) -> bool:
            pulled.append(name)
            return super().pull(name)

    monkeypatch.setattr(status, "open_workdir", lambda _given, directory: Elsewhere(directory, store))
    printed = terminal(status_table("gs://bucket/run"), width=300)
    results = read_json(finished_run / "evaluation" / "results.json")
    assert terminal(findings_lines(results["findings"]), width=300) in printed
    assert "go on with report" in printed and "transllm run CONFIG --workdir gs://bucket/run" in printed
    logs = ("metrics.jsonl", "validation.jsonl", "skipped.jsonl")
    small = ("manifest.json", *logs)
    others = {name for name in pulled if not name.endswith(small)}
    assert others == {"run.yaml", "ledger.jsonl", "vocabulary/report.json"}
