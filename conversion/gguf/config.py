"""The config of a model of the LLaMA family from a GGUF file's metadata.

GGUF's keys are `<architecture>.<name>`. Mistral has the architecture `llama`, with a sliding window if it uses one.
LLaMA 3.1's RoPE scaling is not in the metadata: llama.cpp's converter computes a divisor for every frequency from the
parameters of Hugging Face's `llama3` scaling, and stores the divisors as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.rope import RopeScaling, frequencies, llama3_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"

# Fields that are read (_READ), and fields that are only allowed with one value (_ONLY). Any other field might change
# what the model computes, so it is refused by name.
_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
}  # fmt: skip
_ONLY = {"expert_count": 0, "expert_used_count": 0}
_WINDOW = "attention.sliding_window"

# low_freq_factor, high_freq_factor and the original context, as the converter assumes them for LLaMA 3.1 and 3.2; the
# file does not contain them.
_LLAMA3 = (1.0, 4.0, 8192)
_ATTENTION_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
_MLP_BIASES = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")


def config_of(
    path: Path, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None
) -> LlamaConfig:
    """The config from the metadata, the tensors' shapes (rows first) by GGUF's names, and `rope_freqs.weight`.

    Raises UserError for a field that is missing or invalid, for fields that are not supported (all are listed), and
    for scaled RoPE that is neither linear nor LLaMA 3.1's.
    """
    architecture = fields["general.architecture"]
    meta = _Fields(path, architecture, fields)
    allowed = _READ | ({_WINDOW} if architecture == "llama" else set())
    refused = [
        f"{architecture}.{name}={value!r}"
        for name, value in meta.values.items()
        if name not in allowed and not (name in _ONLY and value == _ONLY[name])
    ]
    if refused:
        raise UserError(f"{path}: {', '.join(refused)} is not supported; use a model without")
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise UserError(f"{path}: tensor token_embd.weight is missing or not two-dimensional; fetch the file again")
    heads = meta.positive_int("attention.head_count")
    hidden = meta.positive_int("embedding_length")
    head_dim = meta.positive_int("attention.key_length", hidden // heads)
    # llama.cpp's own default where the field is absent.
    theta = meta.positive_float("rope.freq_base", 10000.0)
    window = meta.positive_int(_WINDOW) if meta.values.get(_WINDOW, 0) != 0 else None
    kind = "mistral" if window is not None else architecture
    try:
        config = LlamaConfig(
            vocab_size=embedding[0],
            hidden_size=hidden,
            intermediate_size=meta.positive_int("feed_forward_length"),
            num_hidden_layers=meta.positive_int("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=meta.positive_int("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=meta.positive_float("attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            max_position_embeddings=meta.positive_int("context_length"),
            tie_word_embeddings="output.weight" not in shapes,
            model_type=kind,
            rope_scaling=_scaling(meta, head_dim, theta, rope_factors),
            attention_bias=kind == "qwen2" or (kind != "mistral" and _any(shapes, _ATTENTION_BIASES)),
            mlp_bias=kind == "llama" and _any(shapes, _MLP_BIASES),
            sliding_window=window,
        )
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    expected = {
        "vocab_size": config.vocab_size,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }
    wrong = [
        f"{architecture}.{name}={meta.values[name]!r} where {value} is supported"
        for name, value in expected.items()
        if meta.values.get(name, value) != value
    ]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)}; use another file")
    return config


class _Fields:
    """The fields of the architecture, by their names without its prefix."""

    def __init__(self, path: Path, architecture: str, fields: Mapping[str, Any]) -> None:
        prefix = f"{architecture}."
        self.path, self.prefix = path, prefix
        self.values = {name.removeprefix(prefix): fields[name] for name in fields if name.startswith(prefix)}

    def get(self, name: str, default: Any) -> Any:
        value = self.values.get(name, default)
        if value is None:
            raise UserError(f"{self.path}: field {self.prefix}{name} is missing; fetch the file again")
        return value

    def positive_int(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UserError(
                f"{self.path}: {self.prefix}{name} is {value!r}; one positive number for all layers is supported"
            )
        return value

    def positive_float(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UserError(f"{self.path}: {self.prefix}{name} is {value!r}; it must be a number above 0")
        return _shortest_decimal(value)


def _shortest_decimal(value: float) -> float:
    # The file holds a float32. The shortest decimal that rounds to it was meant: 1e-05, not 9.99999974e-06.
    return float(str(np.float32(value)))


def _any(shapes: Mapping[str, tuple[int, ...]], names: tuple[str, ...]) -> bool:
    return any(name.startswith("blk.") and name.endswith(names) for name in shapes)


def _scaling(meta: _Fields, head_dim: int, theta: float, factors: np.ndarray | None) -> RopeScaling | None:
    """The scaling that llama.cpp would compute: linear for a factor without a type, none for a factor of 1."""
    kind = meta.values.get("rope.scaling.type", "linear")
    # rope.scale_linear is an older name of the factor; 0 means "not set".
    numbers = [meta.values[name] for name in ("rope.scaling.factor", "rope.scale_linear") if meta.values.get(name, 0)]
    factor = _shortest_decimal(numbers[0]) if numbers and isinstance(numbers[0], int | float) else 1.0
    if kind not in ("none", "linear") or len(set(numbers)) > 1 or not 1 <= factor < math.inf:
        stated = [f"{name}={value!r}" for name, value in meta.values.items() if name.startswith("rope.scal")]
        raise UserError(
            f"{meta.path}: {meta.prefix}{f', {meta.prefix}'.join(stated)} is not supported; use a model without"
        )
    if kind == "none" and factor != 1:
        raise UserError(
            f"{meta.path}: {meta.prefix}rope.scaling.type='none' contradicts the factor {factor}; use another file"
        )
    linear = None if factor == 1 else RopeScaling("linear", factor)
    if factors is None:
        return linear
    scaling = _llama3(meta.path, head_dim, theta, factors)
    if linear is not None and scaling is not None:
        raise UserError(
            f"{meta.path}: {meta.prefix}rope.scaling.factor={factor} and tensor {ROPE_FACTORS} scale RoPE twice, which "
            "is not supported; use a model without"
        )
    return linear or scaling


def _llama3(path: Path, head_dim: int, theta: float, factors: np.ndarray) -> RopeScaling | None:
    if factors.shape != (head_dim // 2,):
        raise UserError(
            f"{path}: tensor {ROPE_FACTORS} has shape {list(factors.shape)}, the metadata say {[head_dim // 2]}; "
            "use another file"
        )
    if np.all(factors == 1):
        return None
    # The lowest frequency is divided by the whole factor, so the factor is the largest divisor.
    scaling = RopeScaling("llama3", _shortest_decimal(float(factors.max())), *_LLAMA3)
    plain = frequencies(head_dim, theta)
    # The tolerance is for float32, as the converter rounds at other steps.
    if not np.allclose(plain / llama3_frequencies(plain, scaling), factors, rtol=1e-4, atol=0):
        low, high, context = _LLAMA3
        raise UserError(
            f"{path}: tensor {ROPE_FACTORS} (scaled RoPE) is not supported: it is not that of LLaMA 3.1 "
            f"(low_freq_factor {low:g}, high_freq_factor {high:g}, original context {context}); use the model's "
            "Hugging Face directory"
        )
    return scaling
