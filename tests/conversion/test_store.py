"""Our checkpoint on disk: every bit comes back, parts are read alone, and what is damaged is not opened."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
from conftest import random_weights, tiny_config

from conversion import store
from conversion.hf.directory import open_hf, read_weights, write_config, write_model
from conversion.names import EMBEDDING, OUTPUT, Tensor, tensors, weight_shapes
from conversion.opened import Opened
from conversion.store import MANIFEST, MAX_CHUNK_BYTES, Store, open_store, transposed, write_store
from transllm_jax.disk import read_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.new_directory import new_directory

VOCAB = 60
CONFIG = tiny_config(VOCAB, tied=False)
MESH = {"data": 2, "fsdp": 2, "tensor": 4}
BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)


class Source:
    """An opened model of given tensors."""

    where = "SOURCE"

    def __init__(self, config: LlamaConfig, given: dict[str, np.ndarray]) -> None:
        self.config, self.given = config, given

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        return self.given[tensor.name].dtype

    def read(self, tensor: Tensor) -> np.ndarray:
        return self.given[tensor.name].copy()


def source_of(config: LlamaConfig = CONFIG, dtype: np.dtype[Any] = BF16) -> Source:
    rng = np.random.default_rng(1)
    return Source(config, {t.name: rng.standard_normal(t.shape).astype(dtype) for t in tensors(config)})


def finish(directory: Path, config: LlamaConfig, dtype: str = "bfloat16") -> Path:
    """What others write beside the weights, as far as opening needs it."""
    write_config(directory, config.to_hf(), dtype)
    return directory


def written(directory: Path, source: Opened, **options: Any) -> Path:
    directory.mkdir(parents=True)
    write_store(directory, source, **options)
    return finish(directory, source.config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("store") / "ours", source_of())


@pytest.fixture
def ours(finished: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage: a copy, because writing one waits for the disk."""
    return shutil.copytree(finished, tmp_path / "ours")


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def assert_same_model(a: Opened, b: Opened) -> None:
    assert a.config == b.config
    for tensor in tensors(a.config):
        assert a.dtype(tensor) == b.dtype(tensor) == b.read(tensor).dtype
        assert_same_bits(a.read(tensor), b.read(tensor))


