"""`transllm ablate` on a tiny model: what is shared, what a killed one leaves, and what the page says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EXAMPLES, Command, call, tiny_run, write_config, write_tiny_model

from transllm_jax.ablation import work
from transllm_jax.ablation.results import read_found
from transllm_jax.conversion.hf.directory import open_hf, read_weights
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.names import tensors
from transllm_jax.disk import read_json
from transllm_jax.errors import Diverged, Preempted
from transllm_jax.training.arrays import load_arrays

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
    assert call("ablate", here / "config.yaml", "--only", "full,no-tcot,elchat", "--seeds", "0") == 0
    return here


def test_every_step_is_made_once(place: Path) -> None:
    runs = place / "run-ablation"
    found = read_found(runs / "ablation.json")
    keys = [("full", 0), ("original", None), ("no-tcot", 0), ("elchat", 0), ("bridge", 0), ("inside", 0)]
    assert [one.key for one in found] == keys
    shared = {one.key: set(one.shared) for one in found}
    assert shared["full", 0] == set()
    assert shared["no-tcot", 0] == {"base", "evaluation/base", "vocabulary", "pretrain", "translate", "recover"}
    assert not list(runs.glob("*/*/*/checkpoints")), "checkpoints of finished stages are left"
    assert read_json(runs / "no-tcot/seed-0/evaluation/transfer/results.json")["metrics"]["well_formed_chains"] is None
    log = [json.loads(line)["what"] for line in (runs / "log.jsonl").open(encoding="utf-8")]
    assert log == ["begun", "done"] * 3


def test_a_run_can_begin_with_half_of_what_another_learned(place: Path) -> None:
    runs = place / "run-ablation" / "elchat"
    of = ("seed-0-start/pretrain", "seed-0/vocabulary", "seed-0/transfer")
    learned, begun, end = (load_arrays(runs / name / "trainable") for name in of)
    # As many tokens as the three stages of the full method: 2 steps of 2 x (64, 64, 256) tokens.
    assert read_json(runs / "seed-0-start/pretrain/manifest.json")["summary"]["tokens"] == 4 * (64 + 64 + 256)
    for path, array in learned.items():
        wanted = array * np.float32(0.5) if path.endswith(".b") else array
        np.testing.assert_array_equal(begun[path], wanted, err_msg=path)
        # Stages without steps leave all as it is.
        np.testing.assert_array_equal(end[path], begun[path], err_msg=path)
    assert not (runs / "seed-0" / "recover").exists()


def test_an_export_can_hold_a_part_of_an_adapter_or_be_of_another_model(place: Path, transllm: Command) -> None:
    run, here = place / "run-ablation/no-tcot/seed-0", place / "exports"
    export = ("convert", "to-hf", run)
    assert transllm(*export, here / "half", "--adapter-scale", "0.5", "--no-check")[0] == 0
    assert transllm(*export, here / "none", "--adapter-scale", "0,0", "--no-check")[0] == 0
    write_tiny_model(here / "other", seed=3)
    assert transllm(*export, here / "onto", "--onto", here / "other", "--no-check")[0] == 0
    half, none, onto = (read_weights(here / name) for name in ("half", "none", "onto"))
    base, other = read_weights(run / "base"), read_weights(here / "other")
    whole = Merged(open_hf(run / "base"), load_arrays(run / "transfer/trainable"), 2.0)
    path = "blocks.attention.q.kernel"
    np.testing.assert_array_equal(none[path], base[path])
    trained = np.stack([whole.read(one).T for one in tensors(whole.config) if one.path == path])
    difference = trained - base[path]
    assert np.abs(difference).max() > 1e-4
    np.testing.assert_allclose(half[path], base[path] + difference / 2, atol=1e-6)
    np.testing.assert_allclose(onto[path], other[path] + difference, atol=1e-6)
    code, printed = transllm(*export, here / "bad", "--adapter-scale", "0.1,0.2,0.3")
    assert code == 2 and "one for each of 2 layers" in printed


def test_the_page_has_intervals_and_counts(place: Path) -> None:
    page = (place / "run-ablation" / "ablation.md").read_text(encoding="utf-8")
    assert "Shares are of 2 questions" in page and "3 runs in" in page and "With one seed" in page
    assert "| no chain: answers in the language alone (`no-tcot`) | 0 |" in page
    assert (place / "run-ablation" / "ablation.svg").stat().st_size > 1000


def test_the_same_command_has_nothing_left_to_do(
    place: Path, transllm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "run_pipeline", lambda *_, **__: pytest.fail("a run was made again"))
    code, printed = transllm("ablate", place / "config.yaml", "--only", "full,no-tcot,elchat", "--seeds", "0")
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
    assert "recover (its answers are shared)" in lines["no-translate, seed 0"]


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> tuple[Any, ...]:
    """The command of an ablation in a copy of the finished one."""
    shutil.copytree(place / "run-ablation", tmp_path / "out")
    return ("ablate", place / "config.yaml", "--out", tmp_path / "out")


def test_a_variant_that_begins_with_another_runs_adapter_can_be_run_alone(place: Path, transllm: Command) -> None:
    # Nothing of it is made; so neither is the adapter that its first step reads.
    code, printed = transllm(
        "ablate", place / "config.yaml", "--only", "elchat", "--seeds", "0", "--out", place / "alone", "--dry-run"
    )
    assert code == 0 and "pretrain (12 steps)" in printed, printed


def test_a_variant_that_fails_does_not_end_the_others(
    copied: tuple[Any, ...], transllm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise Diverged("too many losses are not finite")

    monkeypatch.setattr(work, "run_pipeline", diverge)
    code, printed = transllm(*copied, "--only", "full,no-tcot,no-translate,no-pretrain", "--seeds", "0")
    assert code == 1 and "no-translate, seed 0 failed: too many losses" in printed
    page = (copied[-1] / "ablation.md").read_text(encoding="utf-8")
    assert "failed: seed 0: too many losses are not finite" in page and "(`no-tcot`) | 0 |" in page
    # What they share was linked before they failed, and serves the next try.
    assert read_json(copied[-1] / "no-translate/seed-0/pretrain/manifest.json")["state"] == "done"


def test_a_stop_is_75_and_the_same_command_goes_on(
    copied: tuple[Any, ...], transllm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise Preempted("transfer: stopped, what is done is saved")

    with monkeypatch.context() as patch:
        patch.setattr(work, "run_pipeline", stop)
        assert transllm(*copied, "--only", "no-translate", "--seeds", "0")[0] == 75
    # Killed while it linked a step: a part of it, without a manifest, and one whole.
    place = copied[-1] / "no-translate" / "seed-0"
    shutil.rmtree(place / "vocabulary")
    (place / ".vocabulary.part").mkdir()
    (place / "vocabulary").mkdir()
    assert transllm(*copied, "--only", "no-translate", "--seeds", "0")[0] == 0
    found = {one.key: one for one in read_found(copied[-1] / "ablation.json")}
    assert set(found["no-translate", 0].shared) == {"base", "evaluation/base", "vocabulary", "pretrain"}
    log = [json.loads(line)["what"] for line in (copied[-1] / "log.jsonl").open(encoding="utf-8")]
    assert log[-3:] == ["begun", "begun", "done"]


def test_what_is_asked_through_the_full_method_has_names_of_its_own(
    place: Path, tmp_path: Path, transllm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads((place / "run-ablation" / "ablation.json").read_text(encoding="utf-8"))
    found["runs"] = [run for run in found["runs"] if run["name"] not in ("bridge", "inside")]
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps(found), encoding="utf-8")
    command = ("ablate", place / "config.yaml", "--seeds", "0", "--with", theirs, "--out", tmp_path / "out", "--only")
    with monkeypatch.context() as patch:
        patch.setattr(work, "run_pipeline", lambda *_, **__: pytest.fail("the full method was made again"))
        code, printed = transllm(*command, "full")
        assert code == 0 and "bridge, seed 0: its run is elsewhere; --only bridge makes it" in printed
        # A run of the ablation beside it, or the config's own, serves.
        shutil.copytree(place / "run-ablation" / "full", tmp_path / "out" / "full", dirs_exist_ok=True)
        assert transllm(*command, "inside")[0] == 0
        keys = [one.key for one in read_found(tmp_path / "out" / "ablation.json")]
        assert ("inside", 0) in keys and ("bridge", 0) not in keys
    # Linked steps are no run yet, and nothing is trained to make them one.
    run = tmp_path / "out" / "full" / "seed-0"
    (run / "run.yaml").unlink()
    trained = (run / "transfer" / "manifest.json").read_bytes()
    assert transllm(*command, "bridge")[0] == 0
    assert ("bridge", 0) in [one.key for one in read_found(tmp_path / "out" / "ablation.json")]
    assert (run / "transfer" / "manifest.json").read_bytes() == trained
    code, printed = transllm(*command, "bridge", "--dry-run")
    assert code == 0 and "bridge, seed 0" in printed and "inside" not in printed
    code, printed = transllm(*command, "between")
    assert code == 2 and "--only between: there is no such variant" in printed
    assert "chat-vector, bridge, inside" in " ".join(printed.split())


def test_results_on_other_held_out_files_are_made_again_and_not_shown(
    copied: tuple[Any, ...], transllm: Command
) -> None:
    place = copied[-1] / "ablation.json"
    known = json.loads(place.read_text(encoding="utf-8"))
    for run in known["runs"]:
        run["data"] = "other"
    place.write_text(json.dumps(known), encoding="utf-8")
    code, printed = transllm(*copied, "--only", "no-tcot", "--seeds", "0", "--dry-run")
    assert code == 0 and "6 results are of another config or other held-out files, and not shown" in printed
    assert "all of it" not in printed
    # Its steps are there, so that its numbers are read and nothing is trained.
    assert transllm(*copied, "--only", "no-tcot", "--seeds", "0")[0] == 0
    page = (copied[-1] / "ablation.md").read_text(encoding="utf-8")
    assert "`no-tcot`" in page and "`original`" in page and "`full`" not in page and "`elchat`" not in page
    found = {one.key: one.data for one in read_found(place)}
    assert found["full", 0] == "other" != found["no-tcot", 0] == found["original", None]


def test_another_config_is_asked_again(copied: tuple[Any, ...], transllm: Command) -> None:
    code, printed = transllm(*copied, "evaluation.max_chain_tokens=5", "--only", "full", "--seeds", "0", "--dry-run")
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert code == 0 and "asked through full" in lines["bridge, seed 0"] and "all of it" not in lines["full, seed 0"]
    assert "3 results are of another config" in printed


def test_results_of_another_machine_are_not_made_again(
    place: Path, tmp_path: Path, transllm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "run_pipeline", lambda *_, **__: pytest.fail("a run was made again"))
    theirs = place / "run-ablation" / "ablation.json"
    command = ("ablate", place / "config.yaml", "--out", tmp_path / "out", "--only", "full,no-tcot", "--seeds", "0")
    assert transllm(*command, "--with", theirs, "--markdown", tmp_path / "page.md")[0] == 0
    assert "(`no-tcot`) | 0 |" in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert (tmp_path / "page.svg").is_file()
    other = json.loads(theirs.read_text(encoding="utf-8"))
    for run in other["runs"]:
        run["data"] = "other"
    (tmp_path / "other.json").write_text(json.dumps(other), encoding="utf-8")
    code, printed = transllm(*command, "--with", tmp_path / "other.json")
    assert code == 2 and "on other held-out files" in printed
