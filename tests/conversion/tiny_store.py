"""Shared by the tests of our checkpoint: models to write, comparisons of bits, and the error on opening."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import tiny_config

from transllm_jax.conversion.hf.directory import write_config
from transllm_jax.conversion.names import Tensor, tensors
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.conversion.store import MANIFEST, open_store, write_store
from transllm_jax.disk import read_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig

VOCAB = 60
CONFIG = tiny_config(VOCAB, tied=False)
MESH = {"data": 2, "fsdp": 2, "tensor": 4}
BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)


class Source:
    """An opened model that holds the given tensors in memory."""

    where = "SOURCE"

    def __init__(self, config: LlamaConfig, given: dict[str, np.ndarray]) -> None:
        self.config, self.given = config, given

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        return self.given[tensor.name].dtype

    def read(self, tensor: Tensor) -> np.ndarray:
        return self.given[tensor.name].copy()


def source_of(config: LlamaConfig = CONFIG, dtype: np.dtype[Any] = BF16) -> Source:
    """A model of random weights."""
    rng = np.random.default_rng(1)
    return Source(config, {t.name: rng.standard_normal(t.shape).astype(dtype) for t in tensors(config)})


def finish(directory: Path, config: LlamaConfig, dtype: str = "bfloat16") -> Path:
    """Writes the configs, without which a checkpoint is not opened."""
    write_config(directory, config.to_hf(), dtype)
    return directory


def written(directory: Path, source: OpenedModel, **options: Any) -> Path:
    """Writes a checkpoint that can be opened."""
    directory.mkdir(parents=True)
    write_store(directory, source, **options)
    return finish(directory, source.config)


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def assert_same_model(a: OpenedModel, b: OpenedModel) -> None:
    assert a.config == b.config
    for tensor in tensors(a.config):
        assert a.dtype(tensor) == b.dtype(tensor) == b.read(tensor).dtype
        assert_same_bits(a.read(tensor), b.read(tensor))


def edited(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Applies `change` to the manifest of a checkpoint."""
    manifest = read_json(directory / MANIFEST)
    change(manifest)
    write_json(directory / MANIFEST, manifest)


def refused(directory: Path) -> str:
    """The message with which a checkpoint is refused: one line that names the directory."""
    with pytest.raises(UserError) as caught:
        open_store(directory)
    message = str(caught.value)
    assert str(directory) in message and "\n" not in message and "[tensorstore_spec" not in message
    return message
