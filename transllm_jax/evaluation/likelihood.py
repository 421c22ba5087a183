"""Likelihood measures: bits per byte of text, and KL divergence from the original model on the original's answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transllm_jax.data.rows.examples import Example, make_example, split_example
from transllm_jax.data.rows.packing import fill, pack, plan
from transllm_jax.generation.engine import padded_batch_size
from transllm_jax.model.parameters import Flat, Split, merge
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import on_host
from transllm_jax.training.step import Batch, batch_losses, hidden_states, summed_loss

# Answer tokens whose distributions over the vocabulary are in memory at once.
CHUNK = 128
# Rows are as long as the longest answer, rounded up to a multiple of this: few shapes to compile, little padding.
LENGTH_MULTIPLE = 64


# (structure, trainable arrays, frozen arrays, batch) -> the sum of -log p over the batch's weighted tokens, in nats.
nats = jax.jit(summed_loss, static_argnames=("structure",))


@partial(jax.jit, static_argnames=("structure",))
def token_nats(structure: Any, trainable: Flat, frozen: Flat, batch: Batch) -> jax.Array:
    """Each token's weight * -log p, in nats, [B, T]."""
    return batch_losses(structure, trainable, frozen, batch)[1]


def bits_per_byte(
    split: Split,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    length: int,
    batch_size: int,
    between: Callable[[], None] = lambda: None,
) -> float:
    """Bits per UTF-8 byte of the documents, comparable across tokenizers.

    Exactly the tokens of the text count; a document's first token is predicted from the end-of-document token.
    Documents longer than `length` tokens are split. `between` is called after each batch; it may raise to stop there.
    """
    rows = pack([piece for pieces in _pieces(tokenizer, documents, length) for piece in pieces], length)
    batch_size = padded_batch_size(batch_size, split.layout)
    total = 0.0
    for first in range(0, len(rows), batch_size):
        batch = rows.batch(first, batch_size)
        total += float(nats(split.structure, split.trainable, split.frozen, batch))
        between()
    return total / math.log(2) / sum(len(text.encode()) for text in documents)


def document_nats(
    split: Split,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    length: int,
    batch_size: int,
    between: Callable[[], None] = lambda: None,
) -> list[float]:
    """The sum of -log p over the tokens of each document, in nats, as `bits_per_byte` counts them."""
    pieces = _pieces(tokenizer, documents, length)
    examples = [piece for own in pieces for piece in own]
    document_of = np.repeat(np.arange(len(documents)), [len(own) for own in pieces])
    planned = plan([len(piece) for piece in examples], length)
    rows = fill(examples, planned, length)
    batch_size = padded_batch_size(batch_size, split.layout)
    found = np.zeros(len(documents))
    for first in range(0, len(rows), batch_size):
        batch = rows.batch(first, batch_size)
        losses = on_host(token_nats(split.structure, split.trainable, split.frozen, batch))
        for row, members in enumerate(planned[first : first + batch_size]):
            sums = np.bincount(batch["segment_ids"][row], losses[row], minlength=len(members) + 1)
            np.add.at(found, document_of[members], sums[1 : len(members) + 1])
        between()
    return [float(nats) for nats in found]


def _pieces(tokenizer: Tokenizer, documents: Sequence[str], length: int) -> list[list[Example]]:
    """The examples of each document: its first token is predicted from the end-of-document token."""
    start = [tokenizer.document_end_id, *tokenizer.bos_ids]
    return [
        split_example(make_example([*start, *ids], [0] * len(start) + [1] * len(ids)), length)
        for ids in tokenizer.encode_batch(documents)
    ]


