"""The vocabulary's tables as two blocks: base rows and new rows, never concatenated in training.

New rows train. Base rows are frozen; where they are to train too, trainable copies stand beside the frozen ones and are
used in their place while the adapters are on. With the adapters off it is the original vocabulary, bit for bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import NewRows


class Vocabulary(nnx.Module):
    """Embedding and output rows. Ids below V are base rows; ids from V on are new rows.

    base [V, D], new [n, D], and with `train_base` base_trained [V, D] in float32; an untied model has output_base,
    output_new and output_base_trained of the same shapes. A tied model stays tied: one set of new rows, and one of
    trained base rows, serves both ends.
    """

    def __init__(
        self,
        config: LlamaConfig,
        new_rows: int,
        *,
        train_base: bool = False,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
    ) -> None:
        shape = (config.vocab_size, config.hidden_size)
        std = config.hidden_size**-0.5
        self.base = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * std)
        self.tied = config.tie_word_embeddings
        self.new_rows = new_rows
        self.train_base = train_base
        if not self.tied:
            self.output_base = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * std)
        if new_rows:
            self.new = NewRows(jnp.zeros((new_rows, config.hidden_size), jnp.float32))
            if not self.tied:
                self.output_new = NewRows(jnp.zeros((new_rows, config.hidden_size), jnp.float32))
        if train_base:
            self.base_trained = NewRows(self.base[...].astype(jnp.float32))
            if not self.tied:
                self.output_base_trained = NewRows(self.output_base[...].astype(jnp.float32))

    def embed(self, tokens: jax.Array, *, adapters: bool = True) -> jax.Array:
        """[B, T] ids -> [B, T, D]; `adapters=False` takes the frozen base rows (new ids have new rows still)."""
        base = jax.lax.stop_gradient(self.base[...])
        # Looked up in float32 and then rounded, so that the gradients of a row's places are summed in float32.
        table = self.base_trained[...] if self.train_base and adapters else base
        if not self.new_rows:
            return table[tokens].astype(base.dtype)
        size = base.shape[0]
        known = table[jnp.minimum(tokens, size - 1)].astype(base.dtype)
        added = self.new[...].astype(base.dtype)[jnp.maximum(tokens - size, 0)]
        return jnp.where((tokens < size)[..., None], known, added)

    def output_tables(self, *, adapters: bool = True) -> tuple[jax.Array, jax.Array | None]:
        """The output rows: base [V, D] and new [n, D] (None without new rows), in the base's dtype.

        With `adapters=False` the base rows are the frozen ones, whether or not there are trained ones.
        """
        base = self.base[...] if self.tied else self.output_base[...]
        if self.train_base and adapters:
            trained = self.base_trained[...] if self.tied else self.output_base_trained[...]
            base = trained.astype(base.dtype)
        if not self.new_rows:
            return base, None
        new = self.new[...] if self.tied else self.output_new[...]
        return base, new.astype(base.dtype)

    def logits(self, hidden: jax.Array, *, base_only: bool = False, adapters: bool = True) -> jax.Array:
        """[..., D] -> float32 [..., V + n], or [..., V] with `base_only`: the original model's vocabulary.

        With `adapters=False` base rows are the frozen ones; with both it is the original model's output.
        """
        base, new = self.output_tables(adapters=adapters)
        scores = jnp.einsum("...D,VD->...V", hidden, base, preferred_element_type=jnp.float32)
        if new is None or base_only:
            return scores
        added = jnp.einsum("...D,VD->...V", hidden, new, preferred_element_type=jnp.float32)
        return jnp.concatenate([scores, added], axis=-1)
