"""Our checkpoint on disk: every bit comes back, and a part can be read alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import random_weights
from tiny_store import (
    BF16,
    CONFIG,
    F16,
    F32,
    MESH,
    assert_same_bits,
    assert_same_model,
    edited,
    refused,
    source_of,
    written,
)

from transllm_jax.conversion import store
from transllm_jax.conversion.hf.directory import open_hf, read_weights, write_model
from transllm_jax.conversion.names import EMBEDDING, tensors, weight_shapes
from transllm_jax.conversion.store import MANIFEST, MAX_CHUNK_BYTES, open_store, transposed
from transllm_jax.disk import read_json
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return written(tmp_path / "ours", source_of())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mesh", [None, MESH], ids=["whole", "mesh"])
def test_a_hugging_face_directory_comes_back_bit_for_bit(
    tmp_path: Path, dtype: str, mesh: dict[str, int] | None
) -> None:
    config = replace(CONFIG, attention_bias=True, mlp_bias=True)
    write_model(tmp_path / "hf", config, random_weights(config), dtype=dtype)
    source = open_hf(tmp_path / "hf")
    done: list[int] = []
    opened = open_store(written(tmp_path / "ours", source, mesh=mesh, advance=done.append))
    assert_same_model(source, opened)
    assert opened.mesh == mesh and opened.where == str(tmp_path / "ours")
    size = np.dtype(store.DTYPES["BF16"] if dtype == "bfloat16" else dtype).itemsize
    assert done == [int(np.prod(tensor.shape)) * size for tensor in tensors(config)]
    for kind in (np.float32, ml_dtypes.bfloat16):
        theirs, own = read_weights(tmp_path / "hf", kind), opened.weights(kind)
        assert list(theirs) == list(own)
        for path in own:
            assert_same_bits(theirs[path], own[path])


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, tie_word_embeddings=True),
        replace(CONFIG, model_type="qwen2", attention_bias=True),
        replace(CONFIG, model_type="qwen3", num_hidden_layers=1),
    ],
    ids=["tied", "qwen2", "qwen3"],
)
def test_every_family_comes_back(tmp_path: Path, config: LlamaConfig) -> None:
    source = source_of(config)
    opened = open_store(written(tmp_path / "ours", source, mesh=MESH))
    assert_same_model(source, opened)
    assert opened.specs.keys() == weight_shapes(config).keys()
    assert ("vocabulary.output_base" in opened.specs) == (not config.tie_word_embeddings)


def test_tensors_may_have_different_types(tmp_path: Path) -> None:
    """Every finite value of the half types, also subnormal ones and -0, comes back from the wider type."""
    config = replace(CONFIG, hidden_size=1024, num_hidden_layers=3)
    source = source_of(config)
    bits = np.arange(2**16, dtype=np.uint16)
    every = {kind: bits.view(kind)[np.isfinite(bits.view(kind).astype(F32))] for kind in (F16, BF16)}
    name = "model.layers.{}.mlp.up_proj.weight"
    shape = source.given[name.format(0)].shape
    assert np.prod(shape) >= 2**16  # so one tensor holds all values
    for layer, kind in enumerate((F16, BF16, F32)):
        values = np.arange(2**16, dtype=np.float32) / 3 if kind == F32 else every[kind]
        source.given[name.format(layer)] = np.resize(values, shape)
    down = "model.layers.{}.mlp.down_proj.weight"
    for layer, kind in enumerate((F16, BF16, BF16)):
        source.given[down.format(layer)] = np.resize(every[kind][::-1], shape[::-1])
    source.given[EMBEDDING] = source.given[EMBEDDING].astype(F32)
    opened = open_store(written(tmp_path / "ours", source))
    assert_same_model(source, opened)
    assert opened.specs["blocks.mlp.up.kernel"].dtype == opened.specs["blocks.mlp.down.kernel"].dtype == F32
    entries = read_json(tmp_path / "ours" / MANIFEST)["arrays"]
    assert entries["blocks.mlp.up.kernel"]["layer_dtypes"] == ["float16", "bfloat16", "float32"]
    assert [path for path, entry in entries.items() if "layer_dtypes" in entry] == [
        "blocks.mlp.up.kernel",
        "blocks.mlp.down.kernel",
    ]
    assert entries["blocks.attention.q.kernel"]["dtype"] == "bfloat16"
    edited(tmp_path / "ours", lambda m: m["arrays"]["blocks.mlp.up.kernel"]["layer_dtypes"].pop())
    edited(tmp_path / "ours", lambda m: m["arrays"]["blocks.mlp.down.kernel"].update(layer_dtypes=["bfloat16"] * 3))
    message = refused(tmp_path / "ours")
    assert "blocks.mlp.up.kernel: layer_dtypes are ['float16', 'bfloat16']" in message
    assert "blocks.mlp.down.kernel: dtype float32 is not the widest" in message


def test_files_are_as_documented(ours: Path) -> None:
    """The module's docstring promises these files to readers with another zarr library."""
    opened = open_store(ours)
    manifest = read_json(ours / MANIFEST)
    assert (manifest["format"], manifest["version"], manifest["mesh"]) == ("transllm-jax weights", 1, None)
    assert manifest["arrays"]["blocks.mlp.down.kernel"] == {
        "shape": [2, 80, 48],
        "dtype": "bfloat16",
        "chunks": [1, 80, 48],
    }
    zarr = read_json(ours / "weights" / "blocks.mlp.down.kernel" / "zarr.json")
    assert (zarr["zarr_format"], zarr["data_type"], zarr["shape"]) == (3, "bfloat16", [2, 80, 48])
    assert zarr["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    chunk = (ours / "weights" / "blocks.mlp.down.kernel" / "c" / "1" / "0" / "0").read_bytes()
    tensor = next(t for t in tensors(CONFIG) if t.name == "model.layers.1.mlp.down_proj.weight")
    assert chunk[:-4] == np.ascontiguousarray(opened.read(tensor).T).tobytes()
    assert {file.name for file in ours.iterdir()} == {"weights", MANIFEST, "config.json", "generation_config.json"}


def test_zeros_are_stored(tmp_path: Path) -> None:
    """zarr omits chunks of zeros by default; then a lost chunk would look like one of zeros."""
    source = source_of()
    for array in source.given.values():
        array[...] = 0
    directory = written(tmp_path / "ours", source)
    assert_same_model(source, open_store(directory))
    (directory / "weights/final_norm.scale/c/0").unlink()
    assert "final_norm.scale: 1 of 1 chunks are missing or unreadable (c/0)" in refused(directory)


def test_a_table_is_split_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(replace(CONFIG, vocab_size=61))
    monkeypatch.setattr(store, "MAX_CHUNK_BYTES", 20 * 48 * 2)
    opened = open_store(written(tmp_path / "ours", source))
    # 20 of the 61 rows fit into a chunk: four chunks, as even as possible.
    assert opened.specs["vocabulary.base"].chunks == (16, 48)
    assert opened.specs["vocabulary.output_base"].chunks == (16, 48)
    assert opened.specs["blocks.mlp.up.kernel"].chunks == (1, 48, 80)
    assert_same_model(source, opened)
    rows = opened.read_array("vocabulary.base", (slice(14, 35), slice(3, 40)))
    assert_same_bits(rows, source.given[EMBEDDING][14:35, 3:40])
    assert MAX_CHUNK_BYTES == 2**27


def test_a_chunk_is_what_one_device_holds(tmp_path: Path) -> None:
    layouts = open_store(written(tmp_path / "ours", source_of(), mesh=MESH)).specs
    assert {path: layout.chunks for path, layout in layouts.items()} == {
        "vocabulary.base": (60, 6),
        "vocabulary.output_base": (60, 6),
        "blocks.attention.q.kernel": (1, 24, 16),
        "blocks.attention.k.kernel": (1, 24, 8),
        "blocks.attention.v.kernel": (1, 24, 8),
        "blocks.attention.o.kernel": (1, 16, 24),
        "blocks.mlp.gate.kernel": (1, 24, 20),
        "blocks.mlp.up.kernel": (1, 24, 20),
        "blocks.mlp.down.kernel": (1, 20, 24),
        "blocks.attention_norm.scale": (1, 48),
        "blocks.mlp_norm.scale": (1, 48),
        "final_norm.scale": (48,),
    }


def test_a_device_reads_only_its_chunks(tmp_path: Path) -> None:
    """Without the files of all other devices, its part can be read, and nothing else."""
    source = source_of()
    directory = written(tmp_path / "ours", source, mesh=MESH)
    opened, path = open_store(directory), "blocks.mlp.up.kernel"
    whole = opened.read_array(path, ())
    mine = (slice(None), slice(24, 48, None), slice(20, 40))
    keep = {directory / "weights" / path / f"c/{layer}/1/1" for layer in range(2)}
    chunks = {file for file in (directory / "weights" / path / "c").rglob("*") if file.is_file()}
    assert keep < chunks and len(chunks) == 2 * 2 * 4
    for file in chunks - keep:
        file.unlink()
    assert_same_bits(opened.read_array(path, mine), whole[mine])
    with pytest.raises(UserError, match=f"{path} cannot be read .*missing"):
        opened.read_array(path, (slice(None), slice(24, 48), slice(20, 41)))
    assert f"{path}: 14 of 16 chunks are missing or unreadable (c/0/0/0)" in refused(directory)


def test_any_slice_can_be_read(ours: Path) -> None:
    opened = open_store(ours)
    whole = opened.weights(BF16)["blocks.attention.q.kernel"]
    for index in ((), (slice(1, 2),), (slice(None), slice(3, 7)), (slice(0, 2), slice(-8, None), slice(None, 5))):
        assert_same_bits(opened.read_array("blocks.attention.q.kernel", index), whole[index])
    with pytest.raises(ValueError, match="step"):
        opened.read_array("blocks.attention.q.kernel", (slice(0, 2, 2),))


ON_A_MESH = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
from transllm_jax.conversion.store import open_store
from transllm_jax.model.layout import Layout

opened = open_store(sys.argv[1])
names = tuple(opened.mesh)
mesh = Mesh(np.array(jax.devices()).reshape(tuple(opened.mesh.values())), names)
whole, cut = opened.weights("bfloat16"), 0
for path, layout in opened.specs.items():
    def own(index):
        for dimension, (part, size, chunk) in enumerate(zip(index, layout.shape, layout.chunks, strict=True)):
            start, stop, _ = part.indices(size)
            if dimension or not path.startswith("blocks."):
                assert stop - start == chunk and start % chunk == 0, (path, index, chunk)
        return opened.read_array(path, index)
    sharding = Layout(mesh).sharding(path)
    array = jax.make_array_from_callback(layout.shape, sharding, own)
    assert len(array.addressable_shards) == 8
    cut += len({str(shard.index) for shard in array.addressable_shards}) == 4
    for shard in array.addressable_shards:
        assert np.array_equal(np.asarray(shard.data), whole[path][shard.index])
    assert np.asarray(array).tobytes() == whole[path].tobytes()
print("cut", cut, "of", len(opened.specs))
"""


def test_jax_reads_it_onto_a_mesh(tmp_path: Path) -> None:
    directory = written(tmp_path / "ours", source_of(), mesh={"data": 2, "fsdp": 2, "tensor": 2})
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, str(directory)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cut", "9", "of", "12"]


@pytest.mark.parametrize("shape", [(1, 1), (15, 7), (16, 16), (33, 50), (50, 33)])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_transposed(shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype)[..., 0]
    for given in (array, np.asfortranarray(array), np.repeat(array, 2, axis=1)[:, ::2]):
        turned = transposed(given)
        assert turned.flags.c_contiguous
        assert_same_bits(turned, array.T)


def test_the_directory_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tensorstore gets a path, not a URL; a relative path is relative to the current directory."""
    source = source_of()
    written(tmp_path / "a b?c#%20ไทย", source)
    monkeypatch.chdir(tmp_path)
    assert_same_model(source, open_store("a b?c#%20ไทย"))
    assert json.loads((tmp_path / "a b?c#%20ไทย" / MANIFEST).read_text())["version"] == 1
