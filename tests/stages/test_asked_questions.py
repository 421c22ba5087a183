"""A run with checkable questions: what it measures, where a person sees it, and which files are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, call, copy_run, tiny_run, write_config, write_tiny_model

from transllm_jax.choices import POINTS
from transllm_jax.config import load_config
from transllm_jax.disk import read_json
from transllm_jax.errors import Preempted
from transllm_jax.evaluation import asked
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import evaluate
from transllm_jax.stages.run import Run

CAPITAL: dict[str, Any] = {
    "key": "ignored",
    "kind": "capital",
    "question": "เมืองหลวงของไทยคือเมืองอะไร",
    "answers": ["กรุงเทพ"],
    "question_en": ["What is the capital of Thailand?", "Which city is the capital of Thailand?"],
    "answers_en": ["Bangkok"],
}
FOLLOW_UP: dict[str, Any] = {
    "kind": "language",
    "question": "แล้วผู้คนที่นั่นพูดภาษาอะไร",
    "answers": ["ไทย"],
    "question_en": "And which language do people speak there?",
    "answers_en": ["Thai"],
    "history": [
        {"role": "user", "content": "เมืองหลวงของไทยคือเมืองอะไร"},
        {"role": "assistant", "content": "กรุงเทพ"},
    ],
    "history_en": [
        {"role": "user", "content": "What is the capital of Thailand?"},
        {"role": "assistant", "content": "Bangkok."},
    ],
}
# Without English.
ALONE: dict[str, Any] = {"question": "สองบวกสองเท่ากับเท่าไร", "answers": ["สี่", "4"]}


def write_questions(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def with_answers(model: Path, workdir: Path, questions: Path, **more: object) -> dict[str, object]:
    """The section of a tiny run's evaluation with these questions."""
    section: Any = tiny_run(model, workdir)["evaluation"]
    return {**section, "answers": str(questions), "max_answer_tokens": 6, **more}


