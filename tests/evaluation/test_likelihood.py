"""Bits per byte and the distance to the original model, against their definitions on full logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_weights, tiny_config

from transllm_jax.evaluation.likelihood import CHUNK, Teacher, bits_per_byte
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import Split, abstract, assemble, load_frozen, merge
from transllm_jax.tokenizer.tokenizer import Tokenizer

NEW = 6
# The direct computation reads one text a row, in rows of one length.
WIDTH = 128


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer) -> Split:
    config = tiny_config(tokenizer.vocab_size)
    return assemble(config, load_frozen(config, random_weights(config)))


@pytest.fixture(scope="module")
def trained(tokenizer: Tokenizer, base: Split) -> Split:
    """The base with adapters and new rows."""
    config, lora = tiny_config(tokenizer.vocab_size), LoraConfig(rank=3, alpha=6.0, dropout=0.5)
    rng = np.random.default_rng(4)
    shapes = abstract(config, lora, NEW).trainable
    trainable = {path: 0.1 * rng.standard_normal(leaf.shape, dtype=np.float32) for path, leaf in sorted(shapes.items())}
    return assemble(config, base.frozen, lora=lora, trainable=trainable)


@partial(jax.jit, static_argnames="structure")
def _log_probabilities(trainable: Any, frozen: Any, tokens: jax.Array, *, structure: Any) -> jax.Array:
    model = merge(structure, trainable, frozen)
    hidden = model(tokens[None], jnp.arange(WIDTH)[None], jnp.ones((1, WIDTH), jnp.int32))
    return jax.nn.log_softmax(model.vocabulary.logits(hidden))[0]


def log_probabilities(split: Split, ids: Sequence[int]) -> np.ndarray:
    """float64 [len(ids), V + n]: place t holds the distribution of what follows ids[: t + 1]."""
    tokens = np.zeros(WIDTH, np.int32)
    tokens[: len(ids)] = ids
    values = _log_probabilities(split.trainable, split.frozen, jnp.asarray(tokens), structure=split.structure)
    return np.asarray(values, np.float64)[: len(ids)]


# --- bits per byte --------------------------------------------------------------------------------------------------

DOCUMENTS = [
    "The capital of France is Paris.",
    "ประเทศไทย สวัสดี",
    "a",
    "You can write a short letter to your friend, then read it again and send it in the morning.",
    "ภาษาไทย 12 months",
]


def bits_of_pieces(split: Split, tokenizer: Tokenizer, length: int, bos: Sequence[int] = ()) -> float:
    """The definition. A piece reads `length` tokens, of which the first is context: the one before it."""
    nats = 0.0
    for text in DOCUMENTS:
        ids = [tokenizer.document_end_id, *bos, *tokenizer.encode(text)]
        for start in range(0, len(ids) - 1, length - 1):
            piece = ids[start : start + length]
            scores = log_probabilities(split, piece)
            counted = len(bos) if start == 0 else 0
            nats -= sum(scores[place, piece[place + 1]] for place in range(counted, len(piece) - 1))
    return nats / math.log(2) / sum(len(text.encode("utf-8")) for text in DOCUMENTS)


def test_bits_per_byte_are_those_of_the_full_logits(tokenizer: Tokenizer, base: Split, trained: Split) -> None:
    lengths = [len(tokenizer.encode(text)) for text in DOCUMENTS]
    assert sum(lengths) > 64 and max(lengths) < 48 and not tokenizer.bos_ids
    values = []
    for split in (base, trained):
        wanted = bits_of_pieces(split, tokenizer, WIDTH)
        values.append(bits_per_byte(split, tokenizer, DOCUMENTS, length=48, batch_size=2))
        assert math.isclose(values[-1], wanted, rel_tol=1e-5)
    assert values[1] > values[0] + 0.01, "adapters and new rows take part"


def test_what_the_tokenizer_puts_before_a_text_is_read_and_not_counted(tokenizer: Tokenizer, base: Split) -> None:
    with_bos = Tokenizer(tokenizer.backend, tokenizer.config, tokenizer.chat_template)
    with_bos.__dict__["bos_ids"] = [tokenizer.eos_id]
    ours = bits_per_byte(base, with_bos, DOCUMENTS, length=48, batch_size=2)
    assert math.isclose(ours, bits_of_pieces(base, tokenizer, WIDTH, with_bos.bos_ids), rel_tol=1e-5)


def test_whole_documents_count_the_same_in_rows_of_any_length(tokenizer: Tokenizer, base: Split) -> None:
    values = [
        bits_per_byte(base, tokenizer, documents, length=length, batch_size=batch_size)
        for length, batch_size, documents in (
            (48, 2, DOCUMENTS),
            (48, 2, DOCUMENTS[::-1]),
            (WIDTH, 3, DOCUMENTS),
        )
    ]
    assert np.allclose(values, values[0], rtol=1e-5)


def test_a_long_document_is_read_in_pieces_and_each_token_once(tokenizer: Tokenizer, base: Split) -> None:
    length = 12
    assert max(len(tokenizer.encode(text)) for text in DOCUMENTS) > 3 * length
    wanted = bits_of_pieces(base, tokenizer, length)
    assert math.isclose(bits_per_byte(base, tokenizer, DOCUMENTS, length=length, batch_size=4), wanted, rel_tol=1e-5)
    assert abs(wanted - bits_of_pieces(base, tokenizer, WIDTH)) > 1e-3, "less context is another number"


# --- the distance to the original model -----------------------------------------------------------------------------


def some_answers(tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers with their end tokens: more answers than a batch, more tokens than a chunk."""
    texts = [
        ("What is the capital?", "The capital of France is Paris, and the old tree sleeps all afternoon."),
        ("Months?", "There are seven days in a week and twelve months in a year; some have thirty days."),
        ("Say hello in Thai to the children, please.", "สวัสดี"),
        ("Why?", "A good teacher explains the same thing in another way when the children do not understand it."),
        ("And?", ""),
        ("More?", "He doesn't know where they'll go, but we're sure that it's not far and that I've seen the place."),
    ]
    return [(tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_id]) for prompt, answer in texts]


