"""A model to convert, and a way to compare models bit for bit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import random_weights
from tiny_families import FAMILIES
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.conversion.hf.directory import write_model
from transllm_jax.conversion.names import tensors
from transllm_jax.conversion.opened import OpenedModel

LLAMA = FAMILIES["llama2"]


def write_source(directory: Path, name: str, dtype: str, *, max_shard_bytes: int = 10**9) -> Path:
    """A Hugging Face directory with a tiny model of a family, the tiny tokenizer and a licence."""
    tokenizer = build_tiny_tokenizer(directory.with_name("tokenizer"))
    config = replace(FAMILIES[name], vocab_size=400)
    extra = {"eos_token_id": 2, "bos_token_id": 1, "transformers_version": "4.50.0", "use_cache": True}
    write_model(
        directory,
        config,
        random_weights(config),
        dtype=dtype,
        tokenizer_dir=tokenizer,
        extra_config=extra,
        max_shard_bytes=max_shard_bytes,
    )
    (directory / "LICENSE").write_text("whose it is")
    return directory


def bits(model: OpenedModel) -> dict[str, tuple[str, str]]:
    """The type and the hash of each tensor."""
    found = {}
    for tensor in tensors(model.config):
        array = np.ascontiguousarray(model.read(tensor))
        found[tensor.name] = (array.dtype.name, hashlib.sha256(array.tobytes()).hexdigest())
    return found
