"""PEFT adapters that we write: PEFT loads them, and they come back bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_peft import (
    LORA,
    NEAR,
    NEW,
    Q0,
    SOME,
    TIED,
    VOCAB,
    load_with_peft,
    ours,
    random_trainable,
    theirs,
    write_bases,
)
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.conversion.hf.directory import HFModel, open_hf, stacked
from transllm_jax.conversion.peft.read import PeftAdapter, open_peft, read_peft
from transllm_jax.conversion.peft.write import Rows, write_peft
from transllm_jax.errors import UserError
from transllm_jax.model.lora import LoraConfig


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, HFModel]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.reference
@TIED
@pytest.mark.parametrize(
    ("lora", "rows", "train_base"),
    [(LORA, None, False), (SOME, "tables", False), (LORA, None, True)],
    ids=["tokens", "tables", "base rows trained"],
)
def test_peft_loads_what_we_write(
    tmp_path: Path, bases: dict[bool, HFModel], tied: bool, lora: LoraConfig, rows: Rows | None, train_base: bool
) -> None:
    base = bases[tied]
    trainable = random_trainable(base, lora, train_base=train_base)
    write_peft(tmp_path / "a", base, trainable, lora, base_model="me/base", rows=rows)
    wanted = ours(base, lora, trainable)
    loaded = load_with_peft(base, tmp_path / "a")
    got = theirs(loaded, VOCAB + NEW)
    assert np.abs(got - wanted).max() < NEAR and np.abs(got).max() > 2
    assert loaded.peft_config["default"].lora_dropout == lora.dropout
    assert loaded.peft_config["default"].base_model_name_or_path == "me/base"
    with loaded.disable_adapter():
        assert np.abs(theirs(loaded, VOCAB + NEW) - wanted).max() > 0.5, "the adapter changes the logits"
    # Merged and saved by PEFT, it is still the same model, and tied if the base is.
    merged = loaded.merge_and_unload()
    assert np.abs(theirs(merged, VOCAB + NEW) - wanted).max() < NEAR
    merged.save_pretrained(tmp_path / "merged")
    again = open_hf(tmp_path / "merged")
    assert again.config == replace(base.config, vocab_size=VOCAB + NEW)
    adapter = PeftAdapter(lora, trainable, NEW, None)
    mine = stacked(open_peft(adapter, base))
    for path, array in stacked(again).items():
        assert np.abs(array - mine[path]).max() < 1e-6, path  # the merge rounds once


@pytest.mark.reference
def test_peft_loads_an_adapter_without_new_rows(tmp_path: Path, bases: dict[bool, HFModel]) -> None:
    trainable = random_trainable(bases[True], LORA, 0)
    write_peft(tmp_path / "a", bases[True], trainable, LORA, base_model="me/base")
    got = theirs(load_with_peft(bases[True], tmp_path / "a", VOCAB), VOCAB)
    assert np.abs(got - ours(bases[True], LORA, trainable)).max() < NEAR


@TIED
@pytest.mark.parametrize("train_base", [False, True], ids=["new rows", "all rows"])
@pytest.mark.parametrize("rows", ["tokens", "tables"])
def test_written_and_read_back_bit_for_bit(
    tmp_path: Path, bases: dict[bool, HFModel], tied: bool, train_base: bool, rows: Rows
) -> None:
    base = bases[tied]
    trainable = random_trainable(base, SOME, train_base=train_base)
    write = partial(write_peft, tmp_path / "a", base, trainable, SOME, base_model="b", rows=rows)
    if train_base and rows == "tokens":
        with pytest.raises(UserError, match=r"base rows of the vocabulary were trained.* choose tables"):
            write()
        assert not list(tmp_path.iterdir())
        return
    write()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    back = read_peft(tmp_path / "a", base)
    assert back.lora == SOME and back.new_rows == NEW and back.tokenizer_dir is None
    assert back.trainable.keys() == trainable.keys()
    for path, array in trainable.items():
        assert back.trainable[path].dtype == np.float32
        assert back.trainable[path].tobytes() == array.tobytes(), path
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    if rows == "tokens":
        # The file holds only what was trained, and nothing of the base.
        assert sum(array.size for array in stored.values()) == sum(array.size for array in trainable.values())
    np.testing.assert_array_equal(stored[f"{Q0}.lora_A.weight"], trainable["blocks.attention.q.a"][0].T)
    np.testing.assert_array_equal(stored[f"{Q0}.lora_B.weight"], trainable["blocks.attention.q.b"][0].T)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_types_are_rounded_once(tmp_path: Path, bases: dict[bool, HFModel], name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    trainable = random_trainable(bases[False], SOME)
    for rows in ("tokens", "tables"):
        write_peft(tmp_path / rows, bases[False], trainable, SOME, base_model="b", dtype=name, rows=rows)
        back = read_peft(tmp_path / rows, bases[False])
        # A table holds the rounded rows of the base, too; they are recognised.
        assert back.trainable.keys() == trainable.keys()
        for path, array in trainable.items():
            np.testing.assert_array_equal(back.trainable[path], array.astype(dtype).astype(np.float32))
    big = trainable | {"vocabulary.new": trainable["vocabulary.new"] + np.float32(3e38)}
    if name == "float16":
        with pytest.raises(UserError, match=r"embed_tokens.token_adapter.*float16.*NaN or infinite"):
            write_peft(tmp_path / "big", bases[False], big, SOME, base_model="b", dtype=name)
        assert not (tmp_path / "big").exists()


def test_the_tokenizer_is_written_too(tmp_path: Path, bases: dict[bool, HFModel]) -> None:
    build_tiny_tokenizer(tmp_path / "t")
    vocabulary = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    count = len(vocabulary["model"]["vocab"] | {t["content"]: t["id"] for t in vocabulary["added_tokens"]})
    trainable = random_trainable(bases[True], SOME)
    write = partial(write_peft, tmp_path / "a", bases[True], base_model="b", tokenizer_dir=tmp_path / "t", lora=SOME)
    with pytest.raises(UserError, match=f"the tokenizer has {count - VOCAB} ids from 61 on, the adapter has 5 new"):
        write(trainable=trainable)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    fits = random_trainable(bases[True], SOME, count - VOCAB)
    write(trainable=fits)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "t" / "tokenizer.json").read_bytes()
    assert read_peft(tmp_path / "a", bases[True]).tokenizer_dir == tmp_path / "a"
    with pytest.raises(UserError, match="exists and is not empty"):
        write(trainable=fits)
    write(trainable=fits, overwrite=True)


def test_what_cannot_be_written_is_refused(tmp_path: Path, bases: dict[bool, HFModel]) -> None:
    trainable = random_trainable(bases[False], SOME)
    write = partial(write_peft, tmp_path / "a", bases[False], base_model="b")
    with pytest.raises(UserError, match=r"vocabulary\.output_new is missing"):
        write({path: array for path, array in trainable.items() if path != "vocabulary.output_new"}, SOME)
    with pytest.raises(UserError, match="no layer has an adapter"):
        write({path: array for path, array in trainable.items() if "blocks" not in path}, replace(SOME, targets=()))
    with pytest.raises(UserError, match="dtype 'int8'"):
        write(trainable, SOME, dtype="int8")
    # These are defects, not errors of the user.
    with pytest.raises(ValueError, match="targets"):
        write(trainable, replace(SOME, targets=("q", "v")))
    with pytest.raises(ValueError, match="rank 2, the config 3"):
        write(trainable, replace(SOME, rank=3))
    assert not list(tmp_path.iterdir())
