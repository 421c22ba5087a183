"""LLaMA weights and config out of a GGUF file, in numpy.

GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) names tensors differently from Hugging Face
and stores the rows of q and k in another order: llama.cpp rotates pairs of neighbouring rows, Hugging Face
pairs a row with the one half a head away, so llama.cpp's converter interleaves the two halves of every
head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from conversion.names import Tensor, collapse, tensors
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
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# Fields under `llama.` that are read, or that may be there with this value only. Another one might change
# what the model computes, and is refused by name.
_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count",
}  # fmt: skip
_ONLY = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
}


@dataclass(frozen=True)
class GGUFModel:
    """An opened GGUF file of a LLaMA model. `fields` are its metadata by name."""

    path: Path
    fields: dict[str, Any]
    config: LlamaConfig
    stored: dict[str, ReaderTensor]

    def read(self, tensor: Tensor) -> np.ndarray:
        """One tensor as Hugging Face has it: `tensor.shape`, float32, q and k in Hugging Face's order.

        Raises UserError for a tensor type that cannot be read.
        """
        stored = self.stored[gguf_name(tensor.name)]
        try:
            array = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: tensor {stored.name} has type {stored.tensor_type.name}, which is not read; "
                "use a file with Q4_1, Q8_0, F16, BF16 or F32"
            ) from None
        array = np.asarray(array, np.float32).reshape(tensor.shape)
        if tensor.path == "blocks.attention.q.kernel":
            return unpermute(array, self.config.num_attention_heads)
        if tensor.path == "blocks.attention.k.kernel":
            return unpermute(array, self.config.num_key_value_heads)
        return array


def gguf_name(name: str) -> str:
    """GGUF's name of one of Hugging Face's tensors."""
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_IN_LAYER[rest.removesuffix('.weight')]}.weight"


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's q or k `[heads * H, D]` in GGUF's row order: each head's two halves interleaved."""
    return array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """The reverse of `permute`."""
    return array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


def open_gguf(path: str | Path) -> GGUFModel:
    """Open a GGUF file and check that it is a whole LLaMA model.

    Embeddings are tied where the file has no `output.weight`. Raises UserError for a file that is truncated
    or not GGUF, of another architecture, with RoPE scaling, or with missing, extra or misshapen tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file; correct the path")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        # What the reader raises where the data ends early or makes no sense.
        raise UserError(f"{path} is truncated or not a GGUF file ({error}); fetch it again") from None
    if reader.byte_order != "I":
        raise UserError(f"{path} has the other byte order than this machine; fetch a file made for it")
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path} holds the architecture {architecture!r}; use a model of architecture 'llama'")
    config = _config(path, fields, stored)
    _check_tensors(path, config, stored)
    return GGUFModel(path, fields, config, stored)


def _config(path: Path, fields: dict[str, Any], stored: dict[str, ReaderTensor]) -> LlamaConfig:
    own = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    refused = [
        f"llama.{name}={value!r}"
        for name, value in own.items()
        if name not in _READ and not (name in _ONLY and value == _ONLY[name])
    ]
    if "rope_freqs.weight" in stored:
        refused.append("tensor rope_freqs.weight (scaled RoPE)")
    if refused:
        raise UserError(f"{path}: {', '.join(refused)} is not supported; use a model without")
    embedding = stored.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path}: tensor token_embd.weight is missing or not two-dimensional; fetch the file again")
    try:
        heads = _whole(path, own, "attention.head_count")
        hidden = _whole(path, own, "embedding_length")
        head_dim = int(own.get("attention.key_length", hidden // heads))
        config = LlamaConfig(
            vocab_size=int(embedding.shape[1]),
            hidden_size=hidden,
            intermediate_size=_whole(path, own, "feed_forward_length"),
            num_hidden_layers=_whole(path, own, "block_count"),
            num_attention_heads=heads,
            num_key_value_heads=_whole(path, own, "attention.head_count_kv")
            if "attention.head_count_kv" in own
            else heads,
            head_dim=head_dim,
            rms_norm_eps=_decimal(own["attention.layer_norm_rms_epsilon"]),
            # llama.cpp's own default where the field is absent.
            rope_theta=_decimal(own.get("rope.freq_base", 10000.0)),
            max_position_embeddings=_whole(path, own, "context_length"),
            tie_word_embeddings="output.weight" not in stored,
        )
    except KeyError as missing:
        raise UserError(f"{path}: field llama.{missing.args[0]} is missing; fetch the file again") from None
    expected = {
        "vocab_size": config.vocab_size,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }
    for name, value in expected.items():
        if own.get(name, value) != value:
            raise UserError(f"{path}: llama.{name}={own[name]} where {value} is supported; use another file")
    return config


def _whole(path: Path, own: dict[str, Any], name: str) -> int:
    value = own[name]
    if not isinstance(value, int) or value <= 0:
        raise UserError(f"{path}: llama.{name} is {value!r}; one positive number for all layers is supported")
    return value


def _decimal(value: float) -> float:
    # The file holds a float32; 1e-05 is what was meant by 9.99999974e-06, and rounds to the same float32.
    return float(str(np.float32(value)))


def _check_tensors(path: Path, config: LlamaConfig, stored: dict[str, ReaderTensor]) -> None:
    table = {gguf_name(tensor.name): tensor for tensor in tensors(config)}
    problems = []
    if missing := table.keys() - stored.keys():
        problems.append(f"missing: {collapse(missing)}")
    if extra := stored.keys() - table.keys():
        problems.append(f"not part of the model: {collapse(extra)}")
    for name in table.keys() & stored.keys():
        shape = tuple(int(size) for size in reversed(stored[name].shape))
        if shape != table[name].shape:
            problems.append(f"{name} has shape {list(shape)}, the metadata say {list(table[name].shape)}")
    if problems:
        raise UserError(f"{path}: the tensors are not those of its metadata; {'; '.join(problems)}; use another file")
