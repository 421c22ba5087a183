"""A tokenizer that is one file, and models that have only SentencePiece's `tokenizer.model`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import EXAMPLES, Command, write_run_config
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as pb2
from tiny_sentencepiece import TEMPLATE, build_tiny_sentencepiece, write_sentencepiece_model
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.commands.open_tokenizer import open_tokenizer
from transllm_jax.conversion.hf.directory import open_hf
from transllm_jax.conversion.token_rows import open_token_rows
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.tokenizer import Tokenizer

HELD_OUT = EXAMPLES / "text.heldout.txt"
TEXTS = [*HELD_OUT.read_text(encoding="utf-8").split("\n\n")[:20], "the quick  brown fox", " <s> 12"]


@pytest.mark.parametrize("name", ["tokenizer.model", "llama", "of.json/pieces.spm"])
def test_a_file_of_sentencepiece_is_a_tokenizer(tmp_path: Path, name: str, transllm: Command) -> None:
    """It gives what its directory gives: the same ids, new pieces and special tokens."""
    directory, file = build_tiny_sentencepiece(tmp_path / "directory"), tmp_path / "alone" / name
    file.parent.mkdir(parents=True)
    shutil.copyfile(directory / "tokenizer.model", file)
    for base, out in ((directory, "of-directory"), (file, "of-file")):
        code, printed = transllm(
            *("tokenizer", "expand", base, EXAMPLES / "text.train.txt", tmp_path / out, "--size", 100),
            *("--language", "th", "--marker", "<TH>"),
        )
        assert code == 0 and "tokenizer.json and tokenizer.model" in printed, printed
    for made in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "of-file" / made).read_bytes() == (tmp_path / "of-directory" / made).read_bytes()
    new = Tokenizer.load(tmp_path / "of-file")
    assert [new.role(role) for role in ("bos_token", "eos_token", "unk_token")] == ["<s>", "</s>", "<unk>"]
    theirs = SentencePieceProcessor(model_file=str(tmp_path / "of-file" / "tokenizer.model"))
    assert [new.encode(text, specials=False) for text in TEXTS] == theirs.encode(TEXTS)
    code, printed = transllm("tokenizer", "report", tmp_path / "of-file", HELD_OUT)
    assert code == 0 and f"compared with {file}, which" in printed and printed.count("100%") == 1


def test_the_special_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    """Not LLaMA's, whatever they are called; a model without a first token gets none."""
    named = build_tiny_sentencepiece(
        tmp_path / "named", bos_piece="[start]", eos_piece="[end]", unk_piece="[what]", pad_id=3, pad_piece="[pad]"
    )
    for found in (open_tokenizer(str(named / "tokenizer.model"), tmp_path / "1").tokenizer, _alone(named)):
        roles = [found.role(role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")]
        assert roles == ["[start]", "[end]", "[what]", "[pad]"] and found.eos_id == 2 and found.bos_ids == [1]
    tokenizer = build_tiny_sentencepiece(tmp_path / "none")
    none = tmp_path / "none.model"
    model = pb2.ModelProto()
    model.ParseFromString((tokenizer / "tokenizer.model").read_bytes())
    model.trainer_spec.bos_id = model.trainer_spec.eos_id = -1
    none.write_bytes(model.SerializeToString())
    found = open_tokenizer(str(none), tmp_path / "2").tokenizer
    assert found.role("bos_token") is None and found.role("eos_token") is None and found.bos_ids == []


def _alone(directory: Path) -> Tokenizer:
    """The tokenizer of a directory that has nothing but the directory's tokenizer.model."""
    copy = directory.with_name(f"{directory.name}-alone")
    copy.mkdir()
    shutil.copyfile(directory / "tokenizer.model", copy / "tokenizer.model")
    return open_tokenizer(str(copy), directory.with_name("scratch")).tokenizer


def test_a_file_tokenizer_json_is_a_tokenizer(tmp_path: Path, transllm: Command) -> None:
    directory = build_tiny_tokenizer(tmp_path / "directory")
    shutil.copyfile(directory / "tokenizer.json", tmp_path / "smollm.json")
    wanted = Tokenizer.load(directory)
    alone = open_tokenizer(str(tmp_path / "smollm.json"), tmp_path / "scratch").tokenizer
    assert alone.encode_batch(TEXTS) == wanted.encode_batch(TEXTS) and alone.role("eos_token") is None
    # The file beside it names the special tokens.
    beside = open_tokenizer(str(directory / "tokenizer.json"), tmp_path / "scratch").tokenizer
    assert beside.fingerprint == wanted.fingerprint and beside.role("eos_token") is not None
    code, printed = transllm("tokenizer", "report", tmp_path / "smollm.json", HELD_OUT)
    assert code == 0 and printed.count("100%") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"the text that was meant", "is truncated or not a SentencePiece model"),
        (b"IQ== 0\nIg== 1\nIw== 2\n", "is a tiktoken file (LLaMA-3's own format)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes, said: str) -> None:
    for name in ("tokenizer.model", "another"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            open_tokenizer(str(tmp_path / name), tmp_path / "scratch")
        assert str(caught.value).startswith(str(tmp_path / name)) and said in str(caught.value)


@pytest.mark.slow
def test_a_model_with_nothing_but_tokenizer_model(tmp_path: Path, transllm: Command) -> None:
    """Every command reads it, and gives what it gives with a tokenizer.json."""
    whole, model = tmp_path / "whole", tmp_path / "model"
    write_sentencepiece_model(whole)
    shutil.copytree(whole, model)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert (model / "tokenizer.model").is_file()

    answers = [transllm("chat", place, "the quick brown fox", "--max-new-tokens", 4) for place in (whole, model)]
    assert answers[0] == answers[1] and answers[0][0] == 0
    assert transllm("convert", "from-hf", model, tmp_path / "ours")[0] == 0
    assert transllm("convert", "to-hf", model, tmp_path / "theirs")[0] == 0
    assert transllm("convert", "verify", model, tmp_path / "theirs")[0] == 0
    wanted = Tokenizer.load(whole)
    for place in ("ours", "theirs"):
        found = Tokenizer.load(tmp_path / place)
        assert found.encode_batch(TEXTS) == wanted.encode_batch(TEXTS) and found.eos_id == wanted.eos_id
        assert found.bos_ids == wanted.bos_ids and (tmp_path / place / "tokenizer.model").is_file()
    config = write_run_config(tmp_path, model)
    assert transllm("run", config, "--until", "vocabulary")[0] == 0
    report = json.loads((tmp_path / "run/vocabulary/report.json").read_text(encoding="utf-8"))
    assert report["kind"] == "sentencepiece"
    # Its rows can be copied into another.
    rows = open_token_rows(model, open_hf(whole).config)
    tokens = ["▁the", "<s>", "no such token"]
    assert rows.ids(tokens) == [wanted.token_id(token) for token in tokens]

    # An adapter of PEFT with nothing but the expanded tokenizer.model.
    assert transllm("convert", "to-peft", tmp_path / "run", tmp_path / "peft")[0] == 0
    for path in [*(tmp_path / "peft").glob("*token*.json"), tmp_path / "peft" / "chat_template.jinja"]:
        path.unlink()
    assert transllm("convert", "from-peft", model, tmp_path / "peft", tmp_path / "adapter")[0] == 0
    expanded, found = Tokenizer.load(tmp_path / "run/vocabulary"), Tokenizer.load(tmp_path / "adapter")
    assert found.encode_batch(TEXTS, specials=False) == expanded.encode_batch(TEXTS, specials=False)
    assert found.token_id("<TH>") == expanded.token_id("<TH>") is not None
