"""The vocabulary's tables as two blocks, base rows and new rows, which are never concatenated in training.

New rows are trainable. Base rows are frozen; if they are to train too, trainable copies of them are used while the
adapters are on. With the adapters off it is the original vocabulary, bit for bit. (Full fine-tuning needs no copies:
there the base rows themselves are trainable float32 arrays.)

Rows without a token are padding, and are never chosen. The base's padding stays in its softmax, because the original
model has it there; padding after the new rows, which only rounds the table up, gets no probability.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import SINGLE, Layout
from transllm_jax.model.lora import NewRows

# Ranges [start, stop) of ids that have no token.
Padding = tuple[tuple[int, int], ...]


def padding_of(ids: Iterable[int], rows: int) -> Padding:
    """The ranges of a table's rows that have no token; `ids` are the tokenizer's."""
    edges = sorted({number for number in ids if number < rows} | {-1, rows})
    return tuple((last + 1, following) for last, following in pairwise(edges) if following > last + 1)


def _is_padding(padding: Padding, first: int, size: int) -> jax.Array | None:
    """Which of the ids in [first, first + size) have no token, bool [size]; None if all have one."""
    ranges = [(start, stop) for start, stop in padding if start < first + size and stop > first]
    if not ranges:
        return None
    ids = jnp.arange(first, first + size)
    return jnp.stack([(ids >= start) & (ids < stop) for start, stop in ranges]).any(axis=0)


def mask_padding(scores: jax.Array, padding: Padding, first: int = 0) -> jax.Array:
    """Logits [..., n] of the ids from `first` on, with -inf for padding."""
    is_padding = _is_padding(padding, first, scores.shape[-1])
    return scores if is_padding is None else jnp.where(is_padding, -jnp.inf, scores)


def zero_padding(changes: jax.Array, padding: Padding) -> jax.Array:
    """Changes of base rows [V, D], with 0 for padding."""
    is_padding = _is_padding(padding, 0, len(changes))
    return changes if is_padding is None else jnp.where(is_padding[:, None], 0, changes)


class Vocabulary(nnx.Module):
    """Embedding and output rows. Ids below V are base rows; ids from V on are new rows.

    Arrays: base [V, D], new [n, D], and with `train_base` base_trained [V, D] in float32; an untied model also has
    output_base, output_new and output_base_trained of the same shapes. A tied model stays tied: input and output share
    one set of new rows, and one of trained base rows. `padding` is the ranges of ids without a token. `dtype` is that
    of the frozen rows and of the computation, whatever the dtype of the trainable rows.
    """

    def __init__(
        self,
        config: LlamaConfig,
        new_rows: int,
        *,
        train_base: bool = False,
        padding: Padding = (),
        layout: Layout = SINGLE,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        shape = (config.vocab_size, config.hidden_size)
        std = config.hidden_size**-0.5
        self.base = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * std)
        self.tied = config.tie_word_embeddings
        self.new_rows = new_rows
        self.train_base = train_base
        self.padding = padding
        self.layout = layout
        self.dtype = np.dtype(dtype)
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
        """Ids [B, T] -> [B, T, D]; `adapters=False` takes the frozen base rows (new ids still take new rows)."""
        # Trainable rows are looked up in float32 and rounded afterwards, so that the gradients of a row's occurrences
        # are summed in float32.
        table = self.base_trained[...] if self.train_base and adapters else self.base[...]
        # Each device looks up its part of D for all rows of its group, so that the table's gradient is summed where the
        # table is stored. The states then change from parts of D to parts of the batch, one axis at a time.
        tokens = self.layout.constrain(tokens, "batch_data", None)
        if not self.new_rows:
            x = self._rows(table, tokens)
        else:
            size = table.shape[0]
            known = self._rows(table, jnp.minimum(tokens, size - 1))
            added = self._rows(self.new[...], jnp.maximum(tokens - size, 0))
            x = jnp.where((tokens < size)[..., None], known, added)
        return self.layout.residual(self.layout.constrain(x, "batch_data", "length", "embed"))

    def _rows(self, table: jax.Array, indices: jax.Array) -> jax.Array:
        return self.layout.constrain(table[indices].astype(self.dtype), "batch_data", None, "embed_table")

    def output_rows(self, *, adapters: bool = True) -> tuple[jax.Array, jax.Array | None]:
        """The output rows as they are stored: base [V, D] and new [n, D] (None without new rows).

        `adapters=False` gives the frozen base rows, even if there are trained ones.
        """
        base = self.base[...] if self.tied else self.output_base[...]
        if self.train_base and adapters:
            base = self.base_trained[...] if self.tied else self.output_base_trained[...]
        if not self.new_rows:
            return base, None
        return base, self.new[...] if self.tied else self.output_new[...]

    def output_tables(self, *, adapters: bool = True) -> tuple[jax.Array, jax.Array | None]:
        """`output_rows` in the model's dtype."""
        base, new = self.output_rows(adapters=adapters)
        return base.astype(self.dtype), None if new is None else new.astype(self.dtype)

    def logits(self, hidden: jax.Array, *, base_only: bool = False, adapters: bool = True) -> jax.Array:
        """[..., D] -> float32 [..., V + n], or [..., V] with `base_only`: the original model's vocabulary.

        `adapters=False` takes the frozen base rows; with `base_only` too it is the original model's output. Padding
        after the new rows is -inf.
        """
        base, new = self.output_tables(adapters=adapters)
        scores = jnp.einsum("...D,VD->...V", hidden, base, preferred_element_type=jnp.float32)
        if new is None or base_only:
            return scores
        added = jnp.einsum("...D,VD->...V", hidden, new, preferred_element_type=jnp.float32)
        return jnp.concatenate([scores, mask_padding(added, self.padding, base.shape[0])], axis=-1)

    def choices(self, hidden: jax.Array, *, base_only: bool = False, adapters: bool = True) -> jax.Array:
        """`logits` to choose a token from: -inf for every id without a token."""
        return mask_padding(self.logits(hidden, base_only=base_only, adapters=adapters), self.padding)
