"""Reads weights of the LLaMA family from a GGUF file, in numpy.

GGUF names tensors differently from Hugging Face and, for the architecture `llama`, stores the rows of q and k in
another order. llama.cpp rotates pairs of neighbouring rows, and Hugging Face pairs a row with the one half a head away.
So llama.cpp's converter interleaves the two halves of every head, in the biases too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from transllm_jax.conversion.gguf.config import ARCHITECTURES, ROPE_FACTORS, config_of
from transllm_jax.conversion.gguf.header import StoredTensor, read_header
from transllm_jax.conversion.names import Tensor, collapse, tensors
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FLOATS: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# How many values are dequantised at once. Meanwhile the gguf package holds the result twice.
_VALUES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class GGUFModel:
    """An opened GGUF file of a model of the LLaMA family (`transllm_jax.conversion.opened.OpenedModel`).

    `fields` are its metadata by name. No weights are kept in memory: every `read` reads the file.
    """

    path: Path
    fields: dict[str, Any]
    config: LlamaConfig
    stored: dict[str, StoredTensor]

    @property
    def where(self) -> str:
        """The file's path."""
        return str(self.path)

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        """The tensor's own type if it is F32, F16 or BF16; float32 if it is quantised."""
        return _FLOATS.get(self.stored[gguf_name(tensor.name)].kind, np.dtype(np.float32))

    def read(self, tensor: Tensor) -> np.ndarray:
        """One tensor with `tensor.shape` and `dtype(tensor)`, the rows of q and k in Hugging Face's order.

        F32, F16 and BF16 values are those of the file, bit for bit. Raises UserError if the file has become shorter
        since it was opened.
        """
        array = read_stored(self.path, self.stored[gguf_name(tensor.name)]).reshape(tensor.shape)
        heads = interleaved_heads(tensor, self.config, self.fields["general.architecture"])
        return array if heads is None else unpermute(array, heads)


def gguf_name(name: str) -> str:
    """GGUF's name for a Hugging Face tensor name."""
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_IN_LAYER[module]}.{kind}"


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's q or k `[heads * H, D]`, or a bias `[heads * H]`, in Hugging Face's row order: GGUF interleaves the two
    halves of each head."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's q or k `[heads * H, D]`, or a bias `[heads * H]`, in GGUF's row order: undoes `unpermute`."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def interleaved_heads(tensor: Tensor, config: LlamaConfig, architecture: str) -> int | None:
    """The number of heads of a tensor whose rows GGUF stores in another order; None for all other tensors."""
    if architecture != "llama":
        return None
    heads = {"blocks.attention.q": config.num_attention_heads, "blocks.attention.k": config.num_key_value_heads}
    return heads.get(tensor.path.rpartition(".")[0])


def open_gguf(path: str | Path) -> GGUFModel:
    """Open a GGUF file and check that it is a whole model of the LLaMA family.

    Embeddings are tied if the file has no `output.weight`. Raises UserError for a file that is truncated, not GGUF or
    one of several parts, for an unsupported architecture or option, and for tensors that are missing, extra, of the
    wrong shape or of an unsupported type (all are listed).
    """
    path = Path(path)
    fields, stored = read_header(path)
    if (parts := fields.get("split.count", 1)) != 1:
        number = fields.get("split.no")
        which = f"part {number + 1}" if isinstance(number, int) else "one"
        raise UserError(
            f"{path} is {which} of the {parts} parts of a model, which are not read; join them with llama.cpp's "
            "llama-gguf-split --merge FIRST-PART OUT.gguf"
        )
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path} holds the architecture {architecture!r}; use a model of architecture "
            f"{', '.join(map(repr, ARCHITECTURES))}"
        )
    factors = stored.get(ROPE_FACTORS)
    if factors is not None and factors.kind is not GGMLQuantizationType.F32:
        raise UserError(f"{path}: tensor {ROPE_FACTORS} has type {factors.kind.name}, F32 is read; use another file")
    config = config_of(
        path,
        fields,
        {name: tensor.shape for name, tensor in stored.items()},
        None if factors is None else read_stored(path, factors),
    )
    _check_tensors(path, config, stored)
    return GGUFModel(path, fields, config, stored)


def read_stored(path: Path, stored: StoredTensor) -> np.ndarray:
    """One tensor in the file's row order, of `stored.shape`: F32, F16 and BF16 in their type, others as float32.

    A quantised tensor is dequantised a few rows at a time, so that memory is the result and these rows.
    """
    if stored.kind in _FLOATS:
        return _bytes(path, stored.offset, stored.size).view(_FLOATS[stored.kind]).reshape(stored.shape)
    block, size = GGML_QUANT_SIZES[stored.kind]
    rows, width = int(np.prod(stored.shape[:-1], dtype=np.int64)), stored.shape[-1]
    row_bytes = width // block * size
    step = max(1, _VALUES_AT_ONCE // width)
    values = np.empty((rows, width), np.float32)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        packed = _bytes(path, stored.offset + first * row_bytes, count * row_bytes)
        values[first : first + count] = dequantize(packed.reshape(count, row_bytes), stored.kind)
    return values.reshape(stored.shape)


def _bytes(path: Path, offset: int, count: int) -> np.ndarray:
    # A plain read, because every page of a memory map would count as this process's memory.
    data = np.fromfile(path, np.uint8, count, offset=offset)
    if data.size != count:
        raise UserError(f"{path} has become shorter while it was read; fetch it again")
    return data


def _is_read(kind: GGMLQuantizationType) -> bool:
    if kind in _FLOATS:
        return True
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:  # what gguf says of a kind that it cannot read
        return False
    return True


def _check_tensors(path: Path, config: LlamaConfig, stored: dict[str, StoredTensor]) -> None:
    table = {gguf_name(tensor.name): tensor for tensor in tensors(config)}
    problems = []
    if missing := table.keys() - stored.keys():
        problems.append(f"missing: {collapse(missing)}")
    if extra := stored.keys() - table.keys() - {ROPE_FACTORS}:
        problems.append(f"not part of the model: {collapse(extra)}")
    for name in sorted(table.keys() & stored.keys()):
        if stored[name].shape != table[name].shape:
            problems.append(f"{name} has shape {list(stored[name].shape)}, the metadata say {list(table[name].shape)}")
    if problems:
        raise UserError(f"{path}: the tensors are not those of its metadata; {'; '.join(problems)}; use another file")
    kinds = sorted({stored[name].kind for name in table}, key=lambda kind: kind.name, reverse=True)
    refused = [kind for kind in kinds if not _is_read(kind)]
    if refused:
        listed = [f"{collapse(n for n in table if stored[n].kind is kind)} has type {kind.name}" for kind in refused]
        raise UserError(
            f"{path}: tensor {'; '.join(listed)}, which is not read; use a file with F32, F16, BF16, Q8_0, Q4_0, Q4_1, "
            "Q4_K or Q6_K"
        )