@partial(jax.jit, static_argnames=("structures",))
def _divergence(
    teacher: tuple[Flat, Flat],
    student: tuple[Flat, Flat],
    teacher_hidden: jax.Array,
    student_hidden: jax.Array,
    *,
    structures: tuple[Any, Any],
) -> tuple[jax.Array, jax.Array]:
    """KL(teacher || student) of each token, [C], over the teacher's vocabulary; mass on new tokens counts as lost.

    And whether both find the same token likeliest, bool [C].
    """
    teacher_logits = merge(structures[0], *teacher).vocabulary.logits(teacher_hidden, base_only=True, adapters=False)
    student_logits = merge(structures[1], *student).vocabulary.logits(student_hidden)
    p = jax.nn.log_softmax(teacher_logits)
    q = jax.nn.log_softmax(student_logits)
    same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q[:, : teacher_logits.shape[-1]]), axis=-1), same


# The ids of a prompt, and of its answer with the end token.
AnswerIds = tuple[list[int], list[int]]


class Teacher:
    """The original model and its own English answers. Its hidden states on them are computed once, for all points.

    `base` is the original model, or any model that contains it: what was trained is switched off. `between` is called
    after each batch; it may raise to stop there.
    """

    def __init__(
        self,
        base: Split,
        answers: Sequence[AnswerIds],
        *,
        batch_size: int,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.base, self.answers, self.batch_size, self.between = base, answers, batch_size, between

    @cached_property
    def states(self) -> np.ndarray:
        """The teacher's hidden states that predict the answers' tokens, [tokens, D]."""
        return self.states_of(self.base, [], adapters=False)

    def divergence(self, split: Split, prefix: Sequence[int] = ()) -> float:
        """Mean KL per token, in nats, from the original model to `split` on the original's own answers.

        `prefix` is put before each answer, as this model's format has it (`<RESPONSE>` after stage `transfer`, nothing
        earlier), and does not count.
        """
        values, _ = self.by_token(split, prefix)
        return float(values.mean(dtype=np.float64))

    def by_token(self, split: Split, prefix: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """As `divergence`, for each token of the answers, in their order: the KL, float32 [tokens], and whether both
        models find the same token likeliest, bool [tokens]."""
        states = self.states_of(split, prefix, adapters=True)
        found = []
        for start in range(0, len(states), CHUNK):
            teacher, student = self.states[start : start + CHUNK], states[start : start + CHUNK]
            padding = [(0, CHUNK - len(teacher)), (0, 0)]
            values, same = _divergence(
                (self.base.trainable, self.base.frozen),
                (split.trainable, split.frozen),
                np.pad(teacher, padding),
                np.pad(student, padding),
                structures=(self.base.structure, split.structure),
            )
            found.append((on_host(values)[: len(teacher)], on_host(same)[: len(teacher)]))
        return np.concatenate([values for values, _ in found]), np.concatenate([same for _, same in found])

    def states_of(self, split: Split, prefix: Sequence[int], *, adapters: bool) -> np.ndarray:
        """The hidden states that predict the answers' tokens, in the order of the answers, [tokens, D]."""
        longest = max(len(prompt) + len(answer) for prompt, answer in self.answers) + len(prefix)
        length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        size = padded_batch_size(self.batch_size, split.layout)
        kept = []
        for first in range(0, len(self.answers), size):
            batch = self.answers[first : first + size]
            states, places = _states(split, batch, prefix, length, size, adapters=adapters)
            kept.append(states[np.concatenate(places)])
            self.between()
        return np.concatenate(kept)


def _states(
    split: Split, batch: Sequence[AnswerIds], prefix: Sequence[int], length: int, size: int, *, adapters: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Hidden states [B * T, D], and for each row the indices of those that predict its answer's tokens."""
    tokens = np.zeros((size, length), np.int32)
    segments = np.zeros((size, length), np.int32)
    places = []
    for row, (prompt, answer) in enumerate(batch):
        ids = [*prompt, *prefix, *answer]
        tokens[row, : len(ids)] = ids
        segments[row, : len(ids)] = 1
        start = len(prompt) + len(prefix) - 1
        places.append(row * length + np.arange(start, len(ids) - 1))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    arrays = {"tokens": tokens, "positions": positions, "segment_ids": segments}
    hidden = hidden_states(split.structure, split.trainable, split.frozen, arrays, adapters=adapters)
    return on_host(hidden).reshape(size * length, -1), places
