"""What the rows of new tokens start from.

The mean of the rows of the pieces that a token replaces is close (Gee et al., Fast Vocabulary Transfer, EMNLP 2022).
`weighted` lets the pieces count by how much they say, which is little for one that stands everywhere. But a mean does
not know how often the token occurs, and the pieces of bytes outbid the tokens that are made of them. `calibrated` mends
both along one direction: the one in which the model's states on target-language text differ most clearly from those on
English text. `random` knows nothing; it is what the others are measured against (bench/rows.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from transllm_jax.data.rows.examples import document_examples
from transllm_jax.data.rows.packing import pack
from transllm_jax.errors import UserError
from transllm_jax.model.parameters import Split
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import on_host
from transllm_jax.training.step import hidden_states

# What a new token is raised by, in nats, where the text is of the target language: over its pieces, which stay.
BOOST = 3.0
# How much the base rows' own use of a direction counts against it, beside the states' spread along it.
BASE_WEIGHT = 100.0
# Tokens of each language whose states are looked at, in rows of this many tokens, so many rows at once.
STATES, LENGTH, BATCH = 4096, 256, 4
# A piece's share of the text at which it counts half (smooth inverse frequency, Arora et al., ICLR 2017). Their 1e-3 is
# for words. Here the byte that begins every character has a share of a third and says little by itself, but with tied
# tables the output needs it. Bits per byte of Thai with SmolLM2-135M: 1.645 with 1e-3, 1.571 with 0.03, 1.391 with 0.3,
# and 1.369 for the plain mean.
HALF = 0.3
# Documents whose ids are held at once.
DOCUMENTS = 1000


def mean_rows(table: np.ndarray, pieces: Sequence[Sequence[int]]) -> np.ndarray:
    """A row for each new token, the mean of its pieces' rows: table [V, D], n lists of ids -> float32 [n, D]."""
    return np.stack([table[list(ids)].mean(axis=0, dtype=np.float32) for ids in pieces])


def weighted_rows(table: np.ndarray, pieces: Sequence[Sequence[int]], counts: np.ndarray) -> np.ndarray:
    """A row for each new token, the mean of its pieces' rows weighted by HALF / (HALF + share of the text).

    table [V, D], n lists of ids, counts [V] of the base's ids in the text -> float32 [n, D]. Pieces that are equally
    frequent count alike.
    """
    weights = HALF / (HALF + counts / max(int(counts.sum()), 1))
    rows = [np.average(table[list(ids)], axis=0, weights=weights[list(ids)]) for ids in pieces]
    return np.stack(rows).astype(np.float32)


def random_rows(table: np.ndarray, size: int, seed: int, number: int = 0) -> np.ndarray:
    """`size` rows drawn from a normal distribution: float32 [n, D], a function of the table [V, D], seed and number.

    Each dimension has the mean and the standard deviation that it has in the table. `number` tells tables apart.
    """
    key = jax.random.fold_in(jax.random.key(seed), number)
    drawn = np.asarray(jax.random.normal(key, (size, table.shape[1]), np.float32))
    mean, deviation = table.mean(axis=0, dtype=np.float64), table.std(axis=0, dtype=np.float64)
    return (mean + deviation * drawn).astype(np.float32)


def token_counts(tokenizer: Tokenizer, documents: Sequence[str], first: int, number: int) -> np.ndarray:
    """How often each of the ids first .. first + number stands in the documents, int64 [number]."""
    counts = np.zeros(number, np.int64)
    for start in range(0, len(documents), DOCUMENTS):
        for ids in tokenizer.encode_batch(documents[start : start + DOCUMENTS]):
            found = np.asarray(ids, np.int64) - first
            counts += np.bincount(found[(found >= 0) & (found < number)], minlength=number)
    return counts


def text_states(split: Split, tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """The model's states before the output on the documents' first `STATES` tokens or so, float32 [.., D]."""
    rows = pack(document_examples(tokenizer, documents, LENGTH), LENGTH)
    found = []
    for first in range(0, min(len(rows), STATES // LENGTH), BATCH):
        batch = rows.batch(first, BATCH)
        states = hidden_states(split.structure, split.trainable, split.frozen, batch)
        found.append(on_host(states)[batch["segment_ids"] > 0])
    return np.concatenate(found)


def calibrated(
    rows: np.ndarray, counts: np.ndarray, target: np.ndarray, english: np.ndarray, base: np.ndarray
) -> np.ndarray:
    """Rows that give new tokens their frequency as a prior, where the text is of the target language.

    rows [n, D]; counts [n], how often each token occurs in the corpus, 0 for one that is left as it is (a marker);
    target and english [.., D], the model's states before the output on text of both languages; base [V, D], the frozen
    output rows. With u the direction that separates the two kinds of states (Fisher's linear discriminant, kept away
    from directions that the base rows read), a row gets u * (BOOST + log count - mean log count) / (mean target state
    along u): on target-language text its logit rises by that much, on English text by little or less.
    Raises UserError where the states do not tell the languages apart.
    """
    rows, base = rows.astype(np.float64), base.astype(np.float64)
    target, english = target.astype(np.float64), english.astype(np.float64)
    spread = np.cov(target.T) + np.cov(english.T) + BASE_WEIGHT * base.T @ base / len(base)
    direction = np.linalg.solve(spread + 1e-3 * np.eye(rows.shape[1]), target.mean(axis=0) - english.mean(axis=0))
    direction /= max(float(np.linalg.norm(direction)), 1e-12)
    reach = float(target.mean(axis=0) @ direction)
    gap, noise = reach - float(english.mean(axis=0) @ direction), float((target @ direction).std())
    if reach <= 0 or gap < 2 * noise or gap == 0:
        raise UserError(
            "vocabulary.initial_rows: this model's states do not tell the target language from English; set it to mean"
        )
    seen = counts > 0
    prior = np.where(seen, np.log(np.maximum(counts, 1)), 0.0)
    lift = np.where(seen, BOOST + prior - prior[seen].mean(), 0.0)
    return (rows + (lift / reach)[:, None] * direction).astype(np.float32)
