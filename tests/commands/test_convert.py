"""`transllm convert`: what goes in comes out, bit for bit; what was trained comes out as it was computed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml
from conftest import Command, random_weights, tiny_run, write_tiny_model
from tiny_families import FAMILIES

from conversion.hf.directory import open_hf, read_config, read_weights, write_model
from conversion.hf.safetensors_io import DTYPES, write_tensors
from conversion.logits import logits_of
from conversion.merged import Merged
from conversion.names import EMBEDDING, OUTPUT, tensors
from conversion.opened import Opened
from conversion.verify import compare
from transllm_jax.cli import main as cli
from transllm_jax.commands.open_model import open_source
from transllm_jax.disk import parse_size, read_json, write_json
from transllm_jax.model.mesh import parse_mesh
from transllm_jax.progress import Progress
from transllm_jax.tokenizer.chat import render
from transllm_jax.tokenizer.tokenizer import Tokenizer

LLAMA = FAMILIES["llama2"]


@pytest.fixture
def command(transllm: Command) -> Command:
    """Runs `transllm convert ARGUMENTS`."""
    return partial(transllm, "convert")


def write_source(directory: Path, name: str, dtype: str, **options: Any) -> Path:
    """A Hugging Face directory of a family, with the tiny tokenizer (and so padding rows or none)."""
    from dataclasses import replace

    from tiny_tokenizer import build_tiny_tokenizer

    tokenizer = build_tiny_tokenizer(directory.with_name("tokenizer"))
    config = replace(FAMILIES[name], vocab_size=400)
    extra = {"eos_token_id": 2, "bos_token_id": 1, "transformers_version": "4.50.0", "use_cache": True}
    write_model(
        directory,
        config,
        random_weights(config),
        dtype=dtype,
        tokenizer_dir=tokenizer,
        extra_config=extra,
        max_shard_bytes=options.pop("max_shard_bytes", 10**9),
    )
    (directory / "LICENSE").write_text("whose it is")
    return directory


def bits(model: Opened) -> dict[str, tuple[str, str]]:
    """Type and hash of every tensor."""
    found = {}
    for tensor in tensors(model.config):
        array = np.ascontiguousarray(model.read(tensor))
        found[tensor.name] = (array.dtype.name, hashlib.sha256(array.tobytes()).hexdigest())
    return found


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_goes_in_comes_out(tmp_path: Path, command: Command, name: str, dtype: str) -> None:
    source = write_source(tmp_path / "source", name, dtype, max_shard_bytes=60_000)
    assert command("from-hf", source, tmp_path / "ours")[0] == 0
    assert command("to-hf", tmp_path / "ours", tmp_path / "back", "--max-shard-size", "100KB")[0] == 0
    assert bits(open_hf(tmp_path / "back")) == bits(open_hf(source))
    kept = {path.name for path in source.iterdir() if not path.name.startswith("model")}
    assert kept == {path.name for path in (tmp_path / "back").iterdir() if not path.name.startswith("model")}
    for file in kept:
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes(), file


def test_each_tensor_keeps_its_own_type(tmp_path: Path, command: Command) -> None:
    source = write_source(tmp_path / "source", "qwen3", "float32")
    model = open_hf(source)
    types = [DTYPES["BF16"], DTYPES["F32"], DTYPES["F16"]]
    own = {tensor.name: types[number % 3] for number, tensor in enumerate(tensors(model.config))}
    arrays = {tensor.name: model.read(tensor) for tensor in tensors(model.config)}
    write_tensors(source, tensors(model.config), lambda tensor: arrays[tensor.name], lambda tensor: own[tensor.name])
    assert command("from-hf", source, tmp_path / "ours")[0] == 0
    assert command("to-hf", tmp_path / "ours", tmp_path / "back")[0] == 0
    found = bits(open_hf(tmp_path / "back"))
    assert found == bits(open_hf(source)) and len({kind for kind, _ in found.values()}) == 3


def test_what_follows_from_other_fields_is_left_out_and_said(tmp_path: Path, command: Command) -> None:
    source = write_source(tmp_path / "source", "smollm2", "bfloat16")
    model = open_hf(source)
    table = tensors(model.config)
    embedding = next(tensor for tensor in table if tensor.name == EMBEDDING)
    from dataclasses import replace

    more = [*table, replace(embedding, name=OUTPUT)]
    arrays = {tensor.name: model.read(tensor) for tensor in table}
    arrays[OUTPUT] = arrays[EMBEDDING]
    write_tensors(source, more, lambda tensor: arrays[tensor.name], DTYPES["BF16"])
    code, printed = command("from-hf", source, tmp_path / "ours")
    assert code == 0 and "left out, because other fields say the same: lm_head.weight" in printed


def test_padding_rows_are_kept_and_said(tmp_path: Path, command: Command) -> None:
    source = write_source(tmp_path / "source", "llama2", "bfloat16")
    raw = read_json(source / "tokenizer.json")
    last = max(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    del raw["model"]["vocab"][last]
    raw["model"]["merges"] = [merge for merge in raw["model"]["merges"] if "".join(merge) != last]
    write_json(source / "tokenizer.json", raw)
    code, printed = command("from-hf", source, tmp_path / "ours")
    assert code == 0 and "1 embedding rows have no token: padding, kept as it is" in printed
    assert command("to-hf", tmp_path / "ours", tmp_path / "back")[0] == 0
    assert bits(open_hf(tmp_path / "back")) == bits(open_hf(source))


def test_a_type_can_be_chosen(tmp_path: Path, command: Command) -> None:
    source = write_source(tmp_path / "source", "llama2", "float32")
    code, printed = command("to-hf", source, tmp_path / "narrow", "--dtype", "bfloat16")
    assert code == 0 and "in bfloat16" in printed
    config = json.loads((tmp_path / "narrow/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert read_config(tmp_path / "narrow") == read_config(source)
    wide, narrow = read_weights(source), read_weights(tmp_path / "narrow")
    for path, values in wide.items():
        np.testing.assert_array_equal(narrow[path], values.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert command("to-hf", source, tmp_path / "other", "--dtype", "int4")[0] == 2


def test_a_checkpoint_of_ours_is_a_model_to_run_and_to_talk_to(tmp_path: Path, command: Command) -> None:
    from conversion.import_base import import_base
    from transllm_jax.commands.chat import open_session

    write_tiny_model(tmp_path / "model")
    assert command("from-hf", tmp_path / "model", tmp_path / "ours", "--mesh", "fsdp=2,tensor=2")[0] == 0
    import_base(str(tmp_path / "ours"), tmp_path / "base")
    assert bits(open_hf(tmp_path / "base")) == bits(open_hf(tmp_path / "model"))
    assert open_session(tmp_path / "ours", max_new_tokens=2).name == "ours"


# --- what was trained -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory after stage `pretrain`, on a bfloat16 base."""
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
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["transllm", "run", str(here / "config.yaml"), "--until", "pretrain"])
        cli.main()
    assert ended.value.code in (0, None)
    return here / "run"


