"""A small model in a Hugging Face directory that our own code did not write."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from transllm_jax.conversion.names import tensors
from transllm_jax.model.config import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
UNTIED = replace(CONFIG, tie_word_embeddings=False)
IDS = {"bos_token_id": 1, "eos_token_id": 2}


def write_tokenizer(directory: Path, size: int) -> None:
    """Writes a tokenizer of bytes with `size` ids: three special tokens, the bytes, and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", "<|bos|>", "<|eos|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>", "<|bos|>", "<|eos|>"])
    tokenizer.add_tokens([AddedToken(f"<new{i}>") for i in range(size - len(vocabulary))])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(roles))
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def random_tensors(config: LlamaConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {t.name: rng.standard_normal(t.shape, np.float32).astype(dtype) for t in tensors(config)}


def write_directory(
    directory: Path,
    config: LlamaConfig = CONFIG,
    *,
    dtype: Any = np.float32,
    shards: int = 1,
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a model directory without our code: the safetensors library writes the weights. Returns the tensors."""
    arrays = random_tensors(config, dtype)
    if change is not None:
        change(arrays)
    write_tokenizer(directory, config.vocab_size)
    (directory / "config.json").write_text(json.dumps(config.to_hf() | IDS))
    if shards == 1:
        save_file(arrays, directory / "model.safetensors")
        return arrays
    weight_map = {}
    for shard in range(shards):
        names = list(arrays)[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: arrays[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return arrays


def edit_json(file: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A function that applies `edit` to a JSON file of a directory."""

    def damage(directory: Path) -> None:
        value = json.loads((directory / file).read_text())
        edit(value)
        (directory / file).write_text(json.dumps(value))

    return damage
