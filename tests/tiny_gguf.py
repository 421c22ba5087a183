"""Tiny GGUF files: a model of any family of ours in any type, and changes that make a file a bad one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers

from transllm_jax.conversion.gguf.weights import gguf_name
from transllm_jax.conversion.names import tensors
from transllm_jax.model.config import LlamaConfig

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "h e", "l l", "he ll", "hell o", "Ġ hello", "ĠĠ ĠĠ", "à ¸"]
TEXTS = [
    "hello  hello world, it's 12 o'clock!",
    "สวัสดีครับ ผมชื่อสมชาย ๑๒๓",
    "def f(x):\n    return x + 1\n\n\n",
    "🙂👩\u200d👩\u200d👧 emoji",
    "<|im_start|>user\nhello<|im_end|>\n",
    " \n \n\t x ",
    "½²x² don't 'S",
    "",
]


# What alters a file's fields and tensors before it is written.
Change = Callable[[gguf.GGUFWriter, dict[str, Any]], None]


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's q or k `[heads * H, D]`, or a bias `[heads * H]`, in GGUF's row order, which interleaves the two
    halves of each head."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def tokens() -> list[str]:
    return [
        *CONTROL,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *[merge.replace(" ", "") for merge in MERGES],
    ]


def tiny_config(*, tied: bool = True, **changes: Any) -> LlamaConfig:
    # Rows are multiples of 32, the block of Q4_1 and Q8_0.
    config = LlamaConfig(
        vocab_size=len(tokens()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    return dataclasses.replace(config, **changes)


def hf_weights(config: LlamaConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {t.name: rng.standard_normal(t.shape, np.float32) * 0.1 for t in tensors(config)}


def rope_factors(config: LlamaConfig, low: float = 1.0, high: float = 4.0, context: int = 8192) -> np.ndarray:
    """The divisors that llama.cpp's converter computes from `llama3` scaling, in its way: by wavelengths."""
    assert config.rope_scaling is not None
    factor = config.rope_scaling.factor
    factors = []
    for feature in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * config.rope_theta ** (feature / config.head_dim)
        smooth = (context / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if wavelength < context / high else factor if wavelength > context / low else between)
    return np.array(factors, np.float32)


def write_gguf(
    path: Path,
    config: LlamaConfig,
    weights: dict[str, np.ndarray],
    *,
    kind: Kind = Kind.F32,
    architecture: str | None = None,
    change: Change | None = None,
) -> dict[str, np.ndarray]:
    """Write a tiny model; `change` may alter fields and tensors. Returns the values that the file holds."""
    architecture = architecture or ("llama" if config.model_type == "mistral" else config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    if config.hidden_size != config.num_attention_heads * config.head_dim:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(CONTROL) + [1] * (config.vocab_size - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    held = {}
    stored: dict[str, Any] = {}
    for name, array in weights.items():
        part = packed(array, kind) if array.ndim == 2 else array
        held[name] = unpacked(part, kind) if array.ndim == 2 else array
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            part = permute(part, heads)  # whole rows change places, which works on packed rows as well
        stored[gguf_name(name)] = (part, kind if array.ndim == 2 else Kind.F32)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    elif config.rope_scaling is not None:
        stored["rope_freqs.weight"] = (rope_factors(config), Kind.F32)
    if change is not None:
        change(writer, stored)
    for name, (part, part_kind) in stored.items():
        writer.add_tensor(name, np.ascontiguousarray(part), raw_dtype=part_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


# Where a block of 256 values has its float16 scales, for the types that the gguf package cannot quantise to.
SCALES = {
    Kind.Q4_K: slice(0, 4), Kind.Q5_K: slice(0, 4), Kind.Q6_K: slice(208, 210),
    Kind.Q2_K: slice(80, 84), Kind.Q3_K: slice(108, 110),
}  # fmt: skip


def packed(array: np.ndarray, kind: Kind) -> np.ndarray:
    """The rows in the file's form: quantised by the gguf package, or random blocks with finite scales."""
    if kind not in SCALES:
        return gguf.quants.quantize(array, kind)
    rng = np.random.default_rng(array.size)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (array.size // block, size), np.uint8)
    at = SCALES[kind]
    scales = rng.standard_normal((len(blocks), (at.stop - at.start) // 2)).astype(np.float16)
    blocks[:, at] = scales.view(np.uint8)
    return blocks.reshape(len(array), -1)


def unpacked(array: np.ndarray, kind: Kind) -> np.ndarray:
    """The values: of F32, F16 and BF16 in their own type."""
    if kind is Kind.BF16:
        return array.view(ml_dtypes.bfloat16)
    return array if kind in (Kind.F32, Kind.F16) else gguf.quants.dequantize(array, kind)


def drop(name: str) -> Change:
    return lambda writer, stored: stored.pop(name)


def add(name: str, shape: tuple[int, ...], value: float = 1.0) -> Change:
    array = np.full(shape, value, np.float32)
    return lambda writer, stored: stored.update({name: (array, Kind.F32)})


def put(name: str, part: tuple[np.ndarray, Kind]) -> Change:
    return lambda writer, stored: stored.update({name: part})


def field(method: str, *value: Any) -> Change:
    return lambda writer, stored: getattr(writer, method)(*value)


def replace(key: str, value: Any) -> Change:
    def change(writer: gguf.GGUFWriter, stored: dict[str, Any]) -> None:
        field = writer.kv_data[0][key]
        writer.kv_data[0][key] = type(field)(value, field.type, field.sub_type)

    return change


def remove(key: str) -> Change:
    return lambda writer, stored: writer.kv_data[0].pop(key)
