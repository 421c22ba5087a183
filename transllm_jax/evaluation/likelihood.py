"""Likelihood measures: bits per byte of text, and KL divergence from the original model on the original's answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transllm_jax.data.rows.examples import make_example, split_example
from transllm_jax.data.rows.packing import pack
from transllm_jax.generation.engine import padded_batch_size
from transllm_jax.model.parameters import Flat, Split, merge
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import on_host
from transllm_jax.training.step import hidden_states, summed_loss

# Answer tokens whose distributions over the vocabulary are in memory at once.
CHUNK = 128
# Rows are as long as the longest answer, rounded up to a multiple of this: few shapes to compile, little padding.
LENGTH_MULTIPLE = 64


# (structure, trainable arrays, frozen arrays, batch) -> the sum of -log p over the batch's weighted tokens, in nats.
nats = jax.jit(summed_loss, static_argnames=("structure",))


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
    examples = []
    for ids in tokenizer.encode_batch(documents):
        start = [tokenizer.document_end_id, *tokenizer.bos_ids]
        whole = make_example([*start, *ids], [0] * len(start) + [1] * len(ids))
        examples += split_example(whole, length)
    rows = pack(examples, length)
    batch_size = padded_batch_size(batch_size, split.layout)
    total = 0.0
    for first in range(0, len(rows), batch_size):
        batch = rows.batch(first, batch_size)
        total += float(nats(split.structure, split.trainable, split.frozen, batch))
        between()
    return total / math.log(2) / sum(len(text.encode()) for text in documents)


@partial(jax.jit, static_argnames=("structures",))
def _divergence(
    teacher: tuple[Flat, Flat],
    student: tuple[Flat, Flat],
    teacher_hidden: jax.Array,
    student_hidden: jax.Array,
    *,
    structures: tuple[Any, Any],
) -> jax.Array:
    """KL(teacher || student) of each token, [C], over the teacher's vocabulary; mass on new tokens counts as lost."""
    teacher_logits = merge(structures[0], *teacher).vocabulary.logits(teacher_hidden, base_only=True, adapters=False)
    student_logits = merge(structures[1], *student).vocabulary.logits(student_hidden)
    p = jax.nn.log_softmax(teacher_logits)
    q = jax.nn.log_softmax(student_logits)[:, : teacher_logits.shape[-1]]
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


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
        states = self.states_of(split, prefix, adapters=True)
        total = 0.0
        for start in range(0, len(states), CHUNK):
            teacher, student = self.states[start : start + CHUNK], states[start : start + CHUNK]
            padding = [(0, CHUNK - len(teacher)), (0, 0)]
            values = _divergence(
                (self.base.trainable, self.base.frozen),
                (split.trainable, split.frozen),
                np.pad(teacher, padding),
                np.pad(student, padding),
                structures=(self.base.structure, split.structure),
            )
            total += float(jnp.sum(values[: len(teacher)]))
        return total / len(states)

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
