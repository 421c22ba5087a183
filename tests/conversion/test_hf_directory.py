"""Hugging Face directories: weights are read and written bit for bit, and damage is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_directories import CONFIG, UNTIED, edit_json, write_directory

from transllm_jax.conversion.hf.directory import read_config, read_weights, write_model
from transllm_jax.conversion.import_base import import_base
from transllm_jax.conversion.names import collapse, tensors, weight_shapes
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig


def test_shapes_of_our_arrays() -> None:
    layers, d, n, k, h, f, v = 3, 24, 4, 2, 8, 40, 300
    assert weight_shapes(UNTIED) == {
        "vocabulary.base": (v, d),
        "vocabulary.output_base": (v, d),
        "final_norm.scale": (d,),
        "blocks.attention_norm.scale": (layers, d),
        "blocks.mlp_norm.scale": (layers, d),
        "blocks.attention.q.kernel": (layers, d, n * h),
        "blocks.attention.k.kernel": (layers, d, k * h),
        "blocks.attention.v.kernel": (layers, d, k * h),
        "blocks.attention.o.kernel": (layers, n * h, d),
        "blocks.mlp.gate.kernel": (layers, d, f),
        "blocks.mlp.up.kernel": (layers, d, f),
        "blocks.mlp.down.kernel": (layers, f, d),
    }
    assert "vocabulary.output_base" not in weight_shapes(CONFIG)


def test_read_weights_puts_each_tensor_in_its_place(tmp_path: Path) -> None:
    arrays = write_directory(tmp_path / "m", UNTIED, shards=3)
    weights = read_weights(tmp_path / "m")
    assert {path: array.shape for path, array in weights.items()} == weight_shapes(UNTIED)
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        expected = {
            "blocks.attention.q.kernel": arrays[f"{prefix}.self_attn.q_proj.weight"].T,
            "blocks.attention.k.kernel": arrays[f"{prefix}.self_attn.k_proj.weight"].T,
            "blocks.attention.v.kernel": arrays[f"{prefix}.self_attn.v_proj.weight"].T,
            "blocks.attention.o.kernel": arrays[f"{prefix}.self_attn.o_proj.weight"].T,
            "blocks.mlp.gate.kernel": arrays[f"{prefix}.mlp.gate_proj.weight"].T,
            "blocks.mlp.up.kernel": arrays[f"{prefix}.mlp.up_proj.weight"].T,
            "blocks.mlp.down.kernel": arrays[f"{prefix}.mlp.down_proj.weight"].T,
            "blocks.attention_norm.scale": arrays[f"{prefix}.input_layernorm.weight"],
            "blocks.mlp_norm.scale": arrays[f"{prefix}.post_attention_layernorm.weight"],
        }
        for path, array in expected.items():
            np.testing.assert_array_equal(weights[path][layer], array, err_msg=path)
    np.testing.assert_array_equal(weights["vocabulary.base"], arrays["model.embed_tokens.weight"])
    np.testing.assert_array_equal(weights["vocabulary.output_base"], arrays["lm_head.weight"])
    np.testing.assert_array_equal(weights["final_norm.scale"], arrays["model.norm.weight"])


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_round_trip_is_bit_identical(tmp_path: Path, config: LlamaConfig, max_shard_bytes: int) -> None:
    arrays = write_directory(tmp_path / "m", config)
    write_model(
        tmp_path / "back",
        config,
        read_weights(tmp_path / "m"),
        tokenizer_dir=tmp_path / "m",
        max_shard_bytes=max_shard_bytes,
    )
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 20_000)
    back = {name: array for file in files for name, array in load_file(file).items()}
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].tobytes() == array.tobytes() and back[name].shape == array.shape, name
    if len(files) > 1:
        index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert read_config(tmp_path / "back") == config


def test_half_types_are_kept(tmp_path: Path) -> None:
    for dtype in (ml_dtypes.bfloat16, np.float16):
        directory = tmp_path / np.dtype(dtype).name
        arrays = write_directory(directory, dtype=dtype)
        embedding = arrays["model.embed_tokens.weight"]
        wide = read_weights(directory)["vocabulary.base"]
        assert wide.dtype == np.float32
        np.testing.assert_array_equal(wide, embedding.astype(np.float32))
    narrow = read_weights(tmp_path / "bfloat16", dtype=ml_dtypes.bfloat16)
    assert all(array.dtype == ml_dtypes.bfloat16 for array in narrow.values())
    write_model(tmp_path / "back", CONFIG, narrow, dtype="bfloat16")
    with safe_open(tmp_path / "back/model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("model.norm.weight").get_dtype() == "BF16"
    again = read_weights(tmp_path / "back", dtype=ml_dtypes.bfloat16)
    assert all(again[path].tobytes() == narrow[path].tobytes() for path in narrow)


def test_reading_needs_the_memory_of_one_copy(tmp_path: Path) -> None:
    big = replace(CONFIG, hidden_size=128, intermediate_size=512, num_hidden_layers=8)
    write_directory(tmp_path / "m", big)
    tracemalloc.start()
    weights = read_weights(tmp_path / "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = sum(array.nbytes for array in weights.values())
    largest = max(int(np.prod(tensor.shape)) for tensor in tensors(big)) * 4
    assert peak < total + 2 * largest + 300_000, (peak, total, largest)


def test_derived_buffers_and_an_equal_tied_output_are_accepted(tmp_path: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()

    write_directory(tmp_path / "m", change=change)
    assert read_weights(tmp_path / "m").keys() == weight_shapes(CONFIG).keys()

    def differ(arrays: dict[str, np.ndarray]) -> None:
        change(arrays)
        arrays["lm_head.weight"][7, 7] += 1

    write_directory(tmp_path / "other", change=differ)
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        read_weights(tmp_path / "other")


def test_all_wrong_tensors_are_listed(tmp_path: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        del arrays["model.norm.weight"], arrays["model.layers.0.mlp.up_proj.weight"]
        del arrays["model.layers.2.mlp.up_proj.weight"]
        arrays["model.layers.1.self_attn.q_proj.bias"] = np.ones(4, np.float32)
        arrays["model.layers.1.self_attn.k_proj.weight"] = np.ones((24, 16), np.float32)
        arrays["model.layers.1.self_attn.o_proj.weight"] = np.ones((24, 32), np.int8)

    write_directory(tmp_path / "m", change=change)
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path / "m")
    for said in (
        "missing: model.layers.{0,2}.mlp.up_proj.weight, model.norm.weight",
        "not part of the model: model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.self_attn.k_proj.weight has shape [24, 16], config.json says [16, 24]",
        "model.layers.1.self_attn.o_proj.weight has type I8",
    ):
        assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert collapse([]) == ""


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _cut_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _empty(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _nan(directory: Path) -> None:
    arrays = load_file(directory / "model.safetensors")
    arrays["model.layers.1.mlp.up_proj.weight"][0, :2] = [np.nan, np.inf]
    save_file(arrays, directory / "model.safetensors")


def _huge_header(directory: Path) -> None:
    """A header that claims an exabyte: to read it would take all memory."""
    file = directory / "model.safetensors"
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])


def _index(weight_map: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "model-1.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


DAMAGE = [
    (_cut, r"model\.safetensors is truncated"),
    (_cut_header, r"model\.safetensors is truncated"),
    (_empty, r"model\.safetensors is truncated"),
    (_huge_header, r"model\.safetensors is truncated or not a safetensors file .*fetch it again"),
    (_pickle, r"pickle checkpoints only \(pytorch_model\.bin\)"),
    (_nan, r"2 values are NaN or infinite, in model\.layers\.1\.mlp\.up_proj\.weight"),
    (_index({"model.norm.weight": "model-2.safetensors"}), r"missing files: model-2\.safetensors"),
    (_index({"model.norm.weight": "../m/model-1.safetensors"}), r"outside the directory: \.\./m"),
    (_index({"model.norm.weight": "/etc/hostname"}), "outside the directory: /etc/hostname"),
    (_index({"nowhere.weight": "model-1.safetensors"}), r"disagree about nowhere\.weight"),
    (_index([]), "no weight_map"),
    (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    (lambda d: (d / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is not valid JSON"),
    (lambda d: (d / "config.json").write_text("[]"), "list where an object"),
    (edit_json("config.json", lambda c: c.update(model_type="mamba")), "'mamba'"),
    (edit_json("config.json", lambda c: c.update(quantization_config={"bits": 4})), "quantization_config is set"),
    (edit_json("config.json", lambda c: c.update(auto_map={"AutoModel": "x.Y"})), "auto_map is set"),
    (edit_json("config.json", lambda c: c.update(num_hidden_layers=4)), r"missing: model\.layers\.3\."),
    (edit_json("config.json", lambda c: c.update(vocab_size=299)), r"shape \[300, 24\], config\.json says \[299"),
    (edit_json("config.json", lambda c: c.update(tie_word_embeddings=False)), r"missing: lm_head\.weight"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_damage_is_refused(tmp_path: Path, damage: Any, said: str) -> None:
    write_directory(tmp_path / "m")
    damage(tmp_path / "m")
    for attempt in (read_weights, lambda directory: import_base(str(directory), tmp_path / "base")):
        with pytest.raises(UserError, match=said) as caught:
            attempt(tmp_path / "m")
        assert "\n" not in str(caught.value) and str(tmp_path / "m") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "a failed import leaves nothing behind"


def test_the_index_decides_what_is_read(tmp_path: Path) -> None:
    """Other files in the directory, and other tensors in the files of the index, are not read."""
    arrays = write_directory(tmp_path / "m", shards=2)
    wanted = read_weights(tmp_path / "m")
    first, second = sorted((tmp_path / "m").glob("*.safetensors"))
    # The second file holds other numbers under a name that the index has in the first file.
    name = next(iter(load_file(first)))
    save_file({name: arrays[name] + 1} | load_file(second), second)
    for other in ("model.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"lora_A": np.ones(2, np.float32), name: arrays[name] + 1}, tmp_path / "m" / other)
    (tmp_path / "m" / "optimizer.bin").touch()
    assert all(np.array_equal(read, wanted[path]) for path, read in read_weights(tmp_path / "m").items())
    for layout in ("hf", "store"):
        said: list[str] = []
        import_base(str(tmp_path / "m"), tmp_path / layout, layout=layout, say=said.append)  # type: ignore[arg-type]
        aside = "left aside: adapter_model.safetensors, consolidated.safetensors, model.safetensors"
        assert sum(aside in line for line in said) == 1
        assert sum(f"hold {name}; read from where model.safetensors.index.json says" in line for line in said) == 1
    assert sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors*")) == [
        first.name,
        second.name,
        "model.safetensors.index.json",
    ]
    assert all(np.array_equal(read, wanted[path]) for path, read in read_weights(tmp_path / "hf").items())


def test_an_index_of_another_model_is_reported(tmp_path: Path) -> None:
    write_directory(tmp_path / "m")
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    said: list[str] = []
    import_base(str(tmp_path / "m"), tmp_path / "base", say=said.append)
    assert any("names files that are not there; model.safetensors is read" in line for line in said)
    assert not (tmp_path / "base/model.safetensors.index.json").exists()


def test_a_tensor_in_two_shards_without_an_index_is_refused(tmp_path: Path) -> None:
    write_directory(tmp_path / "m", shards=2)
    for file in sorted((tmp_path / "m").glob("*.safetensors")):
        save_file({"stray": np.ones(2, np.float32)} | load_file(file), file)
    with pytest.raises(UserError, match=r"is in both .* does not say which is meant; fetch the model again"):
        read_weights(tmp_path / "m")
