"""Shared by the tests of the model: small models in the middle of training, their logits and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import random_weights

from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import Split, abstract, assemble, load_frozen, merge
from transllm_jax.training.step import summed_loss

VOCAB, NEW, LENGTH = 61, 5, 24
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.25)


def base_split(config: LlamaConfig) -> Split:
    return assemble(config, load_frozen(config, random_weights(config)))


def random_trainable(
    config: LlamaConfig, lora: LoraConfig, new_rows: int, *, train_base: bool = False
) -> dict[str, np.ndarray]:
    """Adapters, new rows and, if asked for, base rows as in the middle of training: nothing is zero."""
    rng = np.random.default_rng(3)
    shapes = abstract(config, lora, new_rows, train_base=train_base).trainable
    return {path: 0.2 * rng.standard_normal(leaf.shape, dtype=np.float32) for path, leaf in sorted(shapes.items())}


def trained_split(
    config: LlamaConfig, lora: LoraConfig = LORA, new_rows: int = NEW, *, train_base: bool = False
) -> Split:
    frozen = load_frozen(config, random_weights(config))
    trainable = random_trainable(config, lora, new_rows, train_base=train_base)
    return assemble(config, frozen, lora=lora, trainable=trainable)


@partial(jax.jit, static_argnames=("structure", "adapters", "base_only"))
def _logits(
    trainable: Any, frozen: Any, rows: tuple[jax.Array, ...], *, structure: Any, adapters: bool, base_only: bool
) -> jax.Array:
    model = merge(structure, trainable, frozen)
    return model.vocabulary.logits(model(*rows, adapters=adapters), base_only=base_only, adapters=adapters)


def logits(split: Split, rows: tuple[np.ndarray, ...], *, adapters: bool = True, base_only: bool = False) -> np.ndarray:
    """float32 [B, T, V (+ n)] for rows of (tokens, positions, segment ids)."""
    device_rows = tuple(map(jnp.asarray, rows))
    return np.asarray(
        _logits(
            split.trainable,
            split.frozen,
            device_rows,
            structure=split.structure,
            adapters=adapters,
            base_only=base_only,
        )
    )


def whole_rows(vocab_size: int = VOCAB, seed: int = 1) -> tuple[np.ndarray, ...]:
    """Two rows of one document each."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (2, LENGTH), dtype=np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(tokens)


@partial(jax.jit, static_argnames="structure")
def gradients(trainable: Any, frozen: Any, batch: Any, *, structure: Any) -> tuple[Any, Any]:
    """The gradients of the summed loss, with respect to what trains and to what is frozen."""
    return jax.grad(lambda *trees: summed_loss(structure, *trees, batch), argnums=(0, 1))(trainable, frozen)


def merged_weights(config: LlamaConfig, lora: LoraConfig, trainable: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a plain model that computes the same as the base with these adapters and vocabulary rows."""
    merged = random_weights(config)
    for path in merged:
        if path.endswith(".kernel"):
            stem = path.removesuffix("kernel")
            merged[path] = merged[path] + lora.alpha / lora.rank * trainable[stem + "a"] @ trainable[stem + "b"]
    for table, rows in (("base", "new"), ("output_base", "output_new")):
        if f"vocabulary.{table}" in merged:
            base = trainable.get(f"vocabulary.{table}_trained", merged[f"vocabulary.{table}"])
            both = [base, trainable[f"vocabulary.{rows}"]]
            merged[f"vocabulary.{table}"] = np.concatenate(both)
    return merged


def training_batch(vocab_size: int) -> dict[str, jax.Array]:
    """Rows of two documents and padding, with every id of the vocabulary among tokens and labels."""
    order = np.random.default_rng(5).permutation(np.arange(3 * LENGTH) % vocab_size)[: 2 * LENGTH]
    tokens = order.reshape(2, LENGTH).astype(np.int32)
    tokens[:, :NEW] = np.arange(vocab_size - NEW, vocab_size)
    segments = np.repeat([1, 2, 0], [10, 11, 3])[None].repeat(2, axis=0).astype(np.int32)
    positions = np.concatenate([np.arange(10), np.arange(11), np.zeros(3)])[None].repeat(2, axis=0).astype(np.int32)
    labels = np.roll(tokens, -1, axis=1)
    weights = ((segments > 0) & (np.roll(segments, -1, axis=1) == segments)).astype(np.float32)
    batch = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segments,
        "labels": labels,
        "weights": weights,
    }
    return {field: jnp.asarray(values) for field, values in batch.items()}
