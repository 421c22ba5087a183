"""Reads and writes safetensors one tensor at a time, in one file or in shards with an index.

The `safetensors` library checks a file's header against its size. The tensors are then read at their offsets with plain
file reads, so that memory holds one tensor at a time (with a memory map every page read would count) and the library
need not support bfloat16. Files are written here, because the library needs all of a file's tensors in memory at once.
Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from transllm_jax.conversion.names import Tensor, collapse
from transllm_jax.disk import read_model_json, write_json
from transllm_jax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_EXPONENTS = {
    DTYPES["F32"]: np.uint32(0x7F800000),
    DTYPES["F16"]: np.uint16(0x7C00),
    DTYPES["BF16"]: np.uint16(0x7F80),
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Entry:
    """The position of one tensor: `dtype` is safetensors' code (`F32`, `BF16`, ...), `offset` is in bytes from the
    start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def widest(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """The type that holds values of all these types exactly: their common type, or float32."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else DTYPES["F32"]


def dtype_of(name: str) -> np.dtype[Any]:
    """The numpy type with the name `float32`, `bfloat16` or `float16`. Raises UserError for another name."""
    for dtype in DTYPES.values():
        if dtype.name == name:
            return dtype
    raise UserError(f"dtype {name!r} is not one of {', '.join(d.name for d in DTYPES.values())}")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: those that the index names, or `model.safetensors`.

    The index has precedence, unless files that it names are missing and `model.safetensors` exists: then it is left
    over from another model. Raises UserError for a directory with pickle files only, for an index that names a file
    outside the directory, and for missing files without a `model.safetensors`.
    """
    single = (directory / SINGLE).is_file()
    if not (directory / INDEX).is_file():
        if single:
            return [directory / SINGLE]
        pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
        if pickles:
            raise UserError(
                f"{directory} holds pickle checkpoints only ({', '.join(pickles)}), "
                "which can run code when read; convert them to safetensors where you trust them"
            )
        raise UserError(f"{directory} holds neither {SINGLE} nor {INDEX}; is this a complete model directory?")
    names = sorted(set(_weight_map(directory).values()))
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..") or "\\" in name]
    if outside:
        raise UserError(f"{directory / INDEX} names files outside the directory: {', '.join(outside)}; correct it")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing and single:
        return [directory / SINGLE]
    if missing:
        raise UserError(f"{directory / INDEX} names missing files: {', '.join(missing)}; fetch them")
    return [directory / name for name in names]


def _weight_map(directory: Path) -> dict[str, str]:
    mapping = read_model_json(directory / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise UserError(f"{directory / INDEX} has no weight_map from tensor to file; fetch it again")
    return mapping


def is_indexed(directory: Path, files: list[Path]) -> bool:
    """Whether these `weight_files` are the files that the index names."""
    return (directory / INDEX).is_file() and {file.name for file in files} == set(_weight_map(directory).values())


def open_checkpoint(directory: Path) -> tuple[dict[str, Entry], list[str]]:
    """The tensors of a model directory by name, and messages about other weights in it, which are not read.

    Every file's header is checked against its size. Raises UserError for a truncated or malformed file, for a tensor in
    two files if the index names neither of them, and for an index that disagrees with its files.
    """
    entries: dict[str, Entry] = {}
    files = weight_files(directory)
    indexed = is_indexed(directory, files)
    mapping = _weight_map(directory) if indexed else {}
    notes = _unread_files(directory, files, indexed)
    for file in files:
        duplicates = []
        for name, entry in read_header(file).items():
            if (other := entries.get(name)) is None:
                entries[name] = entry
                continue
            meant = mapping.get(name)
            if meant not in (other.file.name, file.name):
                raise UserError(
                    f"tensor {name} is in both {other.file} and {file}, and {INDEX} does not say which is meant; "
                    "fetch the model again"
                )
            duplicates.append(name)
            if meant == file.name:
                entries[name] = entry
        if duplicates:
            notes.append(f"{file} and another file hold {collapse(duplicates)}; read from where {INDEX} says")
    if indexed:
        wrong = sorted(name for name, file in mapping.items() if name not in entries or entries[name].file.name != file)
        if wrong:
            raise UserError(f"{directory / INDEX} and its files disagree about {', '.join(wrong)}; fetch them again")
    return entries, notes


def _unread_files(directory: Path, files: list[Path], indexed: bool) -> list[str]:
    notes = []
    if (directory / INDEX).is_file() and not indexed:
        notes.append(f"{directory / INDEX} names files that are not there; {SINGLE} is read")
    others = sorted({file.name for file in directory.glob("*.safetensors")} - {file.name for file in files})
    if others:
        read = f"what {INDEX} names" if indexed else SINGLE
        notes.append(f"{directory}: {read} is read, and left aside: {', '.join(others)}")
    return notes


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file by name. Raises UserError for a truncated or malformed file."""
    try:
        with safe_open(str(file), framework="numpy"):
            pass  # the library's checks: header, offsets without gaps, size of the file
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}); fetch it again") from None
    return {
        name: Entry(file, info["dtype"], tuple(info["shape"]), 8 + length + info["data_offsets"][0])
        for name, info in header.items()
        if name != "__metadata__"
    }


def read_tensor(entry: Entry) -> np.ndarray:
    """One tensor in its stored type (F32, F16 or BF16)."""
    count = int(np.prod(entry.shape, dtype=np.int64))
    return np.fromfile(entry.file, DTYPES[entry.dtype], count, offset=entry.offset).reshape(entry.shape)


def same_values(a: Entry, b: Entry) -> bool:
    """Whether two tensors hold the same values. Reads them in blocks, as a vocabulary table may take a gigabyte."""
    if a.shape != b.shape:
        return False
    count = int(np.prod(a.shape, dtype=np.int64))
    block = 1 << 24
    for start in range(0, count, block):
        size = min(block, count - start)
        left, right = (
            np.fromfile(e.file, DTYPES[e.dtype], size, offset=e.offset + start * DTYPES[e.dtype].itemsize)
            for e in (a, b)
        )
        if not np.array_equal(left, right):
            return False
    return True


def count_not_finite(array: np.ndarray) -> int:
    """How many values of an F32, F16 or BF16 array are NaN or infinite: those whose exponent is all ones."""
    exponent, block = _EXPONENTS[array.dtype], 1 << 17  # a block and its result stay in the processor's cache
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    return sum(
        int(np.count_nonzero((bits[start : start + block] & exponent) == exponent))
        for start in range(0, bits.size, block)
    )


def require_finite(array: np.ndarray, name: str, where: object) -> None:
    """Raises UserError if values of `array` are NaN or infinite; the message has their number."""
    bad = count_not_finite(array)
    if bad:
        raise UserError(f"tensor {name} of {where} has {bad} of {array.size} values NaN or infinite; fetch it again")


def write_tensors(
    directory: Path,
    table: list[Tensor],
    get: Callable[[Tensor], np.ndarray],
    dtype: np.dtype[Any] | Callable[[Tensor], np.dtype[Any]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write the tensors of `table` in Hugging Face's format; returns the files.

    `get(tensor)` is called for one tensor at a time, in the table's order, and returns an array of `tensor.shape`. The
    array is rounded once to `dtype`, which may be a function of the tensor. There is one file `model.safetensors`, or
    several with an index if it would be larger than `max_shard_bytes`. `advance` is called with the bytes of each
    tensor once it is written. Raises UserError if a value is not finite in `dtype`.
    """
    parts = [_Part(tensor, dtype(tensor) if callable(dtype) else dtype) for tensor in table]
    shards: list[list[_Part]] = [[]]
    filled = 0
    for part in parts:
        if shards[-1] and filled + part.size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += part.size
    count = len(shards)
    files = [
        directory / (SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors")
        for number in range(1, count + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        _write_file(file, shard, get, advance or (lambda size: None))
    if count > 1:
        weight_map = {part.tensor.name: file.name for file, shard in zip(files, shards, strict=True) for part in shard}
        total = sum(part.size for part in parts)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


@dataclass(frozen=True)
class _Part:
    tensor: Tensor
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        return int(np.prod(self.tensor.shape, dtype=np.int64)) * self.dtype.itemsize


def _write_file(
    file: Path, parts: list[_Part], get: Callable[[Tensor], np.ndarray], advance: Callable[[int], None]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        header[part.tensor.name] = {
            "dtype": CODES[part.dtype],
            "shape": list(part.tensor.shape),
            "data_offsets": [end, end + part.size],
        }
        end += part.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the start of the data
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            tensor = part.tensor
            array = get(tensor)
            if array.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: got shape {array.shape}, expected {tensor.shape}")
            with np.errstate(over="ignore"):  # an overflow is reported below, by name
                rounded = np.ascontiguousarray(array, dtype=part.dtype)
            if bad := count_not_finite(rounded):
                require_finite(array, tensor.name, "what is written")
                raise UserError(
                    f"tensor {tensor.name}: in {part.dtype.name}, which ends at {ml_dtypes.finfo(part.dtype).max:g}, "
                    f"{bad} of its {array.size} values would be NaN or infinite; write bfloat16 or float32"
                )
            array = rounded
            stream.write(array.data.cast("B") if part.dtype.kind == "f" else array.view(np.uint16).data.cast("B"))
            advance(part.size)
