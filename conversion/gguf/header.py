"""Reads the header of a GGUF file: its metadata, and the position of each tensor.

The gguf package's own reader maps the whole file into memory, makes an array object for every token of the vocabulary,
and trusts every count in the file. This one uses plain file reads, and checks each count against the rest of the file
before it is used. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from transllm_jax.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_ALIGNMENT = 32
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class StoredTensor:
    """The position of one tensor. `shape` is in Hugging Face's order (rows first); `offset` and `size` are in bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata and the tensors of a file, both by name; the tensors' data are not read.

    Numbers are returned as int, float or bool, arrays as lists. Raises UserError for a file that is not GGUF, is
    big-endian, has another version, or ends before the end of its header or of its last tensor.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file; correct the path")
    try:
        with path.open("rb") as file:
            return _Reader(file, path).header()
    except (ValueError, KeyError) as error:  # the file is too short, or its data are invalid
        raise UserError(f"{path} is truncated or not a GGUF file ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct its permissions") from None


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.length = os.fstat(file.fileno()).st_size

    def header(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        if self.take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.u32()
        if version & 0xFFFF == 0:
            raise UserError(f"{self.path} is big-endian, which is not read; fetch the little-endian file")
        if version not in _VERSIONS:
            raise UserError(
                f"{self.path} is of GGUF version {version}; only {' and '.join(map(str, _VERSIONS))} are read"
            )
        tensor_count, field_count = self.u64(), self.u64()
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            name = self.string()
            if name in fields:
                raise ValueError(f"field {name} is there twice")
            fields[name] = self.value(self.u32())
        infos = [self.tensor_info() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self.file.tell() // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for make in infos:
            tensor = make(start)
            if tensor.name in tensors:
                raise ValueError(f"tensor {tensor.name} is there twice")
            if tensor.offset + tensor.size > self.length:
                raise ValueError(f"tensor {tensor.name} ends at byte {tensor.offset + tensor.size} of {self.length}")
            tensors[tensor.name] = tensor
        return fields, tensors

    def tensor_info(self) -> Callable[[int], StoredTensor]:
        """Read one tensor's entry; returns a function of the offset at which the data of all tensors start."""
        name = self.string()
        dimensions = self.u32()
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))))
        number, offset = self.u32(), self.u64()
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise UserError(
                f"{self.path}: tensor {name} has type number {number}, which this version of the gguf package does not "
                "know; update the package or use another file of the model"
            ) from None
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"tensor {name} has rows of {shape[-1]}, {kind.name} has blocks of {block}")
        return lambda start: StoredTensor(name, kind, shape, start + offset, math.prod(shape) // block * size)

    def take(self, count: int) -> bytes:
        if count > self.length - self.file.tell():
            raise ValueError(f"{count} bytes are stated at byte {self.file.tell()} of {self.length}")
        return self.file.read(count)

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self) -> str:
        return self.take(self.u64()).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.numbers(kind, 1)[0]
        kind, count = self.u32(), self.u64()
        # Nothing is allocated in advance, and every string takes at least 8 bytes, so a false count ends with the file.
        return [self.string() for _ in range(count)] if kind == _STRING else self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise ValueError(f"a field is of type number {kind}")
        numbers: list[Any] = np.frombuffer(self.take(count * _NUMBERS[kind].itemsize), _NUMBERS[kind]).tolist()
        return numbers
