"""Our own checkpoint: each weight is one zarr array, in chunks from which a device or a host reads only its own part.

    DIR/weights.json               the manifest, written last: format, and shape, type and chunks of each array
    DIR/weights/PATH/zarr.json     one zarr v3 array for each path of `names.weight_shapes(config)`
    DIR/weights/PATH/c/0/0/0       its chunks: little-endian values of one layer each, with a CRC-32C, not compressed

config.json and the tokenizer are in DIR, as in a Hugging Face directory. A tensor is stored in the type of its source,
so that it comes back bit for bit. Chunks are not compressed: zstd makes bfloat16 weights a fifth smaller at a quarter
of the speed, and a truncated chunk is noticed because its size is known.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from numpy.typing import DTypeLike

from transllm_jax.conversion.hf.directory import not_finite, read_config
from transllm_jax.conversion.hf.safetensors_io import DTYPES, count_not_finite, widest
from transllm_jax.conversion.names import Tensor, tensors, weight_shapes
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.disk import is_utf8, read_model_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import AXES, partition

MANIFEST = "weights.json"
WEIGHTS = "weights"
FORMAT = "transllm-jax weights"
VERSION = 1
# Without a mesh, a vocabulary table, which is large and not stacked by layer, is cut by rows into chunks of this size.
MAX_CHUNK_BYTES = 128 * 2**20
# At the end of each chunk, so that a flipped bit is found when the chunk is read.
CHECKSUM_BYTES = 4

_TYPES = {dtype.name: dtype for dtype in DTYPES.values()}
_DAMAGED = "convert or copy the checkpoint again"


@dataclass(frozen=True)
class ArraySpec:
    """How one weight is stored. `types` are those of the layers' tensors, if not all have the array's `dtype`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]
    types: tuple[np.dtype[Any], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The array's entry in the manifest."""
        entry: dict[str, Any] = {"shape": self.shape, "dtype": self.dtype.name, "chunks": self.chunks}
        if self.types is not None:
            entry["layer_dtypes"] = [dtype.name for dtype in self.types]
        return entry

    @classmethod
    def from_json(cls, entry: Any, shape: tuple[int, ...]) -> ArraySpec:
        """The reverse of `to_json`, for an array that must have `shape`. Raises ValueError that says what is wrong."""
        if not isinstance(entry, dict):
            raise ValueError("the entry is not an object")
        if entry.get("shape") != list(shape):
            raise ValueError(f"the shape is {entry.get('shape')}, config.json says {list(shape)}")
        chunks = entry.get("chunks")
        if (
            not isinstance(chunks, list)
            or len(chunks) != len(shape)
            or not all(type(chunk) is int and 1 <= chunk <= size for chunk, size in zip(chunks, shape, strict=True))
        ):
            raise ValueError(f"chunks are {chunks}")
        dtype = _TYPES.get(str(entry.get("dtype")))
        if dtype is None:
            raise ValueError(f"dtype is {entry.get('dtype')!r}, only {', '.join(_TYPES)} are read")
        names = entry.get("layer_dtypes")
        if names is None:
            return cls(shape, dtype, tuple(chunks))
        if not isinstance(names, list) or len(names) != shape[0] or not all(str(name) in _TYPES for name in names):
            raise ValueError(f"layer_dtypes are {names}")
        types = tuple(_TYPES[name] for name in names)
        if widest(types) != dtype:
            raise ValueError(f"dtype {dtype.name} is not the widest of layer_dtypes {names}")
        return cls(shape, dtype, tuple(chunks), types)

    def faults(self, directory: Path) -> str:
        """What is wrong with the chunk files of the array in `directory`; "" if nothing.

        The files' sizes show missing and truncated chunks; zarr would read a missing chunk as zeros.
        """
        size = math.prod(self.chunks) * self.dtype.itemsize + CHECKSUM_BYTES
        counts = [math.ceil(length / chunk) for length, chunk in zip(self.shape, self.chunks, strict=True)]
        missing, wrong = [], []
        for index in itertools.product(*map(range, counts)):
            name = "/".join(("c", *map(str, index)))
            try:
                if os.stat(directory / name).st_size != size:
                    wrong.append(name)
            except OSError:
                missing.append(name)
        found = ((missing, "missing or unreadable"), (wrong, f"not of {size} bytes"))
        count = math.prod(counts)
        return ", ".join(f"{len(names)} of {count} chunks are {what} ({names[0]})" for names, what in found if names)


def write_store(
    directory: str | Path,
    source: OpenedModel,
    *,
    mesh: Mapping[str, int] | None = None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write the weights of an opened model into `directory`, which exists and has no weights yet, tensor by tensor.

    With `mesh` (sizes of the axes `AXES`, 1 for each that is not named) a chunk is the part of one layer that one
    device holds, as by `partition`. While one tensor is written the next is read. Memory holds these two, and a second
    copy of the one read while it is transposed. `advance` is called with the bytes of each tensor.

    Raises UserError for a mesh that is invalid or does not divide the model's sizes, and, once everything was read, for
    values that are NaN or infinite (all tensors are listed); OSError if the disk is full or not writable. Then no
    manifest is written, so nothing opens the directory as a checkpoint.
    """
    directory = Path(directory)
    specs = _plan(source, mesh)
    arrays = {path: _done(_open(directory, path, spec, create=True), directory) for path, spec in specs.items()}
    bad: dict[str, int] = {}
    pending: Any = None
    try:
        for tensor in tensors(source.config):
            array = source.read(tensor)
            if array.shape != tensor.shape or array.dtype != source.dtype(tensor):
                raise ValueError(f"{source.where}: {tensor.name} was read as {array.dtype} {array.shape}")
            if advance is not None:
                advance(array.nbytes)
            if found := count_not_finite(array):
                bad[tensor.name] = found
            if not bad:  # else the result is discarded anyway
                array = array.astype(specs[tensor.path].dtype, copy=False)
                if tensor.transposed:
                    array = transposed(array)
                if pending is not None:
                    _done(pending, directory)
                target = arrays[tensor.path]
                pending = (target if tensor.layer is None else target[tensor.layer]).write(array)
                _done(pending.copy, directory)  # tensorstore has its own copy now, so the array can be freed
        if pending is not None:
            _done(pending, directory)
    finally:
        # The caller removes the directory after an error, and no file may still be written then.
        if pending is not None:
            pending.commit.exception()
    if bad:
        raise not_finite(source.where, bad)
    manifest = {"format": FORMAT, "version": VERSION, "mesh": None if mesh is None else dict(mesh)}
    manifest["arrays"] = {path: spec.to_json() for path, spec in specs.items()}
    write_json(directory / MANIFEST, manifest)


def _plan(source: OpenedModel, mesh: Mapping[str, int] | None) -> dict[str, ArraySpec]:
    types: dict[str, list[np.dtype[Any]]] = {}
    for tensor in tensors(source.config):
        types.setdefault(tensor.path, []).append(source.dtype(tensor))
    shapes = weight_shapes(source.config)
    if mesh is not None:
        _require_mesh(mesh, shapes)
    specs = {}
    for path, shape in shapes.items():
        distinct = set(types[path])
        dtype = widest(distinct)
        # Kernels, norms and biases of the layers are stacked on axis 0; tables and the last norm are not.
        chunks = (1, *shape[1:]) if path.startswith("blocks.") else shape
        if mesh is not None:
            sizes = [_size(mesh, axes) for axes in partition(path)]
            chunks = tuple(chunk // size for chunk, size in zip(chunks, sizes, strict=True))
        elif path.startswith("vocabulary."):
            row = math.prod(shape[1:]) * dtype.itemsize
            # Chunks of nearly equal size, because zarr stores the last chunk at full size.
            parts = math.ceil(shape[0] / max(1, MAX_CHUNK_BYTES // row))
            chunks = (math.ceil(shape[0] / parts), *shape[1:])
        specs[path] = ArraySpec(shape, dtype, chunks, tuple(types[path]) if len(distinct) > 1 else None)
    return specs


def _size(mesh: Mapping[str, int], axes: Iterable[str]) -> int:
    return math.prod(mesh.get(axis, 1) for axis in axes)


def _require_mesh(mesh: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
    text = ",".join(f"{axis}={size}" for axis, size in mesh.items())
    wrong = [f"{axis}={size}" for axis, size in mesh.items() if axis not in AXES or type(size) is not int or size < 1]
    if wrong:
        raise UserError(
            f"the mesh {text} has {', '.join(wrong)}; its axes are {', '.join(AXES)}, each a whole number above 0"
        )
    wrong = [
        f"dimension {dimension} of {path}, {shapes[path][dimension]}, by "
        f"{','.join(f'{axis}={mesh.get(axis, 1)}' for axis in axes)}"
        for path in shapes
        for dimension, axes in enumerate(partition(path))
        if shapes[path][dimension] % _size(mesh, axes)
    ]
    if wrong:
        raise UserError(f"the mesh {text} does not divide {'; '.join(wrong)}; choose other sizes")


def transposed(array: np.ndarray) -> np.ndarray:
    """A contiguous `[b, a]` copy of an `[a, b]` array of 2 or 4-byte values.

    It works in strips of 16 rows, so that each write fills half a cache line or a whole one. numpy's own order takes 2
    to 8 times as long for a LLaMA kernel, because it touches a new cache line for each value.
    """
    values = array.view(f"u{array.dtype.itemsize}")
    out = np.empty(values.shape[::-1], values.dtype)
    for start in range(0, values.shape[0], 16):
        out[:, start : start + 16] = values[start : start + 16].T
    return out.view(array.dtype)


@dataclass(frozen=True)
class Store:
    """Our own checkpoint, opened (see `conversion/opened.py`). `mesh` is the one that its chunks were cut for."""

    directory: Path
    config: LlamaConfig
    mesh: dict[str, int] | None
    specs: dict[str, ArraySpec]
    arrays: dict[str, Any]

    @property
    def where(self) -> str:
        """The directory's path."""
        return str(self.directory)

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        """The type that the tensor had in the source, in which `read` returns it."""
        spec = self.specs[tensor.path]
        return spec.dtype if spec.types is None or tensor.layer is None else spec.types[tensor.layer]

    def read(self, tensor: Tensor) -> np.ndarray:
        """The tensor in Hugging Face's orientation, with the bits that it had in the source."""
        array = self._read_stored(tensor)
        return transposed(array) if tensor.transposed else array

    def _read_stored(self, tensor: Tensor) -> np.ndarray:
        if tensor.layer is None:
            return self.read_array(tensor.path, ())
        array = self.read_array(tensor.path, (slice(tensor.layer, tensor.layer + 1),))[0]
        return array.astype(self.dtype(tensor), copy=False)

    def read_array(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of one of our weights, in the array's stored type, as `jax.make_array_from_callback` needs it.

        `index` has a slice without a step for each dimension; dimensions left out at the end are taken whole. Only
        chunks that it touches are read. Raises UserError, which names the array, if one of them is damaged.
        """
        ranges = [part.indices(size) for part, size in zip(index, self.specs[path].shape, strict=False)]
        if any(step != 1 for _, _, step in ranges):
            raise ValueError(f"{path}: {index} has a step")
        array = self.arrays[path]
        if ranges:
            array = array[tuple(slice(start, stop) for start, stop, _ in ranges)]
        try:
            return array.read().result()
        except ValueError as error:  # tensorstore raises it for every failure
            raise UserError(f"{self.where}: {path} cannot be read ({_short(error)}); {_DAMAGED}") from error

    def weights(self, dtype: DTypeLike = np.float32) -> dict[str, np.ndarray]:
        """All weights in our layout, path -> array, in `dtype`, like `hf.directory.read_weights`.

        Memory is one copy of the weights plus one tensor. Raises UserError for a damaged array, and for values that are
        NaN or infinite (all tensors are listed).
        """
        weights = {path: np.empty(spec.shape, dtype) for path, spec in self.specs.items()}
        bad: dict[str, int] = {}
        for tensor in tensors(self.config):
            array = self._read_stored(tensor)
            if found := count_not_finite(array):
                bad[tensor.name] = found
            weights[tensor.path][... if tensor.layer is None else tensor.layer] = array
        if bad:
            raise not_finite(self.where, bad)
        return weights


def open_store(directory: str | Path) -> Store:
    """Open our own checkpoint without reading its weights; the size of every file is checked.

    Raises UserError if it was not finished, has an unknown version, or does not fit its config.json; the message lists
    every array that is missing, extra, incomplete or of the wrong shape.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        raise UserError(f"{directory} has no {MANIFEST}: it is not a checkpoint of ours, or was not finished; convert")
    manifest = read_model_json(directory / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{directory / MANIFEST}: format is {manifest.get('format')!r}, not {FORMAT!r}; {_DAMAGED}")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{directory / MANIFEST}: version is {manifest.get('version')!r}, this program reads {VERSION}; "
            "use the program that wrote it, or convert the model again"
        )
    entries, mesh = manifest.get("arrays"), manifest.get("mesh")
    if not isinstance(entries, dict) or not (mesh is None or isinstance(mesh, dict)):
        raise UserError(f"{directory / MANIFEST}: arrays or mesh are not objects; {_DAMAGED}")
    config = read_config(directory)
    shapes = weight_shapes(config)
    problems = []
    if extra := sorted(entries.keys() - shapes.keys()):
        problems.append(f"not part of the model: {', '.join(extra)}")
    if missing := [path for path in shapes if path not in entries]:
        problems.append(f"missing: {', '.join(missing)}")
    # File names are only made from the model's own paths, so that no path in the manifest can lead elsewhere.
    specs, arrays = {}, {}
    for path, shape in shapes.items():
        if path not in entries:
            continue
        try:
            spec = ArraySpec.from_json(entries[path], shape)
            if faults := spec.faults(directory / WEIGHTS / path):
                raise ValueError(faults)
            specs[path], arrays[path] = spec, _open(directory, path, spec, create=False).result()
        except ValueError as error:
            problems.append(f"{path}: {_short(error)}")
    if problems:
        raise UserError(
            f"{directory}: the weights are not complete or not those of its config.json; {'; '.join(problems)}; "
            f"{_DAMAGED}"
        )
    return Store(directory, config, mesh, specs, arrays)


def _open(directory: Path, path: str, array: ArraySpec, *, create: bool) -> Any:
    """A future of the array. If it exists, it must have exactly this spec, or tensorstore raises ValueError."""
    place = str((directory / WEIGHTS / path).absolute())
    if not is_utf8(place):
        raise UserError(f"{directory}: the path is not UTF-8, which tensorstore needs; choose another")
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{place}/"},
        "metadata": {
            "shape": array.shape,
            "data_type": array.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.chunks}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
        # Chunks of zeros are stored, too, so that a missing chunk is always damage.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    return tensorstore.open(spec, create=create, open=not create)


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)


def _done(future: Any, directory: Path) -> Any:
    """Wait for a write. tensorstore's ValueError for a full or unwritable disk becomes an OSError again."""
    try:
        return future.result()
    except ValueError as error:
        for code in _DISK_ERRORS:
            if os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code), str(directory)) from error
        raise


def _short(error: ValueError) -> str:
    """tensorstore's message on one line, without suffixes like ` [tensorstore_spec='...'] [os_error_code='2']`."""
    return re.split(r" \[[a-z_ ]+='", str(error), maxsplit=1)[0].replace("\n", " ")
