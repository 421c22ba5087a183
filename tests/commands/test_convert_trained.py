"""`transllm convert` of a run: the result computes what training computed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml
from conftest import Command, call, random_weights, tiny_run, write_tiny_model
from converted import bits

from transllm_jax.commands.open_model import open_source
from transllm_jax.conversion.hf.directory import open_hf, read_config, write_model
from transllm_jax.conversion.logits import logits_of
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.names import tensors
from transllm_jax.tokenizer.chat import render
from transllm_jax.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def command(transllm: Command) -> Command:
    """Runs `transllm convert ARGUMENTS`."""
    return partial(transllm, "convert")


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.full)], ids=["tied", "untied"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run on a bfloat16 base, after stage `pretrain`."""
    here = tmp_path_factory.mktemp("run")
    config = write_tiny_model(here / "wide", tied=request.param)
    write_model(
        here / "model",
        config,
        random_weights(config),
        dtype="bfloat16",
        tokenizer_dir=here / "wide",
        extra_config={"eos_token_id": 2},
    )
    recipe = tiny_run(
        here / "model", here / "run", lora={"rank": 3, "alpha": 8, "rslora": True, "targets": ["q", "o", "up"]}
    )
    (here / "config.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    assert call("run", here / "config.yaml", "--until", "pretrain") == 0
    return here / "run"


def our_logits(workdir: Path, ids: list[int]) -> np.ndarray:
    """The logits of a run after its newest stage, as training computes them."""
    found = open_source(str(workdir))
    assert found.lora is not None
    return logits_of(found.model, ids, found.lora)


def their_logits(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].float().numpy())


IDS = [1, 65, 70, 99, 300, 401, 410, 430, 7, 539]


@pytest.mark.reference
def test_transformers_computes_what_training_did(run: Path, tmp_path: Path, command: Command) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, printed = command("to-hf", run, tmp_path / "out", "--dtype", "float32")
    assert code == 0 and "rounded once to float32" in printed and "same best token at 100%" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert np.abs(their_logits(model, IDS) - our_logits(run, IDS)).max() < 1e-4
    tied = json.loads((run / "base/config.json").read_text())["tie_word_embeddings"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in open_hf(tmp_path / "out").entries) == (not tied)
    assert model.generation_config.eos_token_id == 2

    messages = [{"role": "user", "content": "สวัสดี hello"}, {"role": "assistant", "content": "ครับ"}]
    ours = Tokenizer.load(run / "vocabulary")
    text = "A Thai word: ภาษาไทย and  two spaces <EN>"
    for fast in (True, False):
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out", use_fast=fast)
        assert theirs.apply_chat_template(messages, tokenize=False) == render(ours, messages)  # type: ignore[arg-type]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert len(theirs) == model.config.vocab_size


@pytest.mark.reference
def test_adapters_can_be_kept_apart(run: Path, tmp_path: Path, command: Command) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    assert command("to-hf", run, tmp_path / "out", "--unmerged")[0] == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = open_hf(tmp_path / "out")
    for tensor in tensors(plain.config):
        if tensor.layer is not None:  # the bits of the base
            np.testing.assert_array_equal(plain.read(tensor), open_hf(run / "base").read(tensor))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    # The new rows were rounded to the bfloat16 of the base, so ours are rounded in the same way.
    found = open_source(str(run))
    assert isinstance(found.model, Merged)
    rounded = {
        path: values.astype(ml_dtypes.bfloat16) if path.startswith("vocabulary") else values
        for path, values in found.model.trainable.items()
    }
    ours = logits_of(Merged(found.model.base, rounded, found.model.scale), IDS, found.lora)
    assert np.abs(their_logits(model, IDS) - ours).max() < 1e-4


