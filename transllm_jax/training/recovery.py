"""Recovery KD by token: English answers are also, or only, held to the original model's own distributions.

TransLLM (arXiv 2405.13923) trains on the original's answers as text. Here the teacher is the same frozen weights with
the adapters off, inside the same compiled step, so no second model is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transllm_jax.choices import Recovery
from transllm_jax.model.layout import Layout
from transllm_jax.training.divergence import divergence

# tokens, positions, segment_ids, labels [B, T], weights [B, T] and sources [B], as in `training.step`.
Batch = dict[str, jax.Array]


class Teaching(NamedTuple):
    """Which rows of a batch the original model teaches, and how; constants of a compiled step.

    modes: how each source is trained on, by number. rows: at most this many rows of a batch, or of a part of it if it
    is computed in parts, come from a source that is taught. marker: the id that begins an English answer. The original
    does not know it, and reads the answer without it. weight: of a taught token, where one of text has 1.
    """

    modes: tuple[Recovery, ...]
    rows: int
    marker: int | None = None
    weight: float = 1.0

    @property
    def taught(self) -> tuple[bool, ...]:
        """By source: whether the original teaches it."""
        return tuple(mode != "sequence" for mode in self.modes)


class Weights(NamedTuple):
    """Weights [B, T] of the labels, and of the original's distributions."""

    labels: jax.Array
    taught: jax.Array


def weights_of(teaching: Teaching, batch: Batch, size: int) -> Weights:
    """How much each token counts in both losses. size: V of the base.

    A new token, and what follows one in its conversation other than the marker, is never taught: the original does not
    know it. So the marker itself is learned as a label in every mode.
    """
    tokens, segments, weights = batch["tokens"], batch["segment_ids"], batch["weights"]
    foreign = (tokens >= size) & (tokens != _marker(teaching))
    known = (_count_in_segment(foreign, batch["positions"], segments) == 0) & (batch["labels"] < size)

    def of_rows(flags: Sequence[bool]) -> jax.Array:
        return jnp.array(flags)[batch["sources"]][:, None]

    alone = of_rows([mode == "token" for mode in teaching.modes])
    return Weights(weights * ~(known & alone), teaching.weight * weights * (known & of_rows(teaching.taught)))


def original_view(teaching: Teaching, batch: Batch, rows: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """What the original model reads of rows [R], without the marker, and where it predicts.

    Returns tokens, positions and segment_ids [R, T], and int32 [R, T]: the place whose state predicts what each place
    predicts.

    The marker stays in its place as padding, which nothing attends to; positions after it are one lower. What the
    trained model predicts from the marker, the original predicts from the token before it.
    """
    tokens, positions, segments = (batch[name][rows] for name in ("tokens", "positions", "segment_ids"))
    is_marker = (tokens == _marker(teaching)) & (segments > 0)
    before = _count_in_segment(is_marker, positions, segments)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    read = {
        "tokens": jnp.where(is_marker, 0, tokens),
        "positions": jnp.where(is_marker, 0, positions - before),
        "segment_ids": jnp.where(is_marker, 0, segments),
    }
    return read, jnp.maximum(places - is_marker, 0)


def _marker(teaching: Teaching) -> int:
    return -1 if teaching.marker is None else teaching.marker


def _count_in_segment(flags: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
    """How many of the flags [R, T] are set in a place's segment, up to that place, int32 [R, T]."""
    counts = jnp.cumsum((flags & (segments > 0)).astype(jnp.int32), axis=1)
    before = jnp.where(positions == 0, counts - flags, 0)
    # Counts only grow along a row, so the largest so far is that of the segment's start.
    return counts - jax.lax.cummax(before, axis=1)


def recovery_loss(
    model: Any,
    teaching: Teaching,
    hidden: jax.Array,
    batch: Batch,
    weights: jax.Array,
    *,
    train_base: bool,
    train_new: bool,
) -> tuple[jax.Array, jax.Array]:
    """The sum of the tokens' weight * KL(original || trained) in nats, and each token's part, [B, T].

    model: the trained model, a `Llama`, in which the original is found with the adapters off. hidden [B, T, D]: its
    states. weights [B, T]: `Weights.taught`.
    """
    vocabulary, layout = model.vocabulary, model.layout
    # First the rows that are taught. There are at most `teaching.rows`, so the others need not be read again.
    taught = jnp.any(weights > 0, axis=1)
    rows = jnp.argsort(~taught, stable=True)[: teaching.rows]
    read, place = original_view(teaching, batch, rows)
    read = {name: _by_rows(layout, array) for name, array in read.items()}
    states = _original_states(jax.lax.stop_gradient(model), read, jnp.sum(taught))
    states = jnp.take_along_axis(states, place[..., None], axis=1)
    base, new = vocabulary.output_rows()
    total, losses = divergence(
        _by_rows(layout, hidden[rows]),
        _by_rows(layout, states),
        base,
        new,
        vocabulary.output_rows(adapters=False)[0] if vocabulary.train_base else None,
        weights[rows],
        train_base=train_base,
        train_new=train_new,
        padding=vocabulary.padding,
        layout=layout,
    )
    return total, jnp.zeros(hidden.shape[:2], losses.dtype).at[rows].add(losses, unique_indices=True)


def _original_states(model: Any, read: dict[str, jax.Array], count: jax.Array) -> jax.Array:
    """The original's states [R, T, D] of the rows that it reads; only those of the first `count` are needed."""

    def states(rows: dict[str, jax.Array]) -> jax.Array:
        return model(rows["tokens"], rows["positions"], rows["segment_ids"], adapters=False)

    if model.layout.platform != "cpu" or model.layout.mesh is not None:
        return states(read)

    # Batches differ in how many of their rows are taught, and on a CPU one row is enough work at once.
    def put(number: jax.Array, found: jax.Array) -> jax.Array:
        row = {name: jax.lax.dynamic_slice_in_dim(array, number, 1) for name, array in read.items()}
        return jax.lax.dynamic_update_slice_in_dim(found, states(row), number, axis=0)

    shape = jax.eval_shape(states, read)
    return jax.lax.fori_loop(0, count, put, jnp.zeros(shape.shape, shape.dtype))


def _by_rows(layout: Layout, array: jax.Array) -> jax.Array:
    return layout.constrain(array, "batch", *[None] * (array.ndim - 1))
