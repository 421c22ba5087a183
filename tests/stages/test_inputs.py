"""What a stage depends on: the hashes of the files that the config names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLES, Command, tiny_run, write_config

from transllm_jax.config import Source, load_config
from transllm_jax.errors import UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import vocabulary
from transllm_jax.stages.run import Run
from transllm_jax.stages.token_rows import planned_rows


def contamination_hashes(model: Path, directory: Path, text: dict[str, Any]) -> dict[str, Any]:
    """Of a run that is evaluated on `text`."""
    changes: Any = tiny_run(model, directory / "run")
    changes["evaluation"]["text"] = text
    config = write_config(directory / "config.yaml", changes)
    return Run(load_config(config), directory / "run", Progress(quiet=True), Interrupt()).inputs.contamination_hashes(
        True
    )


def test_the_evaluation_text_may_be_a_dataset(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "train.jsonl").write_text(json.dumps({"text": "ประโยค"}) + "\n", encoding="utf-8")
    text = {"path": str(corpus), "container": "datasets"}
    before = contamination_hashes(tiny_model, tmp_path, text)
    assert f"datasets {corpus}" in before and f"file {EXAMPLES / 'pairs.heldout.tsv'}" in before
    (corpus / "train.jsonl").write_text(json.dumps({"text": "ประโยคอื่น"}) + "\n", encoding="utf-8")
    assert contamination_hashes(tiny_model, tmp_path, text) != before


def test_of_checkable_questions_exact_copies_go_and_templates_stay(tiny_model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "เมืองหลวงของชาดคือเมืองอะไร"}, {"role": "assistant", "content": "เอ็นจาเมนา"}]
    english = [
        {"role": "user", "content": "What is the capital of Chad?"},
        {"role": "assistant", "content": "N'Djamena."},
    ]
    rows = [
        {
            "question": "เมืองหลวงของไนเจอร์คือเมืองอะไร",
            "answers": ["นีอาเม"],
            "question_en": ["What is the capital of Niger?", "Which city is the capital of Niger?"],
            "answers_en": ["Niamey"],
        },
        {
            "question": "แล้วผู้คนที่นั่นพูดภาษาอะไร",
            "answers": ["อาหรับ"],
            "question_en": "And which language do people speak there?",
            "answers_en": ["Arabic"],
            "history": turns,
            "history_en": english,
        },
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree: Any = tiny_run(tiny_model, tmp_path / "run")
    tree["evaluation"]["answers"] = str(questions)
    config = load_config(write_config(tmp_path / "config.yaml", tree))
    inputs = Run(config, tmp_path / "run", Progress(quiet=True), Interrupt()).inputs
    assert f"file {questions}" in inputs.contamination_hashes(True)
    found = inputs.evaluation_texts.found_in
    for copy in (
        rows[0]["question"],
        "Which city is the capital of Niger?",
        "Q: What is the capital of Niger? A: Niamey.",
        "What is the capital of Chad? N'Djamena. And which language do people speak there?",
    ):
        assert found(copy) == "evaluation.answers"
    for other in (
        "เมืองหลวงของชาดคือเมืองอะไร",
        "What is the capital of Nigeria?",
        "And which language do people speak there?",
        "The capital of Niger is Niamey.",
    ):
        assert found(other) is None


def test_the_evaluation_text_may_be_two_files(tiny_model: Path, tmp_path: Path) -> None:
    english, thai = tmp_path / "news.en", tmp_path / "news.th"
    english.write_text("A sentence.\n")
    thai.write_text("ประโยค\n", encoding="utf-8")
    text = {"path": str(english), "target_path": str(thai), "format": "pairs"}
    before = contamination_hashes(tiny_model, tmp_path, text)
    assert {f"file {english}", f"file {thai}"} <= before.keys()
    thai.write_text("ประโยคอื่น\n", encoding="utf-8")
    assert contamination_hashes(tiny_model, tmp_path, text) != before


def test_words_are_an_input_of_the_vocabulary(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_run(tiny_model, tmp_path / "run"))
    inputs = [
        vocabulary.inputs(Run(load_config(config, given), tmp_path / "run", Progress(quiet=True), Interrupt()))
        for given in ([], ["vocabulary.within_words=false"], ["vocabulary.within_words=true"])
    ]
    assert inputs[0] == inputs[1] and inputs[2]["vocabulary"].pop("within_words") is True
    # A run that was made before there was this key is not redone.
    assert inputs[2] == inputs[0] and "within_words" not in inputs[0]["vocabulary"]


def test_icu_is_looked_for_before_a_run_begins(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transllm: Command
) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_run(tiny_model, tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "icu4py", None)
    said = "vocabulary.within_words: learning tokens within words needs icu4py; pip install 'transllm-jax[icu]'"
    for more in (("--dry-run",), ()):
        code, printed = transllm("run", config, "vocabulary.within_words=true", *more)
        assert code == 2 and said in printed
    assert not (tmp_path / "run" / "vocabulary").exists()


def test_a_vocabulary_within_words_is_not_taken_for_another(
    tiny_model: Path, tmp_path: Path, transllm: Command
) -> None:
    pytest.importorskip("icu4py")
    config = write_config(tmp_path / "config.yaml", tiny_run(tiny_model, tmp_path / "run"))
    within = "vocabulary.within_words=true"
    assert transllm("run", config, within, "--until", "vocabulary")[0] == 0
    report = json.loads((tmp_path / "run" / "vocabulary" / "report.json").read_text(encoding="utf-8"))
    assert report["within_words"] is True and report["icu"]
    code, printed = transllm("run", config, "--until", "vocabulary")
    assert code == 2 and "vocabulary was made with other inputs: vocabulary.within_words (True -> unset)" in printed
    assert transllm("run", config, within, "--until", "vocabulary")[0] == 0


def test_pairs_the_wrong_way_round_are_refused_before_a_run_begins(
    tiny_model: Path, tmp_path: Path, transllm: Command
) -> None:
    lines = (EXAMPLES / "pairs.train.tsv").read_text(encoding="utf-8").splitlines()
    swapped = tmp_path / "swapped.tsv"
    swapped.write_text("".join("\t".join(reversed(line.split("\t"))) + "\n" for line in lines), encoding="utf-8")
    tree: Any = tiny_run(tiny_model, tmp_path / "run")
    given, tree["translate"]["sources"] = tree["translate"]["sources"], [{"path": str(swapped), "format": "pairs"}]
    config = write_config(tmp_path / "config.yaml", tree)
    code, printed = transllm("run", config, "--until", "translate")
    assert code == 2 and f"{swapped}: its columns are swapped: write English<TAB>th" in printed, printed
    tree["translate"]["sources"] = given
    tree["evaluation"]["pairs"] = str(swapped)
    code, printed = transllm("run", write_config(tmp_path / "evaluated.yaml", tree), "--until", "base")
    assert code == 2 and f"{swapped}: its columns are swapped" in printed, printed
    # English in place of the target side is another matter: a source may be English on purpose.
    swapped.write_text("".join(f"{line.split(chr(9))[0]}\tthe same\n" for line in lines), encoding="utf-8")
    run = Run(load_config(config), tmp_path / "run", Progress(quiet=True), Interrupt())
    run.inputs.check(run.config.translate.sources[0])


def test_a_source_of_chains_may_hold_their_markers(tiny_model: Path, tmp_path: Path, transllm: Command) -> None:
    turns = [
        {"role": "user", "content": "Which city do people love?"},
        {"role": "assistant", "content": "Bangkok.", "train": False},
        {"role": "user", "content": "แล้วผู้คนที่นั่นพูดภาษาอะไร"},
        {"role": "assistant", "content": "<EN>What do they speak?<RESPONSE>Thai.<TH>ภาษาไทย"},
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    tree: Any = tiny_run(tiny_model, tmp_path / "run")
    source = {"path": str(chats), "format": "conversations", "weight": 0.2}
    tree["transfer"] |= {"chains": 0.4, "english": 0.2, "translations": 0.2, "sources": [source]}
    config = write_config(tmp_path / "config.yaml", tree)
    code, printed = transllm("run", config, "--dry-run")
    assert code == 2 and f"{chats}:1 contains the special token <EN>" in printed
    tree["transfer"]["sources"] = [source | {"chains": True}]
    loaded = load_config(write_config(config, tree))
    (given,) = loaded.transfer.sources
    code, printed = transllm("run", config, "--dry-run")
    assert code == 0, printed
    run = Run(loaded, tmp_path / "run", Progress(quiet=True), Interrupt())
    rows = planned_rows(run, "transfer", given, 256)
    row = rows.row(0)
    trained = row["labels"][row["weights"] > 0]
    tokenizer = run.models.tokenizer("vocabulary")
    # The last answer alone is trained on, and its markers are single tokens.
    assert tokenizer.decode([int(token) for token in trained]).startswith("<EN>What do they speak?<RESPONSE>Thai.<TH>")
    assert tokenizer.token_id("<EN>") in trained
    # A special token of the base is still a fault.
    special = next(iter(run.models.tokenizer("base").special_tokens))
    turns[-1]["content"] = f"<EN>a{special}<RESPONSE>b<TH>c"
    chats.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=":1 contains the special token"):
        Run(loaded, tmp_path / "run", Progress(quiet=True), Interrupt()).inputs.check(given)
    # A run that was made before there was this key is not redone.
    idle = Source.model_validate(source).model_dump()
    assert "chains" not in idle and "recovery" not in idle and given.model_dump()["chains"] is True
    assert "recovery" not in loaded.transfer.model_dump(mode="json")
    taught = loaded.transfer.model_copy(update={"recovery": "both"})
    assert taught.model_dump(mode="json")["recovery"] == "both"
    assert "recovery_weight" not in loaded.translate.model_dump(mode="json")
    weighted = loaded.translate.model_copy(update={"recovery_weight": 3.0})
    assert weighted.model_dump(mode="json")["recovery_weight"] == 3.0
    assert Source.model_validate(source | {"recovery": "token"}).model_dump()["recovery"] == "token"
