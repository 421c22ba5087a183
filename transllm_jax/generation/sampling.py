"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from transllm_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy, the default; otherwise nucleus sampling (arXiv 1904.09751) with mass `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf")) or not 0 < self.top_p <= 1:
            raise UserError(
                f"sampling: temperature {self.temperature} must be at least 0, and top_p {self.top_p} in (0, 1]"
            )


GREEDY = Sampling()


def choose(logits: jax.Array, sampling: Sampling, rows: jax.Array, step: jax.Array) -> jax.Array:
    """float32 logits [B, V] -> ids [B].

    The random key is a function of (seed, row, step), where `rows` [B] are row numbers in the whole job: a sample does
    not depend on which rows share its batch.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
        # The most likely token is always kept: the mass before it is 0.
        kept = jnp.sum(mass - jax.nn.softmax(ranked, axis=-1) < sampling.top_p, axis=-1)
        threshold = jnp.take_along_axis(ranked, kept[:, None] - 1, axis=-1)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)

    def draw(row: jax.Array, scores: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), step)
        return jax.random.categorical(key, scores)

    return jax.vmap(draw)(rows, logits).astype(jnp.int32)
