"""The vocabulary's tables as two blocks: frozen base rows and trainable new rows, never concatenated in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import NewRows


class Vocabulary(nnx.Module):
    """Embedding and output rows. Ids below V are base rows; ids from V on are new rows.

    base [V, D], new [n, D]; an untied model has output_base and output_new of the same shapes. A tied model stays
    tied: one set of new rows serves both ends.
    """

    def __init__(self, config: LlamaConfig, new_rows: int, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32) -> None:
        shape = (config.vocab_size, config.hidden_size)
        std = config.hidden_size**-0.5
        self.base = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * std)
        self.tied = config.tie_word_embeddings
        self.new_rows = new_rows
        if not self.tied:
            self.output_base = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * std)
        if new_rows:
            self.new = NewRows(jnp.zeros((new_rows, config.hidden_size), jnp.float32))
            if not self.tied:
                self.output_new = NewRows(jnp.zeros((new_rows, config.hidden_size), jnp.float32))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[B, T] ids -> [B, T, D]."""
        base = jax.lax.stop_gradient(self.base[...])
        if not self.new_rows:
            return base[tokens]
        size = base.shape[0]
        known = base[jnp.minimum(tokens, size - 1)]
        added = self.new[...].astype(base.dtype)[jnp.maximum(tokens - size, 0)]
        return jnp.where((tokens < size)[..., None], known, added)

    def output_tables(self) -> tuple[jax.Array, jax.Array | None]:
        """The output rows: base [V, D] and new [n, D] (None without new rows), in the base's dtype."""
        base = self.base[...] if self.tied else self.output_base[...]
        if not self.new_rows:
            return base, None
        new = self.new[...] if self.tied else self.output_new[...]
        return base, new.astype(base.dtype)

    def logits(self, hidden: jax.Array, *, base_only: bool = False) -> jax.Array:
        """[..., D] -> float32 [..., V + n], or [..., V] with `base_only`: the original model's vocabulary."""
        base, new = self.output_tables()
        scores = jnp.einsum("...D,VD->...V", hidden, base, preferred_element_type=jnp.float32)
        if new is None or base_only:
            return scores
        added = jnp.einsum("...D,VD->...V", hidden, new, preferred_element_type=jnp.float32)
        return jnp.concatenate([scores, added], axis=-1)
