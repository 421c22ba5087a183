"""Choosing the next token. The settings are arrays by row, so that rows of different settings share one program."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transllm_jax.errors import UserError

# An int32 on the device.
MOST_K = 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy, the default, and then the filters and the seed do not matter.

    top_p: nucleus sampling (arXiv 1904.09751), the fewest likely tokens with this mass. top_k: this many likely tokens
    (0: all). min_p: tokens with at least this share of the most likely one's probability (arXiv 2407.01082).
    repetition_penalty: divides the positive logits of tokens that the text has already, prompt included, and multiplies
    the negative ones (arXiv 1909.05858); it also counts for greedy choices. The order is that of transformers: penalty,
    temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf")) or not 0 < self.top_p <= 1:
            raise UserError(
                f"sampling: temperature {self.temperature} must be at least 0, and top_p {self.top_p} in (0, 1]"
            )
        if not 0 <= self.top_k <= MOST_K or not 0 <= self.min_p <= 1 or not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"sampling: top_k {self.top_k} must be from 0 to {MOST_K}, min_p {self.min_p} in [0, 1] and "
                f"repetition_penalty {self.repetition_penalty} above 0"
            )

    def for_row(self, name: int | str) -> Sampling:
        """The same with a seed of its own for a row of a job, so that equal prompts get different samples."""
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        return replace(self, seed=int.from_bytes(digest))


GREEDY = Sampling()


class Draw(NamedTuple):
    """The settings of `Sampling` by row, [B] each; seed uint32 [B, 2]; scored: log-probabilities are wanted."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array
    scored: jax.Array

    @property
    def plain(self) -> jax.Array:
        """Which rows only take the most likely token, bool [B]."""
        return (self.temperature == 0) & (self.repetition_penalty == 1) & ~self.scored


def draw_of(rows: Sequence[Sampling], scored: Sequence[bool] | None = None) -> Draw:
    """The arrays of rows with these settings."""
    words = [((row.seed >> 32) & 0xFFFFFFFF, row.seed & 0xFFFFFFFF) for row in rows]
    arrays = (
        np.array([row.temperature for row in rows], np.float32),
        np.array([row.top_p for row in rows], np.float32),
        np.array([row.top_k for row in rows], np.int32),
        np.array([row.min_p for row in rows], np.float32),
        np.array([row.repetition_penalty for row in rows], np.float32),
        np.array(words, np.uint32).reshape(len(rows), 2),
        np.array([False] * len(rows) if scored is None else scored, bool),
    )
    return Draw(*arrays)  # type: ignore[arg-type]


def choose(
    logits: jax.Array, draw: Draw, numbers: jax.Array, seen: jax.Array, among: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """float32 logits [B, V] -> (ids [B], their log-probabilities [B]).

    numbers [B]: how many tokens each row's answer has already. The random key is a function of the row's seed and of
    this number alone: a sample does not depend on the rows that share its batch. seen, bool [B, V]: the tokens that a
    row's text has, for the repetition penalty. among, bool [B]: the rows that matter. If all of these are greedy, only
    the most likely token is looked for. Log-probabilities are those of the model itself, before penalty, temperature
    and filters, and 0 where no row wants any.
    """

    def simply() -> tuple[jax.Array, jax.Array]:
        return _likeliest(logits), jnp.zeros(len(logits))

    def carefully() -> tuple[jax.Array, jax.Array]:
        penalty = draw.repetition_penalty[:, None]
        scores = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
        likely = _likeliest(scores)
        scores = scores / jnp.where(draw.temperature > 0, draw.temperature, 1)[:, None]
        filtering = (draw.top_p < 1) | (draw.top_k > 0) | (draw.min_p > 0)
        scores = jax.lax.cond(jnp.any(filtering & among), lambda: _filtered(scores, draw), lambda: scores)

        def one(seed: jax.Array, number: jax.Array, scores: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), number)
            return jax.random.categorical(key, scores)

        ids = jnp.where(draw.temperature > 0, jax.vmap(one)(draw.seed, numbers, scores), likely).astype(jnp.int32)
        chosen = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
        return ids, chosen - jax.nn.logsumexp(logits, axis=-1)

    return jax.lax.cond(jnp.any(~draw.plain & among), carefully, simply)


def _likeliest(scores: jax.Array) -> jax.Array:
    """The id of each row's highest score [B, V], the first of equal ones.

    Like argmax, which is slow on a CPU: of 32 x 49,152 scores it took 7.4 ms of a core, and this takes 1.4 ms.
    """
    size = scores.shape[-1]
    is_highest = scores == jnp.max(scores, axis=-1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(is_highest, jnp.arange(size), size), axis=-1), size - 1).astype(jnp.int32)


def _filtered(scores: jax.Array, draw: Draw) -> jax.Array:
    """Scores [B, V] with -inf for tokens that top-k, top-p or min-p leaves out. Equal scores are treated alike."""
    size = scores.shape[-1]
    ranked = jnp.sort(scores, axis=-1, descending=True)
    k = jnp.where(draw.top_k > 0, jnp.minimum(draw.top_k, size), size)[:, None]
    of_k = jnp.take_along_axis(ranked, k - 1, axis=-1)
    # The mass is that of the tokens that top-k left.
    shares = jax.nn.softmax(jnp.where(ranked < of_k, -jnp.inf, ranked), axis=-1)
    # The most likely token is always kept: the mass before it is 0.
    kept = jnp.sum(jnp.cumsum(shares, axis=-1) - shares < draw.top_p[:, None], axis=-1, keepdims=True)
    kept = jnp.maximum(kept, 1)  # also where a tiny top_p is 0 in float32
    of_p = jnp.where(draw.top_p[:, None] < 1, jnp.take_along_axis(ranked, kept - 1, axis=-1), -jnp.inf)
    of_min = jnp.where(draw.min_p > 0, ranked[:, 0] + jnp.log(draw.min_p), -jnp.inf)[:, None]
    return jnp.where(scores < jnp.maximum(jnp.maximum(of_k, of_p), of_min), -jnp.inf, scores)
