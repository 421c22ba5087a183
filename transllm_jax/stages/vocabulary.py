"""Stage 1: learn tokens of the target language, initialise their rows, add adapters (TransLLM, arXiv 2405.13923).

The model's answers to English text are unchanged: base ids do not move and the adapters begin at zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transllm_jax.artifacts import write_json
from transllm_jax.config import Source
from transllm_jax.errors import UserError
from transllm_jax.model.parameters import assemble, count, initial_adapters
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.expand import expand
from transllm_jax.tokenizer.runs import check_supported
from transllm_jax.tokenizer.scripts import script_of
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.checkpoint import save_arrays
from transllm_jax.training.new_rows import calibrated, mean_rows, text_states


def inputs(run: Run) -> dict[str, Any]:
    """What this stage reads: files and config sections."""
    config = run.config
    return {
        "vocabulary": config.vocabulary.model_dump(),
        "lora": config.lora.model_dump(),
        "language": config.language.model_dump(),
        "markers": config.markers.model_dump(),
        "embeddings": config.embeddings,
        "seed": config.seed,
        **run.hashes(source.path for source in run.config.vocabulary.sources),
    }


def require_language(run: Run) -> None:
    """Refuse a language whose script is not known. Raises UserError."""
    try:
        script_of(run.config.language.code)
    except UserError as error:
        raise UserError(f"language.code: {error}") from None


def check(run: Run) -> None:
    """What can be known to be wrong before this stage begins. Raises UserError."""
    base = run.tokenizer("base")
    if base.vocab_size != run.model_config.vocab_size:
        raise UserError(
            f"{run.base}: {base.vocab_size} tokens and {run.model_config.vocab_size} embedding rows; "
            "a model with padding rows cannot be expanded yet: cut its embedding to the tokenizer's size"
        )
    check_supported(json.loads(base.backend.to_str()), base.source)
    for marker in run.markers.in_order():
        if base.token_id(marker) is not None:
            raise UserError(f"markers: {base.source} has the token {marker} already; choose another marker")
    for source in run.config.vocabulary.sources:
        run.check(source)


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write the expanded tokenizer, its report, and the adapters and new rows that training starts from."""
    config = run.config
    base = run.tokenizer("base")
    documents = [text for source in config.vocabulary.corpus for text in run.read_target(source)]
    try:
        expansion = expand(
            base,
            documents,
            size=config.vocabulary.size,
            language=config.language.code,
            markers=list(run.markers.in_order()),
            min_count=config.vocabulary.min_count,
        )
    except UserError as error:
        raise UserError(f"vocabulary: {error}") from None
    expansion.tokenizer.save(directory)
    trainable = initial_adapters(run.model_config, run.lora, config.seed)
    tables = {"vocabulary.new": run.frozen["vocabulary.base"]}
    if not run.model_config.tie_word_embeddings:
        tables["vocabulary.output_new"] = run.frozen["vocabulary.output_base"]
    for path, table in tables.items():
        trainable[path] = mean_rows(np.asarray(table, np.float32), expansion.pieces)
    if config.vocabulary.initial_rows == "calibrated" and config.vocabulary.english is not None:
        _calibrate(run, expansion.tokenizer, trainable, documents, config.vocabulary.english)
    save_arrays(directory / "trainable", trainable)
    report = {
        **expansion.report,
        "trainable_parameters": count(trainable),
        "frozen_parameters": count(run.frozen),
    }
    write_json(directory / "report.json", report)
    before, after = report["tokens_per_character_before"], report["tokens_per_character_after"]
    return {
        "text": f"{len(expansion.new_tokens)} new tokens; {before:.2f} -> {after:.2f} tokens a character",
        "new_tokens": len(expansion.new_tokens),
        "trainable_parameters": count(trainable),
        "frozen_parameters": count(run.frozen),
    }


def _calibrate(
    run: Run, tokenizer: Tokenizer, trainable: dict[str, np.ndarray], documents: Sequence[str], english: Source
) -> None:
    """Give the new output rows their frequency as a prior; the tokens' counts are those in the corpus."""
    tied = run.model_config.tie_word_embeddings
    path, table = ("vocabulary.new", "base") if tied else ("vocabulary.output_new", "output_base")
    split = assemble(run.model_config, run.frozen, lora=run.lora, trainable=trainable)
    first, new = run.model_config.vocab_size, trainable[path].shape[0]
    counts = np.zeros(new, np.int64)
    for ids in tokenizer.encode_batch(documents):
        counts += np.bincount([token - first for token in ids if token >= first], minlength=new)
    texts = run.read(english)
    trainable[path] = calibrated(
        trainable[path],
        counts,
        text_states(split, tokenizer, documents),
        text_states(split, tokenizer, [pair[0] for pair in texts] if english.format == "pairs" else texts),
        np.asarray(run.frozen[f"vocabulary.{table}"], np.float32),
    )
