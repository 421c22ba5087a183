"""The forward pass with one layer in memory at a time: what a model says of a prompt, however large the model is."""

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

# A layer's number -> its arrays without the leading axis, path under `blocks.` -> array.
ReadLayer = Callable[[int], dict[str, np.ndarray]]
# Rows of output logits at once.
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

    `read_layer` is asked for one layer after the other, with adapters `.a` and `.b` where `lora` names targets;
    `output_rows` for the output table [V, D] at the end. All is computed in float32.
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
        # Waited for, so that two layers are never held at once.
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
