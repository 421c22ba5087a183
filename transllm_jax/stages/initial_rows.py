"""The first rows of new tokens in a run: made in the way that the config says, or copied from another model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transllm_jax.conversion.hf.directory import open_hf, read_parts
from transllm_jax.conversion.hf.safetensors_io import dtype_of
from transllm_jax.conversion.token_rows import TokenRows, open_token_rows
from transllm_jax.errors import UserError
from transllm_jax.model.parameters import assemble
from transllm_jax.stages.alignment import ROUNDS, align
from transllm_jax.stages.new_rows import (
    aligned_rows,
    calibrated,
    lifted,
    mean_rows,
    random_rows,
    text_states,
    token_counts,
    weighted_rows,
)
from transllm_jax.stages.points import token_ids
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.growing.expand import Expansion
from transllm_jax.tokenizer.tokenizer import Tokenizer

# The number of new rows by the way in which they were made.
RowsMade = dict[str, int]

# The path of new rows -> the path of the base's rows of the same table.
ROWS_OF = {"vocabulary.new": "vocabulary.base", "vocabulary.output_new": "vocabulary.output_base"}


def add_new_rows(
    run: Run,
    expansion: Expansion,
    trainable: dict[str, np.ndarray],
    documents: Sequence[str],
    pairs: Sequence[tuple[str, str]],
) -> RowsMade:
    """Add the new rows to `trainable`; returns how they were made.

    documents: the corpus's texts in the target language; pairs: (English, target), those of the corpus.
    """
    config, pieces, base = run.config.vocabulary, expansion.pieces, run.models.tokenizer("base")
    counts = np.zeros(0, np.int64)
    if config.initial_rows == "weighted":
        counts = token_counts(base, documents, 0, run.models.config.vocab_size)
    for number, (path, table) in enumerate(base_tables(run).items()):
        if config.initial_rows == "weighted":
            trainable[path] = weighted_rows(table, pieces, counts)
        elif config.initial_rows == "random":
            trainable[path] = random_rows(table[token_ids(base)], len(pieces), run.seed_for("new rows"), number)
        else:
            trainable[path] = mean_rows(table, pieces)
    if config.initial_rows == "copy":
        return _copy(run, expansion, trainable)
    if config.initial_rows == "calibrated":
        return _calibrate(run, expansion.tokenizer, trainable, documents)
    if config.initial_rows == "aligned":
        return _align(run, expansion, trainable, documents, pairs)
    return {config.initial_rows: len(pieces)}


def base_tables(run: Run) -> dict[str, np.ndarray]:
    """The base's rows by the path of the new rows of the same table: float32 [V, D], rounded to the run's dtype."""
    model, dtype = open_hf(run.models.base), dtype_of(run.config.model.dtype)
    tied = run.models.config.tie_word_embeddings
    return {
        path: read_parts(model, base, [(slice(None), slice(None))], dtype)[0].astype(np.float32)
        for path, base in ROWS_OF.items()
        if not (tied and path == "vocabulary.output_new")
    }


def open_rows_from(run: Run) -> TokenRows:
    """The model from which the config copies rows. Raises UserError if they cannot be copied from it."""
    assert run.config.vocabulary.rows_from is not None
    try:
        return open_token_rows(run.config.vocabulary.rows_from, run.models.config)
    except UserError as error:
        raise UserError(f"vocabulary.rows_from: {error}") from None


def _copy(run: Run, expansion: Expansion, trainable: dict[str, np.ndarray]) -> RowsMade:
    """Replace the rows in `trainable` by those of the other model, for each new token that it has."""
    other, first = open_rows_from(run), run.models.config.vocab_size
    tokens = [str(expansion.tokenizer.token(first + number)) for number in range(len(expansion.pieces))]
    try:
        ids = other.ids(tokens)
        known = np.array([number is not None for number in ids])
        for path, rows in other.rows([number for number in ids if number is not None]).items():
            trainable[path][known] = rows
    except UserError as error:
        raise UserError(f"vocabulary.rows_from: {error}") from None
    return {"copy": int(known.sum()), "mean": int((~known).sum())}


def _calibrate(run: Run, tokenizer: Tokenizer, trainable: dict[str, np.ndarray], documents: Sequence[str]) -> RowsMade:
    """Calibrate the new output rows with the tokens' counts in the corpus (see `new_rows.calibrated`)."""
    path, counts, *states = _output_rows(run, tokenizer, trainable, documents, _english(run))
    trainable[path] = calibrated(trainable[path], counts, *states)
    return {"calibrated": int((counts > 0).sum()), "mean": int((counts == 0).sum())}


def _align(
    run: Run,
    expansion: Expansion,
    trainable: dict[str, np.ndarray],
    documents: Sequence[str],
    pairs: Sequence[tuple[str, str]],
) -> RowsMade:
    """Move the rows in `trainable` to where the pairs say that their meaning is (see `new_rows.aligned_rows`)."""
    base, first = run.models.tokenizer("base"), run.models.config.vocab_size
    with run.progress.task("align tokens", total=ROUNDS + 1, unit="round") as bar:
        found = align(pairs, expansion.tokenizer, base, first, len(expansion.pieces), bar.update)
    for path, table in base_tables(run).items():
        trainable[path] = aligned_rows(trainable[path], table, found.meanings)
    # Without a source of English text, that of the pairs.
    english = [pair[0] for pair in pairs] if run.config.vocabulary.english is None else _english(run)
    path, counts, *states = _output_rows(run, expansion.tokenizer, trainable, documents, english)
    trainable[path] = lifted(trainable[path], counts, found.inside, *states)
    aligned = sum(bool(meanings) for meanings in found.meanings)
    return {"aligned": aligned, "mean": len(found.meanings) - aligned}


def _english(run: Run) -> list[str]:
    assert run.config.vocabulary.english is not None
    return run.inputs.read_english(run.config.vocabulary.english, "vocabulary")


def _output_rows(
    run: Run, tokenizer: Tokenizer, trainable: dict[str, np.ndarray], documents: Sequence[str], english: Sequence[str]
) -> tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What a prior needs: the path of the new output rows, how often the corpus has each token, the last hidden states
    on text in the target language and in English, and the base's output rows."""
    models = run.models
    path = "vocabulary.new" if models.config.tie_word_embeddings else "vocabulary.output_new"
    split = assemble(models.config, models.frozen, lora=models.lora, trainable=trainable, layout=models.layout)
    return (
        path,
        token_counts(tokenizer, documents, models.config.vocab_size, len(trainable[path])),
        text_states(split, tokenizer, documents),
        text_states(split, tokenizer, english),
        base_tables(run)[path][token_ids(models.tokenizer("base"))],
    )
