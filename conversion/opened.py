"""The interface of every opened checkpoint: a config, and tensors that are read one at a time.

Hugging Face directories, GGUF files, our checkpoints, and a base with trained arrays are all read through it, so
writers and comparisons work on any of them.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from transllm_jax.conversion.names import Tensor, tensors
from transllm_jax.model.config import LlamaConfig


class OpenedModel(Protocol):
    """An opened model. `where` names it in messages."""

    @property
    def where(self) -> str: ...

    @property
    def config(self) -> LlamaConfig: ...

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        """The type in which the tensor is stored (for a quantised one, that of its values), without reading it."""

    def read(self, tensor: Tensor) -> np.ndarray:
        """One tensor of `names.tensors(config)`, with `tensor.shape` and its stored type; it may not be finite."""


def size_of(model: OpenedModel) -> int:
    """The size of all tensors in bytes, in their stored types."""
    return sum(math.prod(tensor.shape) * model.dtype(tensor).itemsize for tensor in tensors(model.config))
