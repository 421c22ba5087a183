"""The one table that maps tensor names of Hugging Face's LLaMA family to our weights.

Hugging Face stores a linear layer as `[out, in]`, one tensor for each layer. We store its kernel as `[in, out]`, with
all layers stacked on axis 0 (`y = x @ kernel[layer]`). Everything else is the same array under another name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from transllm_jax.model.config import LlamaConfig

_LAYER = "model.layers.{layer}."

# Our path of a linear layer -> Hugging Face's name in the layer.
KERNELS = {
    "blocks.attention.q": "self_attn.q_proj",
    "blocks.attention.k": "self_attn.k_proj",
    "blocks.attention.v": "self_attn.v_proj",
    "blocks.attention.o": "self_attn.o_proj",
    "blocks.mlp.gate": "mlp.gate_proj",
    "blocks.mlp.up": "mlp.up_proj",
    "blocks.mlp.down": "mlp.down_proj",
}

_NORMS = {
    "blocks.attention_norm.scale": "input_layernorm",
    "blocks.mlp_norm.scale": "post_attention_layernorm",
}
# Over one head's size H, in Qwen3.
_HEAD_NORMS = {
    "blocks.attention.q_norm.scale": "self_attn.q_norm",
    "blocks.attention.k_norm.scale": "self_attn.k_norm",
}

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"

# Buffers in old checkpoints, which are not read because rope_theta determines them.
DERIVED = re.compile(r"^model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint, and the weight of ours that holds it.

    `shape` is Hugging Face's. `layer` is the index on axis 0 of our weight, or None if it is not stacked.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    layer: int | None = None
    transposed: bool = False


def kernel_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The shape `(in, out)` of each linear layer, by our path without `.kernel`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "blocks.attention.q": (hidden, queries),
        "blocks.attention.k": (hidden, keys),
        "blocks.attention.v": (hidden, keys),
        "blocks.attention.o": (queries, hidden),
        "blocks.mlp.gate": (hidden, inner),
        "blocks.mlp.up": (hidden, inner),
        "blocks.mlp.down": (inner, hidden),
    }


def tensors(config: LlamaConfig) -> list[Tensor]:
    """Every tensor of a checkpoint with this config, in the order in which we write them."""
    vocabulary = (config.vocab_size, config.hidden_size)
    table = [Tensor(EMBEDDING, "vocabulary.base", vocabulary)]
    shapes = kernel_shapes(config)
    for layer in range(config.num_hidden_layers):
        prefix = _LAYER.format(layer=layer)
        for path, name in _NORMS.items():
            table.append(Tensor(f"{prefix}{name}.weight", path, (config.hidden_size,), layer))
        for path, name in KERNELS.items():
            shape_in, shape_out = shapes[path]
            table.append(
                Tensor(f"{prefix}{name}.weight", f"{path}.kernel", (shape_out, shape_in), layer, transposed=True)
            )
            if path.rpartition(".")[2] in config.biases:
                table.append(Tensor(f"{prefix}{name}.bias", f"{path}.bias", (shape_out,), layer))
        for path, name in _HEAD_NORMS.items() if config.qk_norm else ():
            table.append(Tensor(f"{prefix}{name}.weight", path, (config.head_dim,), layer))
    table.append(Tensor("model.norm.weight", "final_norm.scale", (config.hidden_size,)))
    if not config.tie_word_embeddings:
        table.append(Tensor(OUTPUT, "vocabulary.output_base", vocabulary))
    return table


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of our weights: `{"blocks.attention.q.kernel": (L, D, N * H), ...}`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors(config):
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        shapes[tensor.path] = shape if tensor.layer is None else (config.num_hidden_layers, *shape)
    return shapes


def to_hf(weights: dict[str, np.ndarray], tensor: Tensor) -> np.ndarray:
    """Hugging Face's tensor, with `tensor.shape`, as a view of our weights."""
    array = weights[tensor.path]
    if tensor.layer is not None:
        array = array[tensor.layer]
    return array.T if tensor.transposed else array


def collapse(names: Iterable[str]) -> str:
    """All names on one line; names that differ only in the layer's number share an entry.

    >>> collapse(["model.layers.0.a", "model.layers.1.a", "b"])
    'b, model.layers.{0,1}.a'
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        match = re.match(r"^(model\.layers|blk)\.(\d+)\.(.*)$", name, re.DOTALL)
        key = f"{match[1]}.@.{match[3]}" if match else name
        groups.setdefault(key, []).extend([int(match[2])] if match else [])
    out = []
    for key, layers in sorted(groups.items()):
        layers = sorted(set(layers))
        text = ",".join(map(str, layers))
        out.append(key.replace("@", text if len(layers) == 1 else "{" + text + "}", 1) if layers else key)
    return ", ".join(out)