def our_logits(workdir: Path, ids: list[int]) -> np.ndarray:
    """The logits of a run's newest point, as training computes them."""
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
def test_adapters_may_stay_apart(run: Path, tmp_path: Path, command: Command) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    assert command("to-hf", run, tmp_path / "out", "--unmerged")[0] == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = open_hf(tmp_path / "out")
    for tensor in tensors(plain.config):
        if tensor.layer is not None:  # the base's bits
            np.testing.assert_array_equal(plain.read(tensor), open_hf(run / "base").read(tensor))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    # New rows were rounded to the base's bfloat16: compare with our logits of the same rounding.
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
    # And back: the same arrays, bit for bit.
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
def test_every_stage_comes_out(run: Path, tmp_path: Path, command: Command, stage: str) -> None:
    code, printed = command("to-hf", run, tmp_path / "out", "--stage", stage)
    assert code == 0 and "bfloat16" in printed
    assert read_config(tmp_path / "out").vocab_size == (400 if stage == "base" else 543)
    if stage == "base":
        assert bits(open_hf(tmp_path / "out")) == bits(open_hf(run / "base"))
    if stage == "vocabulary":  # fresh adapters change nothing
        assert "by 0.00% of what" in printed
    code, printed = command("verify", run, tmp_path / "out", "--stage-a", stage, "--tolerance", "0.5")
    assert code == 0, printed


def test_a_stage_that_is_not_there_is_refused(run: Path, tmp_path: Path, command: Command) -> None:
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


