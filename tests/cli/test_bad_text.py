"""Text, pairs and instructions that are refused at the start of a run: one line with what, where and how to fix it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import EXAMPLES
from refusals import Refused, refusing, says, small_run, write


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    return refusing(capfd)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    """The config file of a run that has not begun."""
    return write(tmp_path / "config.yaml", small_run(tiny_model, tmp_path / "run"))


@pytest.mark.parametrize(
    ("override", "name", "content", "words"),
    [
        ("evaluation.text={path: FILE}", "a.txt", "ฝน <TH> ตก\n", ("a.txt:1", "<TH>", "remove it")),
        ("evaluation.pairs=FILE", "a.tsv", "a\t\n", ("a.tsv:1 has an empty target-language side",)),
        (
            "evaluation.instructions=FILE",
            "a.jsonl",
            '{"instruction": "a"}\n',
            ("a.jsonl:1 has no field 'translation'",),
        ),
        (
            "evaluation.instructions=FILE",
            "a.jsonl",
            json.dumps({"instruction": "Say: " + "hello there " * 200, "translation": "x"}) + "\n",
            ("a.jsonl:1: a prompt of", "evaluation.max_new_tokens 2", "context of 512", "shorten the text"),
        ),
        ("prompts.to_target=['<TH>{text}']", "a.txt", "", ("prompts.to_target: '<TH>{text}'", "<TH>", "take it out")),
    ],
)
def test_bad_held_out_text_is_found_before_the_first_evaluation(
    refused: Refused, config: Path, tmp_path: Path, override: str, name: str, content: str, words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    says(refused("run", config, override.replace("FILE", str(tmp_path / name))), *words)
    assert (tmp_path / "run" / "base" / "manifest.json").exists() and not (tmp_path / "run" / "evaluation").exists()


def test_no_such_text_file(refused: Refused, config: Path, tmp_path: Path) -> None:
    says(refused("run", config, "transfer.pairs.path=nowhere.tsv"), "no file matches nowhere.tsv", "check the path")
    says(refused("run", config, f"pretrain.sources=[{{path: {tmp_path}}}]"), "is a directory", "name its files")
    says(refused("run", config, "recover.translate_answers.file=none.jsonl"), "no file matches none.jsonl")
    assert not (tmp_path / "run" / "base").exists()


def test_a_held_out_file_may_not_be_trained_on(refused: Refused, config: Path, tmp_path: Path) -> None:
    message = refused("run", config, f"evaluation.pairs={EXAMPLES / 'pairs.train.tsv'}")
    says(message, "evaluation.pairs", "pairs.train.tsv is also trained on", "hold it out")
    copied = shutil.copy(EXAMPLES / "instructions.train.jsonl", tmp_path / "copied.jsonl")
    says(refused("run", config, f"evaluation.instructions={copied}"), "copied.jsonl is also trained on")
    message = refused("run", config, f"translate.sources=[{{path: {EXAMPLES / 'text.heldout.txt'}}}]")
    says(message, "evaluation.text", "text.heldout.txt is also trained on")


def test_too_small_a_corpus_is_found_before_the_model_is_read(refused: Refused, config: Path, tmp_path: Path) -> None:
    message = refused("run", config, "vocabulary.size=50000")
    says(message, "vocabulary.corpus gives", "50,000 tokens, each 2 times, need 50,000 at the very least", "max_bytes")
    assert not (tmp_path / "run" / "base").exists()


def test_a_corpus_with_too_few_tokens_is_found_before_the_first_evaluation(
    refused: Refused, config: Path, tmp_path: Path
) -> None:
    says(refused("run", config, "vocabulary.size=9000"), "vocabulary: the corpus supports", "not 9,000")
    assert (tmp_path / "run" / "base" / "manifest.json").exists() and not (tmp_path / "run" / "evaluation").exists()


def test_all_held_out_text_is_checked_before_the_first_evaluation(
    refused: Refused, config: Path, tmp_path: Path
) -> None:
    """Also the part that is not evaluated, because all of it is compared with the training text."""
    pairs = tmp_path / "a.tsv"
    pairs.write_text("a\tก\n" * 20 + "b\t\n", encoding="utf-8")
    says(refused("run", config, f"evaluation.pairs={pairs}"), "a.tsv:21 has an empty target-language side")
    assert not (tmp_path / "run" / "evaluation").exists()


def test_a_question_too_long_for_a_chain(refused: Refused, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"instruction": "Hi.", "translation": "hello there " * 20}) + "\n", encoding="utf-8")
    message = refused("run", config, f"evaluation.instructions={path}", "evaluation.max_chain_tokens=500")
    says(message, "questions.jsonl:1: a prompt of", "evaluation.max_chain_tokens 500", "context of 512")
    # There is room for an answer that is not a chain, so this was not found later.
    assert not (tmp_path / "run" / "evaluation").exists()
