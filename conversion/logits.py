"""The logits of a prompt from an opened checkpoint, which is read one layer at a time."""

from __future__ import annotations

import numpy as np

from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.names import EMBEDDING, OUTPUT, Tensor, tensors
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.model.layerwise import logits_by_layer
from transllm_jax.model.lora import LoraConfig


def logits_of(model: OpenedModel, tokens: list[int], lora: LoraConfig | None = None) -> np.ndarray:
    """Float32 logits [T, V] of one text, [T] ids. Memory: one layer, or one vocabulary table.

    With `lora`, `model` is a `Merged`, and its adapters are computed separately, as in training, instead of being
    merged into the kernels.
    """
    table = tensors(model.config)
    named = {tensor.name: tensor for tensor in table}
    layers: dict[int, list[Tensor]] = {}
    for tensor in table:
        if tensor.layer is not None:
            layers.setdefault(tensor.layer, []).append(tensor)
    base = model
    adapters: dict[str, np.ndarray] = {}
    if lora is not None:
        assert isinstance(model, Merged)
        base = model.base
        adapters = {path: array for path, array in model.trainable.items() if path.startswith("blocks.")}

    def read_layer(layer: int) -> dict[str, np.ndarray]:
        arrays = {}
        for tensor in layers[layer]:
            array = base.read(tensor)
            arrays[tensor.path.removeprefix("blocks.")] = array.T if tensor.transposed else array
        arrays |= {path.removeprefix("blocks."): array[layer] for path, array in adapters.items()}
        return arrays

    embedding = model.read(named[EMBEDDING])
    embedded = embedding[tokens].astype(np.float32)
    del embedding
    return logits_by_layer(
        model.config,
        embedded,
        read_layer,
        model.read(named["model.norm.weight"]),
        lambda: model.read(named[EMBEDDING if model.config.tie_word_embeddings else OUTPUT]),
        lora,
    )