def edited(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = read_json(directory / MANIFEST)
    change(manifest)
    write_json(directory / MANIFEST, manifest)


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_store(directory)
    message = str(caught.value)
    assert str(directory) in message and "\n" not in message and "[tensorstore_spec" not in message
    return message


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
def test_families(tmp_path: Path, config: LlamaConfig) -> None:
    source = source_of(config)
    opened = open_store(written(tmp_path / "ours", source, mesh=MESH))
    assert_same_model(source, opened)
    assert opened.layouts.keys() == weight_shapes(config).keys()
    assert ("vocabulary.output_base" in opened.layouts) == (not config.tie_word_embeddings)


def test_types_may_differ_from_tensor_to_tensor(tmp_path: Path) -> None:
    """Every finite value of the half types, subnormal ones and -0 among them, through the wider type and back."""
    config = replace(CONFIG, hidden_size=1024, num_hidden_layers=3)
    source = source_of(config)
    bits = np.arange(2**16, dtype=np.uint16)
    every = {kind: bits.view(kind)[np.isfinite(bits.view(kind).astype(F32))] for kind in (F16, BF16)}
    name = "model.layers.{}.mlp.up_proj.weight"
    shape = source.given[name.format(0)].shape
    assert np.prod(shape) >= 2**16  # one tensor holds them all
    for layer, kind in enumerate((F16, BF16, F32)):
        values = np.arange(2**16, dtype=np.float32) / 3 if kind == F32 else every[kind]
        source.given[name.format(layer)] = np.resize(values, shape)
    down = "model.layers.{}.mlp.down_proj.weight"
    for layer, kind in enumerate((F16, BF16, BF16)):
        source.given[down.format(layer)] = np.resize(every[kind][::-1], shape[::-1])
    source.given[EMBEDDING] = source.given[EMBEDDING].astype(F32)
    opened = open_store(written(tmp_path / "ours", source))
    assert_same_model(source, opened)
    assert opened.layouts["blocks.mlp.up.kernel"].dtype == opened.layouts["blocks.mlp.down.kernel"].dtype == F32
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


def test_the_files(ours: Path) -> None:
    """What the module's docstring promises to whoever reads the directory with another zarr."""
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
    """zarr leaves out chunks of its fill value; then a lost chunk would look like one of zeros."""
    source = source_of()
    for array in source.given.values():
        array[...] = 0
    directory = written(tmp_path / "ours", source)
    assert_same_model(source, open_store(directory))
    (directory / "weights/final_norm.scale/c/0").unlink()
    assert "final_norm.scale: 1 of 1 chunks are missing or unreadable (c/0)" in refused(directory)


def test_a_table_is_cut_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(replace(CONFIG, vocab_size=61))
    monkeypatch.setattr(store, "MAX_CHUNK_BYTES", 20 * 48 * 2)
    opened = open_store(written(tmp_path / "ours", source))
    # 61 rows of which 20 fit: four parts, as even as they can be.
    assert opened.layouts["vocabulary.base"].chunks == (16, 48)
    assert opened.layouts["vocabulary.output_base"].chunks == (16, 48)
    assert opened.layouts["blocks.mlp.up.kernel"].chunks == (1, 48, 80)
    assert_same_model(source, opened)
    rows = opened.read_array("vocabulary.base", (slice(14, 35), slice(3, 40)))
    assert_same_bits(rows, source.given[EMBEDDING][14:35, 3:40])
    assert MAX_CHUNK_BYTES == 2**27


def test_a_chunk_is_what_one_device_holds(tmp_path: Path) -> None:
    layouts = open_store(written(tmp_path / "ours", source_of(), mesh=MESH)).layouts
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


def test_a_device_reads_its_own_chunks_only(tmp_path: Path) -> None:
    """With the files of all other devices gone, its part is still read, and nothing else is."""
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


def test_any_slice(ours: Path) -> None:
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
from conversion.store import open_store
from transllm_jax.model.layout import Layout

opened = open_store(sys.argv[1])
names = tuple(opened.mesh)
mesh = Mesh(np.array(jax.devices()).reshape(tuple(opened.mesh.values())), names)
whole, cut = opened.weights("bfloat16"), 0
for path, layout in opened.layouts.items():
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
print("cut", cut, "of", len(opened.layouts))
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


@pytest.mark.parametrize(
    ("mesh", "wrong"),
    [
        ({"fsdp": 2, "model": 2, "tensor": 0}, "has model=2, tensor=0; its axes are data, fsdp, tensor"),
        ({"fsdp": True}, "has fsdp=True"),
        ({"tensor": 2.0}, "has tensor=2.0"),
        ({"data": -1}, "has data=-1"),
    ],
)
def test_what_is_not_a_mesh(tmp_path: Path, mesh: dict[str, int], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        write_store(tmp_path, source_of(), mesh=mesh)
    assert not any(tmp_path.iterdir())


def test_a_mesh_that_does_not_divide_names_everything(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        write_store(tmp_path, source_of(), mesh={"fsdp": 3, "tensor": 5})
    message = str(caught.value)
    # 48 is a multiple of 3 but not of 15, which cuts D of a table; the heads' 64 and 32 are of neither.
    assert message == (
        "the mesh fsdp=3,tensor=5 does not divide "
        "dimension 1 of vocabulary.base, 48, by fsdp=3,tensor=5; "
        "dimension 2 of blocks.attention.q.kernel, 64, by tensor=5; "
        "dimension 2 of blocks.attention.k.kernel, 32, by tensor=5; "
        "dimension 2 of blocks.attention.v.kernel, 32, by tensor=5; "
        "dimension 1 of blocks.attention.o.kernel, 64, by tensor=5; "
        "dimension 1 of vocabulary.output_base, 48, by fsdp=3,tensor=5; choose other sizes"
    )
    assert not any(tmp_path.iterdir())
    write_store(tmp_path, source_of(), mesh={"data": 7})  # no weight is cut by data
    assert (tmp_path / MANIFEST).is_file()


def test_values_that_are_not_finite_are_all_named(tmp_path: Path) -> None:
    source = source_of()
    source.given[EMBEDDING][3, 4] = np.nan
    source.given["model.layers.0.mlp.up_proj.weight"][0] = -np.inf
    source.given["model.layers.1.mlp.up_proj.weight"][2, 2] = np.inf
    source.given[OUTPUT][-1, -1] = np.nan
    done: list[int] = []
    with pytest.raises(UserError) as caught:
        write_store(tmp_path, source, advance=done.append)
    message = str(caught.value)
    for part in ("SOURCE: 51 values", EMBEDDING, OUTPUT, "model.layers.{0,1}.mlp.up_proj.weight"):
        assert part in message
    assert len(done) == len(source.given)
    assert not (tmp_path / MANIFEST).exists() and not list(tmp_path.glob("weights/*/c"))  # the first was bad
    assert "has no weights.json" in refused(finish(tmp_path, CONFIG))


def test_weights_are_checked_as_they_are_read(ours: Path) -> None:
    open_store(ours).arrays["blocks.mlp_norm.scale"][1].write(np.full(48, np.nan, BF16)).result()
    with pytest.raises(UserError, match=r"48 values are NaN.*model\.layers\.1\.post_attention_layernorm\.weight"):
        open_store(ours).weights()


@pytest.mark.parametrize("place", [0, 3000, -1])
def test_a_flipped_bit_is_found(ours: Path, place: int) -> None:
    chunk = ours / "weights/blocks.mlp.up.kernel/c/1/0/0"
    data = bytearray(chunk.read_bytes())
    data[place] ^= 1
    chunk.write_bytes(data)
    store = open_store(ours)
    for read in (store.weights, lambda: store.read_array("blocks.mlp.up.kernel", (slice(1, 2), slice(0, 1)))):
        with pytest.raises(UserError, match=r"blocks\.mlp\.up\.kernel cannot be read.*convert or copy"):
            read()
    store.read_array("blocks.mlp.up.kernel", (slice(0, 1),))  # the other layer is whole


def test_a_source_that_breaks_its_word_is_a_defect(tmp_path: Path) -> None:
    source = source_of()
    for number, wrong in enumerate((np.zeros((48, 80), BF16), np.zeros((80, 48), F32))):
        source.read = lambda t, w=wrong: w if t.name.endswith("up_proj.weight") else source.given[t.name]  # type: ignore
        directory = tmp_path / str(number)
        directory.mkdir()
        with pytest.raises(ValueError, match=r"SOURCE: model\.layers\.0\.mlp\.up_proj\.weight was read as"):
            write_store(directory, source)
        assert not (directory / MANIFEST).exists()


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """When the next tensor is asked for, only the write that goes on may hold the one before."""
    source = source_of()
    alive: list[int] = []
    given: list[Any] = []

    def read(tensor: Tensor) -> np.ndarray:
        alive.append(sum(reference() is not None for reference in given))
        array = Source.read(source, tensor)
        given.append(weakref.ref(array))
        return array

    source.read = read  # type: ignore[method-assign]
    write_store(tmp_path, source)
    assert len(alive) == len(source.given) and max(alive) <= 1


class Faked:
    """tensorstore, whose arrays answer writes as told."""

    def __init__(self, write: Callable[[], Any]) -> None:
        self.write = write

    def open(self, spec: Any, **options: Any) -> Any:
        real = tensorstore.open(spec, **options).result()

        class Array:
            def __getitem__(_, index: Any) -> Array:
                return _

            def write(_, array: np.ndarray) -> Any:
                return self.write()

        return SimpleNamespace(result=lambda: Array() if options["create"] else real)


def failed_write(text: str) -> Callable[[], Any]:
    """What tensorstore 0.1.86 gives for a write that fails: the copy is fine, the rest raises ValueError."""

    def write() -> Any:
        promise, future = tensorstore.Promise.new()
        promise.set_exception(ValueError(text))
        done, copied = tensorstore.Promise.new()
        done.set_result(None)
        return SimpleNamespace(copy=copied, commit=future, result=future.result)

    return write


@pytest.mark.parametrize(
    ("code", "mended"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "cannot write"),
        (errno.EROFS, "cannot write"),
    ],
)
def test_a_disk_that_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, mended: str) -> None:
    text = (
        'RESOURCE_EXHAUSTED: Error writing local file "/x/w.a/c/0/0/0": Failed to write 29032576 bytes to file 3: '
        f"{os.strerror(code)} [os_error_code='{code}']"
    )
    monkeypatch.setattr(store, "tensorstore", Faked(failed_write(text)))
    with pytest.raises(OSError) as caught:
        write_store(tmp_path, source_of())
    assert caught.value.errno == code
    with pytest.raises(UserError, match=mended), new_directory(tmp_path / "new") as directory:
        write_store(directory, source_of())
    assert not (tmp_path / "new").exists() and not (tmp_path / ".new.partial").exists()


def test_another_fault_of_the_library_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "tensorstore", Faked(failed_write("INTERNAL: something else")))
    with pytest.raises(ValueError, match="INTERNAL: something else"):
        write_store(tmp_path, source_of())
    assert not (tmp_path / MANIFEST).exists()


