"""What every kind of checkpoint looks like once it is open: a shape, and tensors one at a time.

Hugging Face directories, GGUF files, our checkpoints, and a base with what was trained on it are all read through
this; writers and comparisons do not know which they were given.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from conversion.names import Tensor, tensors
from transllm_jax.model.config import LlamaConfig


class Opened(Protocol):
    """An opened model. `where` names it in messages."""

    @property
    def where(self) -> str: ...

    @property
    def config(self) -> LlamaConfig: ...

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        """The type in which the tensor is stored (that of the values, for a quantised one), without reading it."""

    def read(self, tensor: Tensor) -> np.ndarray:
        """One tensor of `names.tensors(config)`: of `tensor.shape`, in its stored type; not checked to be finite."""


def size_of(model: Opened) -> int:
    """Bytes of all tensors, in their own types."""
    return sum(math.prod(tensor.shape) * model.dtype(tensor).itemsize for tensor in tensors(model.config))