@pytest.mark.reference
@pytest.mark.parametrize("rows", ["tokens", "tables"])
def test_peft_computes_what_training_did(run: Path, tmp_path: Path, command: Command, rows: str) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    code, printed = command("to-peft", run, tmp_path / "peft", "--rows", rows)
    assert code == 0 and "resize_token_embeddings(543)" in printed
    base = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32)
    base.resize_token_embeddings(543, mean_resizing=False)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    assert np.abs(their_logits(model, IDS) - our_logits(run, IDS)).max() < 1e-4
    # Converted back, the arrays are the same bit for bit.
    code, printed = command("from-peft", run / "base", tmp_path / "peft", tmp_path / "ours")
    assert code == 0 and "lora.rslora=true" in printed and "'lora.targets=[q, o, up]'" in printed
    ours, back = (open_source(str(path)).model for path in (run, tmp_path / "ours"))
    assert isinstance(ours, Merged) and isinstance(back, Merged)
    assert ours.trainable.keys() == back.trainable.keys()
    for path, values in ours.trainable.items():
        np.testing.assert_array_equal(back.trainable[path], values, err_msg=path)
    code, printed = command("verify", run, tmp_path / "peft", "--stage-a", "pretrain")
    assert code == 0 and "the same" in printed


@pytest.mark.parametrize("stage", ["base", "vocabulary", "pretrain"])
def test_each_stage_can_be_converted(run: Path, tmp_path: Path, command: Command, stage: str) -> None:
    code, printed = command("to-hf", run, tmp_path / "out", "--stage", stage)
    assert code == 0 and "bfloat16" in printed
    assert read_config(tmp_path / "out").vocab_size == (400 if stage == "base" else 543)
    if stage == "base":
        assert bits(open_hf(tmp_path / "out")) == bits(open_hf(run / "base"))
    if stage == "vocabulary":  # new adapters change nothing
        assert "by 0.00% of what" in printed
    code, printed = command("verify", run, tmp_path / "out", "--stage-a", stage, "--tolerance", "0.5")
    assert code == 0, printed


def test_a_missing_stage_is_refused(run: Path, tmp_path: Path, command: Command) -> None:
    for stage, said in (
        ("translate", "not done yet; its newest is pretrain"),
        ("recover", "does not change the model"),
    ):
        code, printed = command("to-hf", run, tmp_path / "out", "--stage", stage)
        assert code == 2 and said in printed
    code, printed = command("to-hf", run / "base", tmp_path / "out", "--stage", "pretrain")
    assert code == 2 and "is not a run's work directory" in printed
    code, printed = command("to-hf", run / "base", tmp_path / "out", "--unmerged")
    assert code == 2 and "has no adapters to keep apart" in printed
    assert not (tmp_path / "out").exists()


def test_the_rounding_error_of_a_merge_is_reported(run: Path, tmp_path: Path, command: Command) -> None:
    found = open_source(str(run))
    assert isinstance(found.model, Merged)
    code, printed = command("to-hf", run, tmp_path / "out")
    assert code == 0 and "rounded once to bfloat16" in printed
    # Runs of Thai letters are kept whole, which a GGUF file cannot express.
    assert "transformers and vLLM read the ids it is trained on, llama.cpp others" in printed
    about = json.loads((tmp_path / "out" / "transllm.json").read_text(encoding="utf-8"))
    assert about["readers"] == {"transformers": "as trained", "vllm": "as trained", "llama.cpp": "other ids"}
    learned = json.loads((run / "vocabulary" / "report.json").read_text(encoding="utf-8"))
    assert learned["readers"] == about["readers"] and learned["cuts"] == "whole"
    written = open_hf(tmp_path / "out")
    largest = error = change = 0.0
    for tensor in tensors(written.config):
        if not found.model.merges(tensor):
            continue
        exact = found.model.read(tensor)
        rounding = np.abs(written.read(tensor).astype(np.float32) - exact)
        largest = max(largest, rounding.max())
        error += float((rounding.astype(np.float64) ** 2).sum())
        change += float(((exact.astype(np.float64) - found.model.base.read(tensor).astype(np.float64)) ** 2).sum())
    assert f"no weight moved by more than {largest:.2g}, all together by {(error / change) ** 0.5:.2%} of" in printed
    difference = np.abs(logits_of(written, IDS) - our_logits(run, IDS)).max()
    assert 1e-3 < difference < 0.5
