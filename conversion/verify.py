"""Compares two checkpoints: every tensor, the config, and the logits of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np

from transllm_jax.conversion.hf.safetensors_io import CODES
from transllm_jax.conversion.logits import logits_of
from transllm_jax.conversion.names import Tensor, collapse, tensors
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.model.config import LlamaConfig

# Fields that are not compared, because a difference shows in the names and shapes of the tensors.
_IMPLIED = {"model_type", "attention_bias", "mlp_bias", "tie_word_embeddings", "vocab_size"}
# How many values are compared at once: float32 copies of a whole vocabulary table would take gigabytes.
_BLOCK = 1 << 22


@dataclass
class Group:
    """The comparison of all tensors with one of our paths (all layers together). Differences are of float32 values.

    If the number of rows differs (a vocabulary that grew), the rows that both have are compared.
    """

    path: str
    tensors: int = 0
    identical: int = 0
    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    worst: str | None = None
    types: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """The mean absolute difference."""
        return self.total / self.count if self.count else 0.0


@dataclass
class Comparison:
    """What differs between two checkpoints."""

    groups: list[Group]
    config: list[str]
    missing: list[str]
    # The prompt's logits: their largest difference, the share of positions with the same best token, and the mean KL
    # divergence in nats. None if they were not compared.
    logits: float | None = None
    same_best: float | None = None
    divergence: float | None = None

    @property
    def largest(self) -> float:
        """The largest absolute difference of any weight or logit."""
        return max([group.largest for group in self.groups] + [self.logits or 0.0])

    def within(self, tolerance: float) -> bool:
        """Whether both have the same config and tensors, and nothing differs by more than `tolerance`."""
        faults = [fault for group in self.groups for fault in group.faults]
        return not (self.config or self.missing or faults) and self.largest <= tolerance


def compare(
    a: OpenedModel, b: OpenedModel, prompt: list[int] | None = None, advance: Callable[[int], None] | None = None
) -> Comparison:
    """Compare two models tensor by tensor, and their logits on a prompt of token ids, if it is given.

    Memory: one tensor of each, and later one layer of one. `advance` is called with the number of bytes read. Logits
    are compared for the ids that both have. A value that is not finite only equals the same bits.
    """
    left = {tensor.name: tensor for tensor in tensors(a.config)}
    right = {tensor.name: tensor for tensor in tensors(b.config)}
    missing = []
    if only := left.keys() - right.keys():
        missing.append(f"only in {a.where}: {collapse(only)}")
    if only := right.keys() - left.keys():
        missing.append(f"only in {b.where}: {collapse(only)}")
    groups: dict[str, Group] = {}
    for name, tensor in left.items():
        if name in right:
            group = groups.setdefault(tensor.path, Group(tensor.path))
            _compare(group, a, b, tensor, right[name], advance or (lambda size: None))
    result = Comparison(list(groups.values()), _config(a.config, b.config), missing)
    if prompt is not None:
        _compare_logits(result, logits_of(a, prompt), logits_of(b, prompt))
    return result


def _config(a: LlamaConfig, b: LlamaConfig) -> list[str]:
    return [
        f"{item.name}: {getattr(a, item.name)!r} and {getattr(b, item.name)!r}"
        for item in fields(LlamaConfig)
        if item.name not in _IMPLIED and getattr(a, item.name) != getattr(b, item.name)
    ]


def _compare(
    group: Group, a: OpenedModel, b: OpenedModel, left: Tensor, right: Tensor, advance: Callable[[int], None]
) -> None:
    x, y = a.read(left), b.read(right)
    advance(x.nbytes + y.nbytes)
    group.tensors += 1
    group.types.add(CODES[x.dtype] if x.dtype == y.dtype else f"{CODES[x.dtype]}/{CODES[y.dtype]}")
    if x.shape != y.shape:
        group.faults.append(f"{left.name}: shape {list(x.shape)} and {list(y.shape)}")
        if x.shape[1:] != y.shape[1:]:
            return
        rows = min(len(x), len(y))
        x, y = x[:rows], y[:rows]
    elif x.dtype == y.dtype and np.array_equal(_bits(x), _bits(y)):
        group.identical += 1
        group.count += x.size
        return
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    for start in range(0, flat_x.size, _BLOCK):
        one, other = flat_x[start : start + _BLOCK], flat_y[start : start + _BLOCK]
        with np.errstate(invalid="ignore"):
            difference = np.abs(one.astype(np.float32) - other.astype(np.float32))
        difference[np.isnan(difference)] = np.inf
        largest = float(np.max(difference, initial=0.0))
        if largest > group.largest:
            group.largest, group.worst = largest, left.name
        group.total += float(np.sum(difference, dtype=np.float64))
    group.count += flat_x.size


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def _compare_logits(result: Comparison, a: np.ndarray, b: np.ndarray) -> None:
    size = min(a.shape[1], b.shape[1])
    a, b = a[:, :size].astype(np.float64), b[:, :size].astype(np.float64)
    # NaN counts as infinitely different, even from NaN.
    result.logits = float(np.max(np.nan_to_num(np.abs(a - b), nan=np.inf)))
    result.same_best = float(np.mean(np.argmax(a, axis=1) == np.argmax(b, axis=1)))
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    result.divergence = float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1)))


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores - np.max(scores, axis=1, keepdims=True)
    shifted: np.ndarray = scores - np.log(np.sum(np.exp(scores), axis=1, keepdims=True))
    return shifted
