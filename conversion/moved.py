"""What was trained, put onto a model in part, or onto another model of the same shape.

Chat Vector (arXiv 2310.04799) adds what was trained on a base model to the chat model that was made from it. ElChat
(arXiv 2412.11704) merges a chat model that was trained on text with what it was before, and copies the rows of its
special tokens back. Both are done to adapters: W + factor * (a @ b).T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from transllm_jax.conversion.names import EMBEDDING, OUTPUT, tensors, weight_shapes
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.errors import UserError

_BASE_ROWS = {"vocabulary.base_trained": EMBEDDING, "vocabulary.output_base_trained": OUTPUT}


def parse_factors(text: str) -> list[float]:
    """Factors as `0.5`, or one for each layer, as `0.2,0.4,0.6`. Raises UserError."""
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        factors = []
    if not factors or not np.isfinite(factors).all():
        raise UserError(f"the adapter's scale {text!r} is not a number, nor one for each layer, such as 0.5,0.6,0.7")
    return factors


def moved(
    trainable: Mapping[str, np.ndarray], base: OpenedModel, factors: Sequence[float], special: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """What was trained, as it is put onto the model `base`, by our paths (see `Merged`).

    factors: what adapters are multiplied with, one for all layers or one for each. Trained rows of the base's own
    tokens move by the mean of them; those with the ids `special` are the base's. New rows stay as they are. Raises
    UserError for another number of factors, and after full fine-tuning, which has no adapters.
    """
    if not trainable.keys().isdisjoint(weight_shapes(base.config)):
        raise UserError("all weights were trained (lora: none), so there are no adapters to scale or to move")
    layers = base.config.num_hidden_layers
    if len(factors) not in (1, layers):
        raise UserError(f"the adapter's scale has {len(factors)} numbers; give one, or one for each of {layers} layers")
    by_layer = np.broadcast_to(np.asarray(factors, np.float32), (layers,))
    found: dict[str, np.ndarray] = {}
    for path, array in trainable.items():
        if path.endswith(".b"):
            found[path] = np.asarray(array, np.float32) * by_layer[:, None, None]
        elif path in _BASE_ROWS:
            tensor = next(tensor for tensor in tensors(base.config) if tensor.name == _BASE_ROWS[path])
            rows = base.read(tensor).astype(np.float32)
            found[path] = rows + np.float32(by_layer.mean()) * (np.asarray(array, np.float32) - rows)
            found[path][list(special)] = rows[list(special)]
        else:
            found[path] = np.asarray(array, np.float32)
    return found
