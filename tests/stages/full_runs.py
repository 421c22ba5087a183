"""Runs with `lora: none` or `embeddings: none` on a tiny Qwen3 with biases, and their arrays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from conftest import random_weights, tiny_config
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.config import load_config
from transllm_jax.conversion.hf.directory import write_model
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.model.config import LlamaConfig
from transllm_jax.progress import Progress
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays

POINTS = ("vocabulary", "pretrain", "translate", "transfer")
BASE_ROWS = {"vocabulary.base", "vocabulary.output_base"}
NEW_ROWS = {"vocabulary.new", "vocabulary.output_new"}
# The arrays that are not trained, for each value of `embeddings`.
FROZEN = {"new": BASE_ROWS, "all": set(), "none": BASE_ROWS | NEW_ROWS}


def write_qwen(directory: Path, dtype: str) -> LlamaConfig:
    """An untied Qwen3 with biases and with norms of queries and keys: it has every kind of weight."""
    tokenizer = build_tiny_tokenizer(directory.with_name("tokenizer"))
    shape = replace(tiny_config(Tokenizer.load(tokenizer).vocab_size, tied=False), model_type="qwen3")
    config = replace(shape, attention_bias=True)
    extra = {"eos_token_id": Tokenizer.load(tokenizer).eos_id}
    write_model(directory, config, random_weights(config), dtype=dtype, tokenizer_dir=tokenizer, extra_config=extra)
    return config


def opened(workdir: Path) -> Run:
    """The run of a work directory, by its own config."""
    return Run(load_config(workdir / "run.yaml"), workdir, Progress(quiet=True), Interrupt())


def arrays(workdir: Path, point: str) -> dict[str, np.ndarray]:
    """The arrays that a stage saved."""
    return load_arrays(workdir / point / "trainable")


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    """The names of the arrays whose bits changed."""
    assert before.keys() == after.keys()
    return {path for path in after if before[path].tobytes() != after[path].tobytes()}


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, in float32."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)
