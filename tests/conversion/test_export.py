"""Export to a Hugging Face directory: adapters are merged, new rows are added, and transformers reads it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_directories import CONFIG, IDS, UNTIED, write_directory, write_tokenizer

from transllm_jax.conversion.hf.directory import open_hf, read_config, read_weights
from transllm_jax.conversion.hf.export import export_hf
from transllm_jax.conversion.import_base import import_base
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.names import kernel_shapes
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig

RANK, ALPHA, NEW = 4, 6.0, 5


def random_trainable(config: LlamaConfig, only: tuple[str, ...] = ("",)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    trainable = {}
    for path, (size_in, size_out) in kernel_shapes(config).items():
        if any(part in path for part in only):
            trainable[f"{path}.a"] = rng.standard_normal((config.num_hidden_layers, size_in, RANK), np.float32)
            trainable[f"{path}.b"] = rng.standard_normal((config.num_hidden_layers, RANK, size_out), np.float32)
    names = ["vocabulary.new"] if config.tie_word_embeddings else ["vocabulary.new", "vocabulary.output_new"]
    return trainable | {name: rng.standard_normal((NEW, config.hidden_size), np.float32) for name in names}


def export(tmp_path: Path, trainable: dict[str, np.ndarray], dtype: str = "float32", **options: Any) -> Path:
    write_tokenizer(tmp_path / "vocabulary", CONFIG.vocab_size + NEW)
    dst = tmp_path / "export"
    model = Merged(open_hf(tmp_path / "base"), trainable, ALPHA / RANK)
    export_hf(model, tmp_path / "base", dst, tokenizer_dir=tmp_path / "vocabulary", dtype=dtype, **options)
    return dst


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_export_merges_in_float32_and_appends_rows(tmp_path: Path, config: LlamaConfig) -> None:
    arrays = write_directory(tmp_path / "base", config)
    trainable = random_trainable(config)
    dst = export(tmp_path, trainable, max_shard_bytes=30_000)
    assert read_config(dst) == replace(config, vocab_size=config.vocab_size + NEW)
    merged = {name: array for file in dst.glob("*.safetensors") for name, array in load_file(file).items()}
    assert merged.keys() == arrays.keys()  # no lm_head where the embeddings are tied
    x = np.random.default_rng(1).standard_normal((3, config.hidden_size)).astype(np.float32)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        a, b = trainable["blocks.mlp.gate.a"][layer], trainable["blocks.mlp.gate.b"][layer]
        expected = x @ arrays[name].T + ALPHA / RANK * (x @ a) @ b
        np.testing.assert_allclose(x @ merged[name].T, expected, rtol=1e-4, atol=1e-4)
        norm = f"model.layers.{layer}.input_layernorm.weight"
        assert merged[norm].tobytes() == arrays[norm].tobytes()
    rows = {"model.embed_tokens.weight": "vocabulary.new"}
    if not config.tie_word_embeddings:
        rows["lm_head.weight"] = "vocabulary.output_new"
    for name, path in rows.items():
        np.testing.assert_array_equal(merged[name], np.concatenate([arrays[name], trainable[path]]))
    assert (dst / "chat_template.jinja").read_bytes() == (tmp_path / "vocabulary/chat_template.jinja").read_bytes()
    assert json.loads((dst / "generation_config.json").read_text()) == IDS
    # The export can be the base of another run.
    import_base(str(dst), tmp_path / "next")


def test_export_rounds_once(tmp_path: Path) -> None:
    write_directory(tmp_path / "base", dtype=ml_dtypes.bfloat16)
    trainable = random_trainable(CONFIG)
    wide = read_weights(export(tmp_path, trainable))
    shutil.rmtree(tmp_path / "export")
    narrow = read_weights(export(tmp_path, trainable, "bfloat16"), ml_dtypes.bfloat16)
    for path, array in wide.items():
        np.testing.assert_array_equal(narrow[path], array.astype(ml_dtypes.bfloat16), err_msg=path)
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "bfloat16"


def test_export_without_adapters_is_the_base(tmp_path: Path) -> None:
    arrays = write_directory(tmp_path / "base")
    write_tokenizer(tmp_path / "same", CONFIG.vocab_size)
    model = Merged(open_hf(tmp_path / "base"), {}, ALPHA / RANK)
    export_hf(model, tmp_path / "base", tmp_path / "plain", tokenizer_dir=tmp_path / "same")
    plain = load_file(tmp_path / "plain/model.safetensors")
    assert all(plain[name].tobytes() == arrays[name].tobytes() for name in arrays)
    dst = export(tmp_path, random_trainable(CONFIG, only=("attention.q",)))
    partly = load_file(dst / "model.safetensors")
    changed = {name for name in arrays if not np.array_equal(partly[name], arrays[name])}
    assert changed == {"model.embed_tokens.weight"} | {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("blocks.mlp.up.b"), r"blocks\.mlp\.up\.b is missing"),
        (lambda t: t.update({"blocks.mlp.x.a": np.ones(1)}), r"blocks\.mlp\.x\.a is not part"),
        (
            lambda t: t.update({"blocks.mlp.up.a": np.ones((3, 24, 5))}),
            r"shape \[3, 24, 5\], expected \[3, 24, 4\]",
        ),
        (lambda t: t.update({"vocabulary.new": np.ones((NEW, 23))}), r"vocabulary\.new has shape"),
        (lambda t: t.update({"vocabulary.output_new": np.ones((NEW, 24))}), r"output_new is not part"),
        (lambda t: t.update({"vocabulary.new": np.ones((NEW + 1, 24))}), "5 ids from 300 on.*6 new rows"),
        (lambda t: t["blocks.mlp.up.a"].__setitem__((0, 0, 0), np.nan), r"blocks\.mlp\.up\.a .* NaN"),
    ],
)
def test_export_refuses_an_adapter_of_another_model(tmp_path: Path, change: Any, said: str) -> None:
    write_directory(tmp_path / "base")
    trainable = random_trainable(CONFIG)
    change(trainable)
    with pytest.raises(UserError, match=said) as caught:
        export(tmp_path, trainable)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "export").exists()


def test_export_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    write_directory(tmp_path / "base")
    trainable = random_trainable(CONFIG)
    with pytest.raises(UserError, match="'int8' is not one of"):
        export(tmp_path, trainable, "int8")
    trainable["vocabulary.new"][0, 0] = 1e6
    with pytest.raises(UserError, match=r"embed_tokens.*: in float16, which ends at 65504, 1 of .*; write bfloat16 or"):
        export(tmp_path, trainable, "float16")
    dst = export(tmp_path, trainable)
    with pytest.raises(UserError, match="not empty"):
        export(tmp_path, trainable)
    (dst / "leftover").touch()
    export(tmp_path, trainable, overwrite=True)
    assert not (dst / "leftover").exists()


@pytest.mark.reference
@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_transformers_reads_and_writes_the_same(tmp_path: Path, config: LlamaConfig) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_directory(tmp_path / "base", config)
    dst = export(tmp_path, random_trainable(config), max_shard_bytes=30_000)
    model, info = AutoModelForCausalLM.from_pretrained(dst, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == 2
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == config.tie_word_embeddings
    assert model.config.rope_parameters["rope_theta"] == config.rope_theta
    tokenizer = AutoTokenizer.from_pretrained(dst)
    assert len(tokenizer) == model.config.vocab_size == config.vocab_size + NEW
    assert tokenizer.encode("<new0>") == [len(tokenizer) - (CONFIG.vocab_size + NEW - 259)]
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = read_weights(dst), read_weights(tmp_path / "theirs")
    assert read_config(tmp_path / "theirs") == read_config(dst)
    assert all(ours[path].tobytes() == theirs[path].tobytes() for path in ours)
