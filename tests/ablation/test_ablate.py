"""`transllm ablate` on a tiny model: what is shared, what a killed one leaves, and what the page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLES, Command, call, tiny_run, write_config, write_tiny_model

from transllm_jax.ablation import work
from transllm_jax.ablation.results import read_found
from transllm_jax.disk import read_json

QUESTIONS = [
    {"kind": "capital", "question": "เมืองหลวงของไทยคือเมืองอะไร", "answers": ["กรุงเทพ"],
     "question_en": "What is the capital of Thailand?", "answers_en": ["Bangkok"]},
    {"kind": "sum", "question": "สองบวกสองเท่ากับเท่าไร", "answers": ["สี่", "4"],
     "question_en": "What is 2 + 2?", "answers_en": ["4"]},
]  # fmt: skip


def rows(path: Path, *given: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config, and an ablation of two variants; do not change it."""
    here = tmp_path_factory.mktemp("ablate")
    write_tiny_model(here / "model")
    questions = rows(here / "questions.jsonl", *QUESTIONS)
    tree: Any = tiny_run(here / "model", here / "run")
    tree["evaluation"].update(answers=str(questions), max_answer_tokens=6, max_documents=1, max_pairs=1, max_chats=1)
    for stage in ("pretrain", "translate", "transfer"):
        tree[stage].update(steps=2, warmup_ratio=0.0)
    tree["recover"]["translate_answers"] = {"file": str(here / "answers.jsonl"), "missing": "drop"}
    instructions = [json.loads(line) for line in (EXAMPLES / "instructions.train.jsonl").open(encoding="utf-8")][:6]
    written = [{"instruction": row["instruction"], "answer": f"Answer {n}."} for n, row in enumerate(instructions)]
    rows(here / "writer.jsonl", *written)
    # What the random model says has no translation, so conversations come from a file.
    rows(here / "answers.jsonl", *({"source": row["answer"], "target": "คำตอบ"} for row in written))
    chain = "<EN>What is it?<RESPONSE>It is water.<TH>มันคือน้ำ"
    messages = [{"role": "user", "content": "มันคืออะไร"}, {"role": "assistant", "content": chain}]
    chains = rows(here / "chains.jsonl", {"messages": messages})
    tree["recover"]["written"] = {"file": str(here / "writer.jsonl")}
    tree["transfer"]["sources"] = [
        {"path": str(chains), "format": "conversations", "chains": True, "weight": 0.5},
    ]
    write_config(here / "config.yaml", tree)
    assert call("ablate", here / "config.yaml", "--only", "full,no-tcot", "--seeds", "0") == 0
    return here


def test_every_step_is_made_once(place: Path) -> None:
    runs = place / "run-ablation"
    found = read_found(runs / "ablation.json")
    assert [one.key for one in found] == [("full", 0), ("original", None), ("no-tcot", 0)]
    shared = {one.key: set(one.shared) for one in found}
    assert shared["full", 0] == set()
    assert shared["no-tcot", 0] == {"base", "evaluation/base", "vocabulary", "pretrain", "translate", "recover"}
    assert not list(runs.glob("*/*/*/checkpoints")), "checkpoints of finished stages are left"
    assert read_json(runs / "no-tcot/seed-0/evaluation/transfer/results.json")["metrics"]["well_formed_chains"] is None
    log = [json.loads(line)["what"] for line in (runs / "log.jsonl").open(encoding="utf-8")]
    assert log == ["begun", "done"] * 2


def test_the_page_has_intervals_and_counts(place: Path) -> None:
    page = (place / "run-ablation" / "ablation.md").read_text(encoding="utf-8")
    assert "Shares are of 2 questions" in page and "2 runs in" in page and "With one seed" in page
    assert "| no chain: answers in the language alone (`no-tcot`) | 0 |" in page
    assert (place / "run-ablation" / "ablation.svg").stat().st_size > 1000


def test_the_same_command_has_nothing_left_to_do(
    place: Path, transllm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "run_pipeline", lambda *_, **__: pytest.fail("a run was made again"))
    code, printed = transllm("ablate", place / "config.yaml", "--only", "full,no-tcot", "--seeds", "0")
    assert code == 0 and "no-tcot" in printed


def test_a_dry_run_says_what_is_shared(place: Path, transllm: Command) -> None:
    code, printed = transllm("ablate", place / "config.yaml", "--seeds", "0,1", "--dry-run")
    assert code == 0
    assert "kd-sequence is not run: the config is this already" in printed
    assert "base-model is not run: give --base-model" in printed
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "vocabulary, pretrain" in lines["no-translate, seed 0"]
    assert "transfer (2 steps)" in lines["no-translate, seed 0"] and "about" in printed
    # Another seed draws other adapters and batches; the original and what it says are the same.
    assert "base, evaluation/base  " in lines["full, seed 1"]