def test_a_failure_waits_for_the_write_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would put its file into a directory that has just been cleared away."""
    promise, future = tensorstore.Promise.new()
    done, copied = tensorstore.Promise.new()
    done.set_result(None)
    monkeypatch.setattr(
        store, "tensorstore", Faked(lambda: SimpleNamespace(copy=copied, commit=future, result=future.result))
    )
    source = source_of()

    def read(tensor: Tensor) -> np.ndarray:
        if tensor.name != EMBEDDING:
            raise KeyboardInterrupt
        return Source.read(source, tensor)

    source.read = read  # type: ignore[method-assign]
    timer = threading.Timer(0.2, promise.set_result, [None])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path, source)
    assert future.done()
    timer.join()


def test_what_was_not_finished(ours: Path) -> None:
    (ours / MANIFEST).unlink()
    assert "has no weights.json: it is not a checkpoint of ours, or was not finished" in refused(ours)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"format": "other"}, "format is 'other', not 'transllm-jax weights'"),
        ({"version": 2}, "version is 2, this program reads 1"),
        ({"version": None}, "version is None"),
        ({"arrays": []}, "arrays or mesh are not objects"),
        ({"mesh": 4}, "arrays or mesh are not objects"),
    ],
)
def test_a_manifest_of_another_kind(ours: Path, change: dict[str, Any], wrong: str) -> None:
    edited(ours, lambda manifest: manifest.update(change))
    assert wrong in refused(ours)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_manifest_that_is_none(ours: Path, text: str) -> None:
    (ours / MANIFEST).write_text(text)
    assert MANIFEST in refused(ours)


def test_all_faults_are_in_one_line(ours: Path) -> None:
    """One fault of each kind, each at an array of its own."""
    weights = ours / "weights"
    (weights / "blocks.mlp.up.kernel/c/1/0/0").unlink()
    with (weights / "blocks.mlp.gate.kernel/c/0/0/0").open("r+b") as file:
        file.truncate(48 * 80 * 2 - 2)
    with (weights / "blocks.attention_norm.scale/c/0/0").open("ab") as file:
        file.write(b"\0\0")
    (weights / "final_norm.scale/zarr.json").unlink()
    (weights / "vocabulary.base/zarr.json").write_text("{")
    zarr = read_json(weights / "blocks.attention.v.kernel/zarr.json")
    write_json(weights / "blocks.attention.v.kernel/zarr.json", {**zarr, "data_type": "float16"})

    def change(manifest: dict[str, Any]) -> None:
        entries = manifest["arrays"]
        entries["blocks.other"] = entries.pop("blocks.mlp.down.kernel")
        entries["blocks.attention.o.kernel"]["shape"] = [2, 48, 64]
        entries["blocks.attention.k.kernel"]["dtype"] = "int8"
        entries["blocks.attention.q.kernel"]["chunks"] = [1, 48]
        entries["blocks.mlp_norm.scale"] = 3

    edited(ours, change)
    message = refused(ours)
    for part in (
        "not part of the model: blocks.other;",
        "missing: blocks.mlp.down.kernel;",
        "blocks.mlp.up.kernel: 1 of 2 chunks are missing or unreadable (c/1/0/0)",
        "blocks.mlp.gate.kernel: 1 of 2 chunks are not of 7684 bytes (c/0/0/0)",
        "blocks.attention_norm.scale: 1 of 2 chunks are not of 100 bytes (c/0/0)",
        "final_norm.scale: ",
        "vocabulary.base: ",
        "blocks.attention.v.kernel: ",
        "blocks.attention.o.kernel: the shape is [2, 48, 64], config.json says [2, 64, 48]",
        "blocks.attention.k.kernel: dtype is 'int8'",
        "blocks.attention.q.kernel: chunks are [1, 48]",
        "blocks.mlp_norm.scale: the entry is not an object",
    ):
        assert part in message
    assert "vocabulary.output_base" not in message


@pytest.mark.parametrize("chunks", [[0, 48, 80], [1, 48, 81], [1.0, 48, 80], [True, 48, 80], "1", None, [2, 24, 80]])
def test_chunks_that_cannot_be(ours: Path, chunks: Any) -> None:
    edited(ours, lambda manifest: manifest["arrays"]["blocks.mlp.up.kernel"].update(chunks=chunks))
    assert "blocks.mlp.up.kernel: " in refused(ours)


def test_a_config_of_another_model(ours: Path) -> None:
    finish(ours, replace(CONFIG, num_hidden_layers=3))
    message = refused(ours)
    assert message.count("config.json says [3, ") == 9 and "vocabulary.base" not in message
    (ours / "config.json").unlink()
    assert "config.json is missing" in refused(ours)


@pytest.mark.parametrize("path", ["../../outside", "/etc/passwd", "a/../../../b", "..", ""])
def test_no_path_of_the_manifest_becomes_a_file_name(ours: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(ours, lambda manifest: manifest["arrays"].update({path: manifest["arrays"]["final_norm.scale"]}))
    shutil.copytree(ours / "weights/final_norm.scale", ours.parent / "outside")  # what the first of them leads to
    asked: list[str] = []
    real = tensorstore.open

    def watch(spec: dict[str, Any], **options: Any) -> Any:
        asked.append(spec["kvstore"]["path"])
        return real(spec, **options)

    monkeypatch.setattr(store.tensorstore, "open", watch)
    assert f"not part of the model: {path}" in refused(ours)
    assert {Path(name).parent for name in asked} == {ours / "weights"}
    assert len(asked) == len(weight_shapes(CONFIG))


def test_damage_after_opening_is_told(ours: Path) -> None:
    opened: Store = open_store(ours)
    (ours / "weights/blocks.mlp.up.kernel/c/1/0/0").write_bytes(b"short")
    (ours / "weights/blocks.mlp.gate.kernel/c/0/0/0").unlink()
    whole = {t.name: t for t in tensors(CONFIG)}
    for name, path in (("1.mlp.up_proj", "blocks.mlp.up"), ("0.mlp.gate_proj", "blocks.mlp.gate")):
        with pytest.raises(UserError, match=rf"{path}\.kernel cannot be read") as caught:
            opened.read(whole[f"model.layers.{name}.weight"])
        assert str(ours) in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(UserError, match=r"blocks\.mlp\.(up|gate)\.kernel cannot be read"):
            opened.weights()


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
    """tensorstore is given a path, not a URL; and a relative one is relative to where we are."""
    source = source_of()
    written(tmp_path / "a b?c#%20ไทย", source)
    monkeypatch.chdir(tmp_path)
    assert_same_model(source, open_store("a b?c#%20ไทย"))
    assert json.loads((tmp_path / "a b?c#%20ไทย" / MANIFEST).read_text())["version"] == 1
