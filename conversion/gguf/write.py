"""Writes any opened model as a GGUF file, one tensor at a time.

The gguf package writes the format; format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_VERSION
from gguf.quants import quantize

from transllm_jax.conversion.gguf.config import ROPE_FACTORS
from transllm_jax.conversion.gguf.weights import gguf_name, interleaved_heads, permute
from transllm_jax.conversion.gguf.write_config import architecture_of, config_fields, rope_factors
from transllm_jax.conversion.hf.safetensors_io import count_not_finite, require_finite
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.names import EMBEDDING, OUTPUT, Tensor, tensors
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.errors import UserError

_Kind = GGMLQuantizationType
_KINDS = {
    "f32": _Kind.F32,
    "f16": _Kind.F16,
    "bf16": _Kind.BF16,
    "q8_0": _Kind.Q8_0,
    "q5_1": _Kind.Q5_1,
    "q5_0": _Kind.Q5_0,
    "q4_1": _Kind.Q4_1,
    "q4_0": _Kind.Q4_0,
}
TYPES = tuple(_KINDS)
_FLOATS: dict[_Kind, np.dtype[Any]] = {
    _Kind.F32: np.dtype(np.float32),
    _Kind.F16: np.dtype(np.float16),
    _Kind.BF16: np.dtype(ml_dtypes.bfloat16),
}
# How many values are quantised at once: the gguf package makes several float32 copies, which stay in the processor's
# cache (three times as fast as 2 ** 24).
_VALUES_AT_ONCE = 1 << 18


def kind_of(name: str | None) -> GGMLQuantizationType | None:
    """The type of a name in TYPES, in upper or lower case; None for None.

    Raises UserError for another name; for a type that only llama.cpp writes, it says how.
    """
    if name is None:
        return None
    if name.lower() in _KINDS:
        return _KINDS[name.lower()]
    if f"MOSTLY_{name.upper()}" in LlamaFileType.__members__:
        raise UserError(
            f"type {name}: only llama.cpp quantises to it; write --type f16, then run llama-quantize IN.gguf OUT.gguf "
            f"{name.upper()}"
        )
    raise UserError(f"there is no type {name}; use one of {', '.join(TYPES)}")


def target_kind(model: OpenedModel, tensor: Tensor, chosen: GGMLQuantizationType | None) -> GGMLQuantizationType:
    """The type that a tensor is written in.

    Norms and biases are F32, which llama.cpp computes with. `chosen` is for all others, but in a file of 4 or 5 bits
    the vocabulary's tables have 8: they are what the new language begins and ends with. Without `chosen`, each has its
    own type, of which GGUF has all.
    """
    if len(tensor.shape) == 1:
        return _Kind.F32
    if chosen is None:
        dtype = model.base_dtype(tensor) if isinstance(model, Merged) else model.dtype(tensor)
        return next(kind for kind, own in _FLOATS.items() if own == dtype)
    if chosen not in _FLOATS and tensor.name in (EMBEDDING, OUTPUT):
        return _Kind.Q8_0
    return chosen


def check_blocks(model: OpenedModel, chosen: GGMLQuantizationType | None) -> None:
    """Raises UserError if a tensor's rows cannot be cut into the blocks of its type."""
    for tensor in tensors(model.config):
        kind = target_kind(model, tensor, chosen)
        block, _ = GGML_QUANT_SIZES[kind]
        if tensor.shape[-1] % block:
            raise UserError(
                f"{model.where}: the rows of {tensor.name} have {tensor.shape[-1]} values, {kind.name} needs a "
                f"multiple of {block}; use --type f16"
            )


def write_gguf(
    path: Path,
    model: OpenedModel,
    fields: Mapping[str, Any],
    kind: GGMLQuantizationType | None = None,
    *,
    begin: Callable[[int], Callable[[int], None]] | None = None,
) -> None:
    """Write `path` with the fields that are given (a tokenizer's, a name), the model's own fields, and its tensors.

    kind: see `target_kind`. begin: called with the number of bytes of all tensors; the function that it returns, with
    the bytes written. Memory is one tensor, and what was trained. What `Merged` merges is merged in float32 and rounded
    once. Raises UserError for a value that is not finite, or not finite in this type, and as `check_blocks` does.
    """
    check_blocks(model, kind)
    table = [(tensor, target_kind(model, tensor, kind)) for tensor in tensors(model.config)]
    divisors = rope_factors(model.config)
    writer = GGUFWriter(path, architecture_of(model.config))
    for name, value in {**fields, **config_fields(model.config), **_file_fields(kind, table)}.items():
        _add(writer, name, value)
    if divisors is not None:
        writer.add_tensor_info(ROPE_FACTORS, divisors.shape, divisors.dtype, divisors.nbytes, _Kind.F32)
    for tensor, of in table:
        writer.add_tensor_info(gguf_name(tensor.name), tensor.shape, np.dtype(np.float32), _size(tensor, of), of)
    advance = None if begin is None else begin(sum(_size(tensor, of) for tensor, of in table))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for tensor, of in table:
            array = model.read(tensor)
            require_finite(array, tensor.name, model.where)
            heads = interleaved_heads(tensor, model.config, architecture_of(model.config))
            packed = _packed(array if heads is None else permute(array, heads), of)
            if of in _FLOATS and count_not_finite(packed):
                raise UserError(
                    f"tensor {tensor.name} of {model.where} has values that are too large for {of.name}; use --type "
                    "bf16"
                )
            # Bytes, since numpy writes no bfloat16 to a file.
            writer.write_tensor_data(np.ascontiguousarray(packed).view(np.uint8))
            if advance is not None:
                advance(packed.nbytes)
    finally:
        writer.close()


def _size(tensor: Tensor, kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(tensor.shape) // block * size


def _packed(array: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The array in a type of GGUF: [rows, values] in a float type, [rows, bytes] in a quantised one."""
    if kind in _FLOATS:
        with np.errstate(over="ignore"):  # the caller reports it
            return array.astype(_FLOATS[kind], copy=False)
    block, size = GGML_QUANT_SIZES[kind]
    rows, width = array.shape
    step = max(1, _VALUES_AT_ONCE // width)
    packed = np.empty((rows, width // block * size), np.uint8)
    for first in range(0, rows, step):
        part = np.ascontiguousarray(array[first : first + step], np.float32)
        packed[first : first + step] = quantize(part, kind)
    return packed


def _file_fields(
    chosen: GGMLQuantizationType | None, table: list[tuple[Tensor, GGMLQuantizationType]]
) -> dict[str, Any]:
    """What the file says about its types: that of most values."""
    if chosen is None:
        sizes: dict[_Kind, int] = {}
        for tensor, kind in table:
            sizes[kind] = sizes.get(kind, 0) + math.prod(tensor.shape)
        chosen = max(sizes, key=sizes.__getitem__)
    name = "ALL_F32" if chosen is _Kind.F32 else f"MOSTLY_{chosen.name}"
    return {
        "general.file_type": int(LlamaFileType[name]),
        "general.quantization_version": GGML_QUANT_VERSION,
    }


def most_common(model: OpenedModel, chosen: GGMLQuantizationType | None) -> str:
    """The name of the type that most values of a file have, as `write_gguf` writes it: `F16`, `Q8_0`."""
    table = [(tensor, target_kind(model, tensor, chosen)) for tensor in tensors(model.config)]
    number = _file_fields(chosen, table)["general.file_type"]
    return LlamaFileType(number).name.removeprefix("ALL_").removeprefix("MOSTLY_")


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_array(name, value)