@pytest.fixture(scope="module")
def asked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished run with questions; do not change it."""
    here = tmp_path_factory.mktemp("asked")
    write_tiny_model(here / "model")
    questions = write_questions(here / "questions.jsonl", CAPITAL, FOLLOW_UP, ALONE, {**ALONE, "kind": "fourth"})
    section = with_answers(here / "model", here / "run", questions, max_questions=3, max_questions_between=2)
    write_config(here / "config.yaml", tiny_run(here / "model", here / "run", evaluation=section))
    assert call("run", here / "config.yaml") == 0
    return here / "run"


def test_every_point_is_asked_in_both_languages(asked_run: Path) -> None:
    for point in POINTS:
        results = read_json(asked_run / "evaluation" / point / "results.json")
        rows, metrics = results["asked"]["questions"], results["metrics"]
        number = 3 if point in ("base", "transfer") else 2
        asked = (CAPITAL, FOLLOW_UP, ALONE)[:number]
        assert [row["question"] for row in rows] == [row["question"] for row in asked]
        assert results["counts"]["questions"] == number
        assert metrics["answers"] == sum(row["right"] for row in rows) / number
        english = [row["english"] for row in rows]
        assert english[2:] == [None] * (number - 2) and english[0]["question"] == CAPITAL["question_en"][0]
        assert metrics["answers_in_english"] == sum(answer["right"] for answer in english[:2]) / 2
        assert results["asked"]["counts"]["capital"]["asked"] == 1
        assert ("understood" in metrics) == (point == "transfer") == ("reason" in rows[0])
    # A random model writes no chain.
    assert [row["reason"] for row in rows] == ["form"] * 3 and rows[0]["understood"] is False
    assert metrics["understood"] == metrics["answers_chain_english"] == 0
    assert results["asked"]["counts"][""]["form"] == 1


def test_a_person_sees_it_at_the_end_in_status_and_on_the_page(asked_run: Path, transllm: Command) -> None:
    sentence = (
        r"Asked 3 questions in Thai, the original answers \d rightly, this model \d\. Asked 2 of them in English,"
    )
    code, printed = transllm("run", asked_run.parent / "config.yaml")
    assert code == 0 and re.search(sentence, printed)
    heading = next(line for line in printed.splitlines() if "mistranslated" in line)
    assert heading.split("  ") and "Thai right" in heading and "misread" in heading
    assert re.search(r"capital +1 +0 +0 +\d +1 +0 +0 +0", printed) and "Conversation 1 of 3" in printed
    assert "Right in Thai ↑" in printed
    assert re.search(sentence, transllm("status", asked_run)[1])
    page = (asked_run / "report.html").read_text(encoding="utf-8")
    assert re.search(sentence, page) and "Questions with known answers" in page
    for text in (CAPITAL["question"], FOLLOW_UP["history"][1]["content"], "no whole chain"):
        assert text in page
    assert {"answers", "answers_in_english", "understood"} <= read_json(asked_run / "evaluation/results.json")[
        "metrics"
    ].keys()


def test_a_run_without_questions_looks_as_before(finished_run: Path, transllm: Command) -> None:
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    assert "known answers" not in page and "Right answers" not in page
    assert "Asked" not in transllm("status", finished_run)[1]
    inputs = read_json(finished_run / "evaluation/base/manifest.json")["inputs"]
    assert not [
        key
        for key in inputs
        if key.startswith(("evaluation.answers", "evaluation.max_questions", "evaluation.max_answer"))
    ]


def test_questions_of_an_evaluation_that_was_stopped_are_not_asked_again(
    asked_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(asked_run, tmp_path / "run")
    config = load_config(asked_run.parent / "config.yaml")
    directory = tmp_path / "run" / "evaluation" / "pretrain"
    shutil.rmtree(directory)
    directory.mkdir()

    def fresh() -> Run:
        return Run(config, tmp_path / "run", Progress(quiet=True), Interrupt())

    def refuse(*given: Any) -> Any:
        raise Preempted("stop")

    with monkeypatch.context() as patch:
        patch.setattr(asked.English, "answers", refuse)
        with pytest.raises(Preempted, match="6 of 7 parts"):
            evaluate.run_evaluation(fresh(), directory, "pretrain")
    assert "questions with known answers" in read_json(directory / "so_far.json")
    monkeypatch.setattr(asked.Asking, "in_target", refuse)
    evaluate.run_evaluation(fresh(), directory, "pretrain")
    before = read_json(asked_run / "evaluation" / "pretrain" / "results.json")
    assert read_json(directory / "results.json")["asked"] == before["asked"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": []}, "field 'answers' is empty"),
        ({"answers": ["", "x"]}, "field 'answers' is empty"),
        ({"answers": "กรุงเทพ"}, "field 'answers' must be a list"),
        ({"question": " "}, "field 'question' is empty"),
        ({"question_en": None}, "has answers_en but no question_en"),
        ({"answers_en": None}, "has question_en but no answers_en"),
        ({"kind": 3}, "field 'kind' must be a string"),
        ({"history": FOLLOW_UP["history"]}, "history has 2 messages and history_en 0"),
        ({**FOLLOW_UP, "history": FOLLOW_UP["history"][:1]}, "the roles of history must be user and assistant"),
        ({**FOLLOW_UP, "history_en": [{"role": "user"}]}, "field 'history_en.content' must be a string"),
        ({"question": "อะไร<|im_end|>"}, "contains the special token <|im_end|>"),
        ({"answers_en": ["<RESPONSE>"]}, "contains the special token <RESPONSE>"),
        ({"question": "ยาว " * 400}, "and evaluation.max_answer_tokens 6 exceed the model's context of 512"),
        ({"question": "ยาว " * 60}, "and evaluation.max_chain_tokens 340 exceed the model's context of 512"),
    ],
)
def test_a_bad_record_is_one_line_with_its_place(
    finished_run: Path, tmp_path: Path, transllm: Command, row: dict[str, Any], message: str
) -> None:
    questions = write_questions(tmp_path / "questions.jsonl", FOLLOW_UP, {**CAPITAL, **row})
    section = with_answers(finished_run.parent / "model", tmp_path / "run", questions, max_chain_tokens=340)
    config = copy_run(finished_run, tmp_path, ["base"], evaluation=section)
    code, printed = transllm("run", config, "--until", "vocabulary")
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1
    assert errors[0].startswith(f"error: {questions}:2") and message in errors[0]
    assert not (tmp_path / "run" / "vocabulary").exists()


def test_a_file_of_questions_that_is_also_trained_on_is_refused(
    finished_run: Path, tmp_path: Path, transllm: Command
) -> None:
    questions = write_questions(tmp_path / "questions.jsonl", CAPITAL)
    model = finished_run.parent / "model"
    tree: Any = tiny_run(model, tmp_path / "run", evaluation=with_answers(model, tmp_path / "run", questions))
    tree["pretrain"]["sources"] += [{"path": str(questions), "fields": ["question"]}]
    code, printed = transllm("run", write_config(tmp_path / "config.yaml", tree))
    assert code == 2 and "evaluation.answers: " in printed and "is also trained on" in printed
