"""Initial rows of new tokens.

The mean of the rows of the pieces that a token replaces is a good start (Gee et al., Fast Vocabulary Transfer, EMNLP
2022). `weighted` gives less weight to pieces that are frequent, because they say little. But a mean does not reflect
how often the token occurs, and byte pieces get higher logits than the tokens that are made of them. `calibrated`
corrects both along one direction: the one in which the model's states on target-language text differ most clearly from
those on English text. `aligned` begins where the token's meaning is: at the rows of the English tokens that it is
aligned with in parallel text. `random` is the baseline to which the others are compared (bench/rows.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from transllm_jax.data.rows.examples import document_examples
from transllm_jax.data.rows.packing import pack
from transllm_jax.errors import UserError
from transllm_jax.model.parameters import Split
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import on_host
from transllm_jax.training.step import hidden_states

# How much a new token's logit rises on target-language text on average, in nats; those of its pieces do not change.
BOOST = 3.0
# The weight of the base rows' extent along a direction, relative to the states' spread along it, in choosing one.
BASE_WEIGHT = 100.0
# How many tokens of each language give states; tokens per row; rows per batch; characters that surely have the tokens.
STATES, LENGTH, BATCH = 4096, 256, 4
CHARACTERS = 1_000_000
# A piece with this share of the text has half of the full weight (smooth inverse frequency, Arora et al., ICLR 2017).
# Their 1e-3 is for words. Here the byte that begins every character has a share of a third and says little by itself,
# but with tied tables the output needs it. Bits per byte of Thai with SmolLM2-135M: 1.645 with 1e-3, 1.571 with 0.03,
# 1.391 with 0.3, and 1.369 for the plain mean.
HALF = 0.3
# Of an aligned row; the rest is the mean of the token's pieces, by which tokens that mean the same are told apart.
MEANING = 0.6
# How much the logits of new tokens fall on English text on average, in nats. Aligned rows need it, because they are
# like those of English tokens. Measured with SmolLM2-135M and 5,700 pairs: 0.05 nats of English drift without it, 0.00
# with it.
DROP = 6.0
# How much lower the logits of tokens that go on with a word begin, in nats. All pieces of a name have the rows of the
# same English name; this lets its first piece come first.
LOWER = 8.0
# Documents that are encoded at once.
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
    """How often each of the ids first .. first + number - 1 occurs in the documents, int64 [number]."""
    counts = np.zeros(number, np.int64)
    for start in range(0, len(documents), DOCUMENTS):
        for ids in tokenizer.encode_batch(documents[start : start + DOCUMENTS]):
            found = np.asarray(ids, np.int64) - first
            counts += np.bincount(found[(found >= 0) & (found < number)], minlength=number)
    return counts


def text_states(split: Split, tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """The model's last hidden states on about the first `STATES` tokens of the documents, float32 [.., D]."""
    # A large corpus is not encoded as a whole for its beginning.
    ends = np.cumsum([len(text) for text in documents])
    documents = documents[: int(np.searchsorted(ends, CHARACTERS)) + 1]
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
    """Rows that give new tokens their frequency as a prior on target-language text.

    rows [n, D]; counts [n], how often each token occurs in the corpus, 0 for one that stays as it is (a marker); target
    and english [.., D], the model's last hidden states on text of each language; base [V, D], the frozen output rows.
    Let u be the direction that separates the two sets of states (Fisher's linear discriminant, with a penalty for
    directions that the base rows use). A row gets u * (BOOST + log count - mean log count) / (mean target state along
    u). So its logit rises by BOOST + log count - mean log count on target-language text, and hardly on English text.
    Raises UserError if the states do not separate the languages.
    """
    rows, target, english = (array.astype(np.float64) for array in (rows, target, english))
    direction = np.linalg.solve(_spread(target, english, base), target.mean(axis=0) - english.mean(axis=0))
    direction /= max(float(np.linalg.norm(direction)), 1e-12)
    reach = float(target.mean(axis=0) @ direction)
    if reach <= 0:
        raise _inseparable()
    _require_separate(direction, target, english)
    lift = _lift(counts)
    return (rows + (lift / reach)[:, None] * direction).astype(np.float32)


def aligned_rows(means: np.ndarray, table: np.ndarray, meanings: Sequence[Mapping[int, int]]) -> np.ndarray:
    """Rows at the English tokens that new tokens are aligned with, in part (`MEANING`): float32 [n, D].

    means [n, D], the means of the pieces' rows, which a token without alignment keeps; table [V, D]; meanings: for each
    new token, how often it is aligned with which base token.
    """
    rows = means.astype(np.float32)
    for row, found in enumerate(meanings):
        if found:
            meaning = np.average(table[list(found)], axis=0, weights=list(found.values()))
            rows[row] = MEANING * meaning + (1 - MEANING) * rows[row]
    return rows


def lifted(
    rows: np.ndarray, counts: np.ndarray, inside: np.ndarray, target: np.ndarray, english: np.ndarray, base: np.ndarray
) -> np.ndarray:
    """Aligned rows with the same prior as `calibrated` gives, and with less probability on English text.

    rows, counts, target, english and base are those of `calibrated`; inside [n], the share of a token's occurrences
    that go on with a word. On target-language text a row's logit rises on average by BOOST + log count - mean log count
    - LOWER * inside, and on English text it falls by DROP + LOWER * inside. Of all changes of a row that do so, this
    is the one with the least spread, in the sense of `calibrated`. Raises UserError as `calibrated` does.
    """
    target, english = target.astype(np.float64), english.astype(np.float64)
    means = np.stack([target.mean(axis=0), english.mean(axis=0)])
    along = np.linalg.solve(_spread(target, english, base), means.T)
    # Changes that move the logit by 1 on text of one language, on average, and by 0 on that of the other: [D, 2].
    changes = along @ np.linalg.pinv(means @ along, hermitian=True)
    _require_separate(changes @ [BOOST, -DROP], target, english)
    wanted = np.stack([_lift(counts) - LOWER * inside, -DROP - LOWER * inside])
    return (rows + (changes @ wanted).T).astype(np.float32)


def _require_separate(change: np.ndarray, target: np.ndarray, english: np.ndarray) -> None:
    """Refuse a change of rows [D] that moves logits about as much within one language as it does between the two."""
    gap, noise = float((target.mean(axis=0) - english.mean(axis=0)) @ change), float((target @ change).std())
    if gap <= 0 or gap < 2 * noise:
        raise _inseparable()


def _inseparable() -> UserError:
    return UserError(
        "vocabulary.initial_rows: this model's states do not tell the target language from English; set it to mean"
    )


def _spread(target: np.ndarray, english: np.ndarray, base: np.ndarray) -> np.ndarray:
    """How much logits vary along each direction, on text of both languages and for the base's rows, [D, D]."""
    base = base.astype(np.float64)
    spread = np.cov(target.T) + np.cov(english.T) + BASE_WEIGHT * base.T @ base / len(base)
    return np.asarray(spread + 1e-3 * np.eye(base.shape[1]))


def _lift(counts: np.ndarray) -> np.ndarray:
    """How much the logits of tokens with these counts rise on target-language text; 0 where the count is."""
    seen = counts > 0
    prior = np.log(np.maximum(counts, 1))
    return np.where(seen, BOOST + prior - prior[seen].mean(), 0.0)
