"""A GGUF file's metadata about the model: the fields that `config.py` reads, and RoPE's divisors."""

from __future__ import annotations

from typing import Any

import numpy as np

from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.rope import frequencies, llama3_frequencies


def architecture_of(config: LlamaConfig) -> str:
    """llama.cpp's name of the model family: Mistral is computed as LLaMA is."""
    return "llama" if config.model_type == "mistral" else config.model_type


def config_fields(config: LlamaConfig) -> dict[str, Any]:
    """The fields of the architecture by their full names. Dynamic RoPE scaling, which has none, is left out."""
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.sliding_window is not None:
        fields["attention.sliding_window"] = config.sliding_window
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_scaling.factor)}
    architecture = architecture_of(config)
    return {f"{architecture}.{name}": value for name, value in fields.items()}


def rope_factors(config: LlamaConfig) -> np.ndarray | None:
    """What llama.cpp divides each of RoPE's frequencies by, float32 [H / 2]; None without LLaMA 3.1's scaling."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "llama3":
        return None
    plain = frequencies(config.head_dim, config.rope_theta)
    return np.asarray(plain / llama3_frequencies(plain, scaling), np.float32)


def config_notes(config: LlamaConfig) -> list[str]:
    """One line for each thing that llama.cpp computes differently, or not at all.

    Raises UserError for a model that llama.cpp cannot compute.
    """
    if config.model_type in ("qwen2", "qwen3") and config.sliding_window is not None:
        raise UserError(
            f"a sliding window of {config.sliding_window} tokens in a model of the family {config.model_type} cannot "
            "be written as GGUF; use a model without (use_sliding_window: false)"
        )
    notes = []
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        notes.append(
            f"llama.cpp ignores the model's sliding window: its answers differ after {config.sliding_window} tokens "
            f"(give it --ctx-size {config.sliding_window})"
        )
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic":
        notes.append(
            "llama.cpp has no dynamic RoPE scaling: the file is for the trained context of "
            f"{config.max_position_embeddings} tokens"
        )
    return notes
