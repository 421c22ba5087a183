"""Models to convert, and what is in them bit for bit, for tests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from conftest import random_weights
from tiny_families import FAMILIES

from conversion.hf.directory import write_model
from conversion.names import tensors
from conversion.opened import OpenedModel

LLAMA = FAMILIES["llama2"]


def write_source(directory: Path, name: str, dtype: str, **options: Any) -> Path:
    """A Hugging Face directory of a family, with the tiny tokenizer (and so padding rows or none)."""
    from dataclasses import replace

    from tiny_tokenizer import build_tiny_tokenizer

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
        max_shard_bytes=options.pop("max_shard_bytes", 10**9),
    )
    (directory / "LICENSE").write_text("whose it is")
    return directory


def bits(model: OpenedModel) -> dict[str, tuple[str, str]]:
    """Type and hash of every tensor."""
    found = {}
    for tensor in tensors(model.config):
        array = np.ascontiguousarray(model.read(tensor))
        found[tensor.name] = (array.dtype.name, hashlib.sha256(array.tobytes()).hexdigest())
    return found
