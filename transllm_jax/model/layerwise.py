"""The forward pass with one layer in memory at a time: the logits of a prompt for models larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transllm_jax.model.attention import attend, causal_mask
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.llama import Block, RMSNorm
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import nested
from transllm_jax.model.rope import rotary_angles

# Maps a layer's number to its arrays, without the axis of layers: path under `blocks.` -> array.
ReadLayer = Callable[[int], dict[str, np.ndarray]]
# How many rows of the output table are multiplied at once.
_ROWS = 16384


def logits_by_layer(
    config: LlamaConfig,
    embedded: np.ndarray,
    read_layer: ReadLayer,
    final_scale: np.ndarray,
    output_rows: Callable[[], np.ndarray],
    lora: LoraConfig | None = None,
) -> np.ndarray:
    """Float32 logits [T, V] of one text whose embedded tokens are [T, D].

    `read_layer` is called once for each layer, in order; it gives adapters `.a` and `.b` for the targets of `lora` too.
    `output_rows` is called at the end, for the output table [V, D]. Everything is computed in float32.
    """
    structure, _ = nnx.split(nnx.eval_shape(lambda: Block(config, lora, rngs=nnx.Rngs(0))))
    length = embedded.shape[0]
    positions = jnp.arange(length)[None]
    angles = rotary_angles(
        positions, config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
    )
    mask = causal_mask(jnp.ones((1, length), jnp.int32), config.sliding_window)
    x = jnp.asarray(embedded[None], jnp.float32)
    for layer in range(config.num_hidden_layers):
        arrays = {path: np.asarray(array, np.float32) for path, array in read_layer(layer).items()}
        # Wait for the result, so that two layers are never in memory at once.
        x = _layer(structure, arrays, x, angles, mask, lora is not None).block_until_ready()
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.scale.set_value(jnp.asarray(final_scale, jnp.float32))
    hidden = np.asarray(norm(x)[0])
    table = output_rows()
    parts = [hidden @ table[at : at + _ROWS].astype(np.float32).T for at in range(0, len(table), _ROWS)]
    return np.concatenate(parts, axis=1)


@partial(jax.jit, static_argnames=("structure", "adapters"))
def _layer(
    structure: Any,
    arrays: dict[str, jax.Array],
    x: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    adapters: bool,
) -> jax.Array:
    block: Block = nnx.merge(structure, nested(arrays))
    out, _ = block(x, angles, lambda q, k, v: (attend(q, k, v, mask), None), adapters=adapters)
    return out
