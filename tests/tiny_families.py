"""A tiny config of each family of models, with what is special to it: for tests only."""

from __future__ import annotations

from dataclasses import replace

from conftest import tiny_config

from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.rope import RopeScaling

VOCAB = 61
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
BASE = tiny_config(VOCAB, tied=False)
FAMILIES: dict[str, LlamaConfig] = {
    "llama2": replace(BASE, num_key_value_heads=4, rms_norm_eps=1e-5),
    "llama3-untied": replace(BASE, rope_theta=500.0, rope_scaling=LLAMA3),
    "llama3-tied": replace(BASE, rope_theta=500.0, rope_scaling=LLAMA3, tie_word_embeddings=True),
    "llama-linear": replace(BASE, rope_scaling=RopeScaling("linear", 4.0)),
    # The text is longer than what the model was trained on, so the scaling counts.
    "llama-dynamic": replace(BASE, rope_scaling=RopeScaling("dynamic", 4.0), max_position_embeddings=16),
    "llama-biases": replace(BASE, attention_bias=True, mlp_bias=True),
    "smollm2": replace(BASE, num_attention_heads=6, rope_theta=100000.0, head_dim=8, tie_word_embeddings=True),
    "mistral": replace(BASE, model_type="mistral"),
    "mistral-window": replace(BASE, model_type="mistral", sliding_window=6),
    "qwen2": replace(BASE, model_type="qwen2", attention_bias=True, tie_word_embeddings=True, head_dim=12),
    "qwen2.5-untied": replace(BASE, model_type="qwen2", attention_bias=True, rope_theta=1e6, head_dim=12),
    "qwen2-window": replace(BASE, model_type="qwen2", attention_bias=True, head_dim=12, sliding_window=5),
    "qwen3": replace(BASE, model_type="qwen3", tie_word_embeddings=True, rope_theta=1e6),
    "qwen3-biases": replace(BASE, model_type="qwen3", attention_bias=True),
}