def test_merging_says_what_rounding_took(run: Path, tmp_path: Path, command: Command) -> None:
    found = open_source(str(run))
    assert isinstance(found.model, Merged)
    code, printed = command("to-hf", run, tmp_path / "out")
    assert code == 0 and "rounded once to bfloat16" in printed
    # Thai's runs are kept whole, which a GGUF file cannot say.
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


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify_says_what_differs(tmp_path: Path, command: Command) -> None:
    source = write_source(tmp_path / "a", "qwen2", "float32")
    shutil.copytree(source, tmp_path / "b")
    code, printed = command("verify", source, tmp_path / "b")
    assert code == 0 and printed.splitlines()[-1] == "the same"

    weights = read_weights(source)
    weights["blocks.mlp.up.kernel"][1, 3, 5] += 0.25
    config = read_config(source)
    shutil.rmtree(tmp_path / "b")
    write_model(tmp_path / "b", config, weights, tokenizer_dir=source, extra_config={"eos_token_id": 2})
    code, printed = command("verify", source, tmp_path / "b")
    assert code == 1 and "largest difference 0.25, in model.layers.1.mlp.up_proj.weight" in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("blocks.mlp.up.kernel"))
    assert row[1:4] == ["2", "1", "0.25"]
    code, printed = command("verify", source, tmp_path / "b", "--tolerance", "0.3")
    assert ("within the tolerance" in printed) == (code == 0)
    assert command("verify", source, tmp_path / "b", "--tolerance", "0.3", "--no-logits")[0] == 0
    assert command("verify", source, tmp_path / "b", "--tolerance", "0.2", "--no-logits")[0] == 1


def test_verify_sees_missing_tensors_and_another_config(tmp_path: Path, command: Command) -> None:
    from dataclasses import replace

    one = write_source(tmp_path / "one", "llama2", "float32")
    config = replace(read_config(one), rope_theta=77.0, attention_bias=True, num_hidden_layers=1, vocab_size=402)
    write_model(tmp_path / "two", config, random_weights(config), tokenizer_dir=one, extra_config={"eos_token_id": 2})
    code, printed = command("verify", one, tmp_path / "two")
    assert code == 1
    for said in (
        f"only in {one}: model.layers.1.input_layernorm.weight",
        f"only in {tmp_path / 'two'}: model.layers.0.self_attn.k_proj.bias",
        "config: rope_theta: 10000.0 and 77.0",
        "model.embed_tokens.weight: shape [400, 48] and [402, 48]",
        "they differ by more than the tolerance of 0",
    ):
        assert said in printed


