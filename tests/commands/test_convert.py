"""`transllm convert` of models: round trips keep every bit, and a failure leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Command, random_weights, write_tiny_model
from converted import LLAMA, bits, write_source
from tiny_families import FAMILIES

from transllm_jax.commands.chat import open_session
from transllm_jax.conversion.hf.directory import open_hf, read_config, read_weights, write_model
from transllm_jax.conversion.hf.safetensors_io import DTYPES, write_tensors
from transllm_jax.conversion.import_base import import_base
from transllm_jax.conversion.names import EMBEDDING, OUTPUT, tensors
from transllm_jax.conversion.verify import compare
from transllm_jax.disk import parse_size, read_json, write_json
from transllm_jax.model.mesh import parse_mesh
from transllm_jax.progress import Progress


@pytest.fixture
def command(transllm: Command) -> Command:
    """Runs `transllm convert ARGUMENTS`."""
    return partial(transllm, "convert")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_round_trip_keeps_every_bit(tmp_path: Path, command: Command, name: str, dtype: str) -> None:
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


def test_a_redundant_output_table_is_left_out_and_reported(tmp_path: Path, command: Command) -> None:
    source = write_source(tmp_path / "source", "smollm2", "bfloat16")
    model = open_hf(source)
    table = tensors(model.config)
    embedding = next(tensor for tensor in table if tensor.name == EMBEDDING)
    more = [*table, replace(embedding, name=OUTPUT)]
    arrays = {tensor.name: model.read(tensor) for tensor in table}
    arrays[OUTPUT] = arrays[EMBEDDING]
    write_tensors(source, more, lambda tensor: arrays[tensor.name], DTYPES["BF16"])
    code, printed = command("from-hf", source, tmp_path / "ours")
    assert code == 0 and "left out, because other tensors determine them: lm_head.weight" in printed


def test_padding_rows_are_kept_and_reported(tmp_path: Path, command: Command) -> None:
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


def test_the_type_can_be_chosen(tmp_path: Path, command: Command) -> None:
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


def test_a_run_and_chat_can_start_from_a_native_checkpoint(tmp_path: Path, command: Command) -> None:
    write_tiny_model(tmp_path / "model")
    assert command("from-hf", tmp_path / "model", tmp_path / "ours", "--mesh", "fsdp=2,tensor=2")[0] == 0
    import_base(str(tmp_path / "ours"), tmp_path / "base")
    assert bits(open_hf(tmp_path / "base")) == bits(open_hf(tmp_path / "model"))
    assert open_session(tmp_path / "ours", max_new_tokens=2).name == "ours"


def test_verify_reports_differences(tmp_path: Path, command: Command) -> None:
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


def test_verify_reports_missing_tensors_and_config_values(tmp_path: Path, command: Command) -> None:
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


def test_nan_is_never_the_same(tmp_path: Path) -> None:
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
    # Not even as itself: its logits are NaN.
    assert not compare(Damaged(), Damaged(), [1, 2, 3]).within(1e9)


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
def test_an_existing_destination_is_kept(tmp_path: Path, command: Command, name: str) -> None:
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
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The disk fills up when half of the tensors are written."""
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


def test_an_interrupt_leaves_nothing(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source", "llama2", "bfloat16")

    def stop(self: Any, tensor: Any) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(open_hf(source)), "read", stop)
    code, printed = command("to-hf", source, tmp_path / "dst")
    assert code == 75 and printed.endswith("stopped, nothing was written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "tokenizer"]


def test_a_signal_still_stops_when_a_callback_swallows_it(
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
    """Each byte of the weights is counted once, so the bar ends at its total."""
    write_tiny_model(tmp_path / "model")
    counted: list[int] = []
    totals: list[int] = []

    def begin(total: int) -> Callable[[int], None]:
        totals.append(total)
        return counted.append

    import_base(str(tmp_path / "model"), tmp_path / "ours", layout="store", begin=begin)
    assert totals == [sum(counted)]
    progress = Progress(quiet=True)
    bar = progress.bytes("x", 3_000_000)
    bar.add(2_500_000)
    bar.close()