def definition(base: Split, split: Split, answers: Sequence[tuple[list[int], list[int]]], prefix: list[int]) -> float:
    """KL(base || split) from full logits, over all tokens of the answers."""
    values = []
    for prompt, answer in answers:
        p = log_probabilities(base, prompt + answer)[len(prompt) - 1 : -1]
        q = log_probabilities(split, prompt + prefix + answer)[len(prompt) + len(prefix) - 1 : -1]
        assert len(p) == len(q) == len(answer)
        values += (np.exp(p) * (p - q[:, : p.shape[1]])).sum(axis=1).tolist()
    return float(np.mean(values))


@pytest.fixture(scope="module")
def teacher(tokenizer: Tokenizer, base: Split) -> Teacher:
    return Teacher(base, some_answers(tokenizer), batch_size=4)


def test_a_model_has_no_distance_to_itself(teacher: Teacher) -> None:
    assert teacher.divergence(teacher.base) == 0


def test_the_distance_is_that_of_the_full_logits(
    tokenizer: Tokenizer, base: Split, trained: Split, teacher: Teacher
) -> None:
    assert sum(len(answer) for _, answer in teacher.answers) % CHUNK > 0, "the last chunk is filled up"
    assert len(teacher.answers) % teacher.batch_size > 0, "the last batch is filled up"
    marker = tokenizer.vocab_size + 2
    distances = []
    for prefix in ([], [marker]):
        distances.append(teacher.divergence(trained, prefix))
        assert math.isclose(distances[-1], definition(base, trained, teacher.answers, prefix), rel_tol=1e-4)
    assert distances[0] > 0.01 and abs(distances[1] - distances[0]) > 1e-3


def test_mass_on_new_tokens_is_lost(tokenizer: Tokenizer, base: Split, teacher: Teacher) -> None:
    """n new rows of zeros take a share that is known: their logits are 0 among those of the original."""
    config = tiny_config(tokenizer.vocab_size)
    rows = np.zeros((NEW, config.hidden_size), np.float32)
    larger = assemble(config, base.frozen, trainable={"vocabulary.new": rows})
    losses = []
    for prompt, answer in teacher.answers:
        scores = log_probabilities(larger, prompt + answer)[len(prompt) - 1 : -1]
        losses += (-np.log(np.exp(scores[:, :-NEW]).sum(axis=1))).tolist()
    distance = teacher.divergence(larger)
    assert distance > 1e-3 and math.isclose(distance, np.mean(losses), rel_tol=1e-3)
