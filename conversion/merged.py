"""A base and what was trained on it, read as one model: adapters merged or all weights replaced, new rows appended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from transllm_jax.conversion.hf.safetensors_io import require_finite
from transllm_jax.conversion.names import EMBEDDING, OUTPUT, Tensor, kernel_shapes, to_hf, weight_shapes
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig

# Hugging Face's table -> our paths of its new rows and of its trained base rows.
_ROWS = {
    EMBEDDING: ("vocabulary.new", "vocabulary.base_trained"),
    OUTPUT: ("vocabulary.output_new", "vocabulary.output_base_trained"),
}


class Merged:
    """An opened model (`conversion/opened.py`): W + scale * (a @ b).T in float32, and new rows after the base's.

    `trainable`: `PATH.a` [L, in, R] and `PATH.b` [L, R, out] for each adapted kernel; `vocabulary.new` [n, D];
    `vocabulary.base_trained` [V, D], which replaces the base's rows; for an untied model also `vocabulary.output_new`
    and `vocabulary.output_base_trained`. What was not trained keeps the base's type and bits.

    After full fine-tuning, `trainable` holds all weights by their paths, `vocabulary.base` too, and no adapters. Every
    tensor is then read from it; the base only gives the config and the types.

    `merge_adapters=False` leaves the base's kernels unchanged, and only appends rows to the tables.
    """

    def __init__(
        self, base: OpenedModel, trainable: Mapping[str, np.ndarray], scale: float, *, merge_adapters: bool = True
    ) -> None:
        """Raises UserError, which lists every array that is missing, extra, of the wrong shape or not finite.

        Also raises UserError for `merge_adapters=False` after full fine-tuning, which has no adapters.
        """
        self.base = base
        self.scale = np.float32(scale)
        self.trainable = {path: np.asarray(array, np.float32) for path, array in trainable.items()}
        # Whether this is full fine-tuning.
        self.full = not self.trainable.keys().isdisjoint(weight_shapes(base.config))
        _check(base.config, self.trainable, full=self.full)
        if self.full and not merge_adapters:
            raise UserError(
                f"{self.where}: all weights were trained (lora: none), so there are no adapters to keep apart; write "
                "the whole model, with transllm convert to-hf"
            )
        self.new_rows = len(self.trainable.get("vocabulary.new", ()))
        self.config = replace(base.config, vocab_size=base.config.vocab_size + self.new_rows)
        self._merge = merge_adapters

    @property
    def padding(self) -> int:
        """How many of the last new rows may have no token: they are 0 in every table."""
        tables = [self.trainable[new] for new, _ in _ROWS.values() if new in self.trainable]
        used = [np.flatnonzero(table.any(axis=1)) for table in tables]
        return self.new_rows - max((int(rows[-1]) + 1 for rows in used if len(rows)), default=0)

    @property
    def where(self) -> str:
        """The base's name, and what was trained on it, for messages."""
        return f"{self.base.where} with {'trained weights' if self.full else 'adapters'}"

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        """float32 for tensors that training changed, the base's type for the others."""
        return np.dtype(np.float32) if self._changed(tensor) else self.base.dtype(_base_tensor(self.base, tensor))

    def base_dtype(self, tensor: Tensor) -> np.dtype[Any]:
        """The base's type of this tensor, whether or not training changed it."""
        return self.base.dtype(_base_tensor(self.base, tensor))

    def read(self, tensor: Tensor) -> np.ndarray:
        """The merged tensor; a tensor that `trainable` holds as a whole is a view of it."""
        if tensor.name in _ROWS and self._changed(tensor):
            new, trained = (self.trainable.get(path) for path in _ROWS[tensor.name])
            if self.full:
                trained = self.trainable[tensor.path]
            base = self.base.read(_base_tensor(self.base, tensor)).astype(np.float32) if trained is None else trained
            return base if new is None else np.concatenate([base, new])
        if self.full:
            return to_hf(self.trainable, tensor)
        array = self.base.read(tensor)
        if not self._changed(tensor):
            return array
        array = array.astype(np.float32)
        a, b = self._factors(tensor)
        # (a b).T as b.T a.T, so that both sides of the sum have the same memory order.
        array += b.T @ (self.scale * a).T
        return array

    def merges(self, tensor: Tensor) -> bool:
        """Whether an adapter is merged into this tensor, or it is a layer's tensor after full fine-tuning."""
        if self.full:
            return tensor.name not in _ROWS
        return self._merge and f"{tensor.path.removesuffix('.kernel')}.a" in self.trainable

    def change(self, tensor: Tensor) -> float:
        """The sum of squares of what training added to this tensor; for an adapter, computed from its factors."""
        if self.full:
            added = (self.read(tensor) - self.base.read(tensor).astype(np.float32)).reshape(-1)
            return float(np.dot(added, added))
        a, b = (factor.astype(np.float64) for factor in self._factors(tensor))
        # |a b|^2 = sum((a'a) * (b b')): two products of [R, R].
        return float(self.scale) ** 2 * float(np.sum((a.T @ a) * (b @ b.T)))

    def _factors(self, tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
        path = tensor.path.removesuffix(".kernel")
        return self.trainable[f"{path}.a"][tensor.layer], self.trainable[f"{path}.b"][tensor.layer]

    def _changed(self, tensor: Tensor) -> bool:
        if tensor.name in _ROWS:
            return self.full or any(path in self.trainable for path in _ROWS[tensor.name])
        return self.merges(tensor)


def _base_tensor(base: OpenedModel, tensor: Tensor) -> Tensor:
    """The base's own tensor of the same name: its tables have fewer rows."""
    if tensor.name in _ROWS:
        return replace(tensor, shape=(base.config.vocab_size, base.config.hidden_size))
    return tensor


def adapter_rank(trainable: Mapping[str, np.ndarray]) -> int | None:
    """The rank R of the adapters, None if there are none."""
    return next((array.shape[-1] for path, array in sorted(trainable.items()) if path.endswith(".a")), None)


def _check(config: LlamaConfig, trained: Mapping[str, np.ndarray], *, full: bool) -> None:
    what = "what was trained does" if full else "the adapter does"
    expected: dict[str, tuple[int, ...]] = dict(weight_shapes(config)) if full else {}
    layers, hidden = config.num_hidden_layers, config.hidden_size
    rank = adapter_rank(trained) or 0
    for path, (size_in, size_out) in kernel_shapes(config).items():
        if not full and (f"{path}.a" in trained or f"{path}.b" in trained):
            expected[f"{path}.a"] = (layers, size_in, rank)
            expected[f"{path}.b"] = (layers, rank, size_out)
    rows = [len(trained[new]) for new, _ in _ROWS.values() if new in trained]
    for new, base in list(_ROWS.values())[: 1 if config.tie_word_embeddings else 2]:
        if rows:
            expected[new] = (rows[0], hidden)
        if not full and any(kept in trained for _, kept in _ROWS.values()):
            expected[base] = (config.vocab_size, hidden)
    problems = [f"{path} is missing" for path in sorted(expected.keys() - trained.keys())]
    problems += [f"{path} is not part of the model" for path in sorted(trained.keys() - expected.keys())]
    problems += [
        f"{path} has shape {list(trained[path].shape)}, expected {list(expected[path])}"
        for path in sorted(expected.keys() & trained.keys())
        if trained[path].shape != expected[path]
    ]
    if problems:
        raise UserError(f"{what} not fit the base model: {'; '.join(problems)}; was it trained on another?")
    for path, array in trained.items():
        require_finite(array, path, "what was trained" if full else "the adapter")