def test_not_a_number_is_never_the_same(tmp_path: Path) -> None:
    write_model(tmp_path / "m", LLAMA, random_weights(LLAMA))
    model = open_hf(tmp_path / "m")

    class Damaged:
        where, config, dtype = model.where, model.config, staticmethod(model.dtype)

        @staticmethod
        def read(tensor: Any) -> np.ndarray:
            array = model.read(tensor).copy()
            if tensor.name == "model.norm.weight":
                array[3] = np.nan
            return array

    result = compare(model, Damaged())
    assert not result.within(1e9) and result.largest == np.inf
    # Not even as itself: its logits are none.
    assert not compare(Damaged(), Damaged(), [1, 2, 3]).within(1e9)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("from-hf", "SRC", "DST", "--mesh", "fsdp"), "the mesh 'fsdp' is not of the form"),
        (("from-hf", "SRC", "DST", "--mesh", "fsdp=2,fsdp=2"), "the mesh"),
        (("from-hf", "SRC", "DST", "--mesh", "depth=2"), "depth"),
        (("from-hf", "SRC", "DST", "--mesh", "fsdp=7"), "48"),
        (("from-hf", "SRC", "DST", "--sha256", "0" * 64), "have SHA-256"),
        (("from-hf", "SRC", "DST", "--sha256", "abc"), "not 64 hexadecimal digits"),
        (("from-hf", "nowhere/at/all", "DST"), "nowhere/at/all"),
        (("to-hf", "SRC", "DST", "--max-shard-size", "big"), "the size 'big' is not of the form"),
        (("to-hf", "SRC", "DST", "--max-shard-size", "0GB"), "the size '0GB'"),
        (("to-peft", "SRC", "DST"), "has no adapters"),
        (("from-peft", "SRC", "SRC", "DST"), "has no adapter_config.json"),
        (("verify", "SRC", "SRC", "--prompt", ""), "the prompt is empty"),
        (("verify", "SRC", "SRC", "--base-a", "SRC"), "is no adapter, so it needs no --base"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_arguments(tmp_path: Path, command: Command, arguments: tuple[str, ...], said: str) -> None:
    source = write_source(tmp_path / "source", "llama2", "bfloat16")
    before = {path.name for path in tmp_path.iterdir()}
    places = {"SRC": source, "DST": tmp_path / "dst"}
    code, printed = command(*(places.get(argument, argument) for argument in arguments))
    assert code == 2 and said in printed and printed.count("error:") == 1
    assert {path.name for path in tmp_path.iterdir()} == before, "something was left behind"


@pytest.mark.parametrize("name", ["from-hf", "to-hf"])
def test_a_destination_that_exists_is_kept(tmp_path: Path, command: Command, name: str) -> None:
    source = write_source(tmp_path / "source", "llama2", "bfloat16")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/mine").write_text("precious")
    code, printed = command(name, source, tmp_path / "dst")
    assert code == 2 and "exists and is not empty" in printed
    assert [path.name for path in (tmp_path / "dst").iterdir()] == ["mine"]
    code, printed = command(name, source, tmp_path / "dst", "--force")
    assert code == 2 and "does not look like a model" in printed
    (tmp_path / "dst/config.json").touch()
    assert command(name, source, tmp_path / "dst", "--force")[0] == 0
    assert not (tmp_path / "dst/mine").exists()
    code, printed = command(name, source, source / "inside")
    assert code == 2 and "which is read" in printed


def test_a_model_without_a_tokenizer_is_converted(tmp_path: Path, command: Command) -> None:
    write_model(tmp_path / "source", LLAMA, random_weights(LLAMA), dtype="bfloat16")
    code, printed = command("from-hf", tmp_path / "source", tmp_path / "ours")
    assert code == 0 and "has no tokenizer; the weights alone are converted" in printed
    assert command("to-hf", tmp_path / "ours", tmp_path / "back")[0] == 0
    code, printed = command("verify", tmp_path / "source", tmp_path / "back")
    assert code == 0 and "not both have a tokenizer" in printed and printed.splitlines()[-1] == "the same"


@pytest.mark.parametrize("name", ["from-hf", "to-hf"])
def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Half of the tensors are written when the disk is full."""
    source = write_source(tmp_path / "source", "llama2", "bfloat16")
    before = {path.name for path in tmp_path.iterdir()}
    read, count = type(open_hf(source)).read, 0

    def full(self: Any, tensor: Any) -> np.ndarray:
        nonlocal count
        count += 1
        if count > 9:
            raise OSError(28, "No space left on device")
        return np.asarray(read(self, tensor))

    monkeypatch.setattr(type(open_hf(source)), "read", full)
    code, printed = command(name, source, tmp_path / "dst")
    assert code == 2 and "the disk is full" in printed
    assert {path.name for path in tmp_path.iterdir()} == before


def test_stopping_leaves_nothing(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source", "llama2", "bfloat16")

    def stop(self: Any, tensor: Any) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(open_hf(source)), "read", stop)
    code, printed = command("to-hf", source, tmp_path / "dst")
    assert code == 75 and printed.endswith("stopped, nothing was written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "tokenizer"]


def test_a_signal_that_a_callback_swallowed_still_stops(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source", "llama2", "bfloat16")
    read = type(open_hf(source)).read

    def swallow(self: Any, tensor: Any) -> np.ndarray:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        return np.asarray(read(self, tensor))

    monkeypatch.setattr(type(open_hf(source)), "read", swallow)
    code, printed = command("to-hf", source, tmp_path / "dst")
    assert code == 75 and "stopped" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "tokenizer"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sizes_and_meshes() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 MB", "2GiB", "7")] == [5 * 10**9, 1500000, 2**31, 7]
    assert parse_mesh("fsdp=8, tensor=2") == {"fsdp": 8, "tensor": 2}


def test_progress_counts_bytes(tmp_path: Path) -> None:
    """Every byte of the weights is counted once, so the bar ends where it should."""
    write_tiny_model(tmp_path / "model")
    counted: list[int] = []
    totals: list[int] = []

    def begin(total: int) -> Callable[[int], None]:
        totals.append(total)
        return counted.append

    from conversion.import_base import import_base

    import_base(str(tmp_path / "model"), tmp_path / "ours", layout="store", begin=begin)
    assert totals == [sum(counted)]
    progress = Progress(quiet=True)
    bar = progress.bytes("x", 3_000_000)
    bar.add(2_500_000)
    bar.close()
