"""Stage 1: learn tokens of the target language, initialise their rows, add adapters (TransLLM, arXiv 2405.13923).

The model's answers to English text are unchanged: base ids do not move and the adapters begin at zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conversion.adapter import ADAPTER, read_adapter
from conversion.hf import open_hf
from transllm_jax.artifacts import write_json
from transllm_jax.config import Source
from transllm_jax.errors import UserError
from transllm_jax.model.parameters import assemble, count, initial_adapters
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.expand import expand, with_markers
from transllm_jax.tokenizer.runs import check_supported
from transllm_jax.tokenizer.scripts import script_of
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.checkpoint import load_arrays, save_arrays
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
        **({} if (given := config.vocabulary.adapter) is None else run.hashes([f"{given}/{ADAPTER}"])),
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
    if run.config.vocabulary.adapter is not None:
        _check_adapter(run, Path(run.config.vocabulary.adapter))
    else:
        check_supported(json.loads(base.backend.to_str()), base.source)
    for marker in run.markers.in_order():
        if base.token_id(marker) is not None:
            raise UserError(f"markers: {base.source} has the token {marker} already; choose another marker")
    for source in run.config.vocabulary.sources:
        run.check(source)


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write the expanded tokenizer, its report, and the adapters and rows that training starts from."""
    given = run.config.vocabulary.adapter
    tokenizer, trainable, report = _learned(run) if given is None else _brought(run, Path(given))
    if run.config.embeddings == "all":
        # Copies: the frozen rows stay, and with them the original model.
        for path in ("base", "output_base"):
            if f"vocabulary.{path}" in run.frozen:
                rows = np.array(run.frozen[f"vocabulary.{path}"], np.float32)
                trainable.setdefault(f"vocabulary.{path}_trained", rows)
    tokenizer.save(directory)
    save_arrays(directory / "trainable", trainable)
    counts = {"trainable_parameters": count(trainable), "frozen_parameters": count(run.frozen)}
    write_json(directory / "report.json", {**report, **counts})
    text = f"{report['new_tokens']} new tokens"
    if given is None:
        before, after = report["tokens_per_character_before"], report["tokens_per_character_after"]
        text += f"; {before:.2f} -> {after:.2f} tokens a character"
    else:
        text += f" and adapters of {given}"
    return {"text": text, "new_tokens": len(trainable["vocabulary.new"]), **counts}


def _tables(run: Run) -> dict[str, np.ndarray]:
    """The base's rows that the new rows begin from, by the path of the new ones."""
    tables = {"vocabulary.new": run.frozen["vocabulary.base"]}
    if not run.model_config.tie_word_embeddings:
        tables["vocabulary.output_new"] = run.frozen["vocabulary.output_base"]
    return {path: np.asarray(table, np.float32) for path, table in tables.items()}


def _learned(run: Run) -> tuple[Tokenizer, dict[str, np.ndarray], dict[str, Any]]:
    """Tokens learned from the corpus; their rows, and fresh adapters."""
    config = run.config
    documents = [text for source in config.vocabulary.corpus for text in run.read_target(source)]
    assert config.vocabulary.size is not None
    try:
        expansion = expand(
            run.tokenizer("base"),
            documents,
            size=config.vocabulary.size,
            language=config.language.code,
            markers=list(run.markers.in_order()),
            min_count=config.vocabulary.min_count,
        )
    except UserError as error:
        raise UserError(f"vocabulary: {error}") from None
    trainable = initial_adapters(run.model_config, run.lora, config.seed)
    for path, table in _tables(run).items():
        trainable[path] = mean_rows(table, expansion.pieces)
    if config.vocabulary.initial_rows == "calibrated" and config.vocabulary.english is not None:
        _calibrate(run, expansion.tokenizer, trainable, documents, config.vocabulary.english)
    return expansion.tokenizer, trainable, expansion.report


def _brought(run: Run, adapter: Path) -> tuple[Tokenizer, dict[str, np.ndarray], dict[str, Any]]:
    """The tokens, rows and adapters of `transllm convert from-peft`; the markers are added."""
    tokenizer = Tokenizer.load(adapter)
    trainable = load_arrays(adapter / "trainable")
    markers = [marker for marker in run.markers.in_order() if tokenizer.token_id(marker) is None]
    size = run.model_config.vocab_size
    if markers:
        tokenizer, words = with_markers(tokenizer, markers)
        for path, table in _tables(run).items():
            brought = trainable.get(path, np.zeros((0, table.shape[1]), np.float32))
            known = np.concatenate([trainable.get(f"{ROWS_OF[path]}_trained", table), brought])
            trainable[path] = np.concatenate([brought, mean_rows(known, words)])
    report = {
        "language": run.config.language.code,
        "adapter": str(adapter),
        "markers": list(run.markers.in_order()),
        "base_vocabulary": size,
        "vocabulary": tokenizer.vocab_size,
        "new_tokens": tokenizer.vocab_size - size,
    }
    return tokenizer, trainable, report


# The path of new rows -> that of the base's rows of the same table.
ROWS_OF = {"vocabulary.new": "vocabulary.base", "vocabulary.output_new": "vocabulary.output_base"}


def _check_adapter(run: Run, adapter: Path) -> None:
    """Refuse an adapter of another base or shape than the run's. Raises UserError."""
    found = read_adapter(adapter)
    if not found.fits(open_hf(run.base)):
        raise UserError(f"vocabulary.adapter: {adapter} was made for another base than {run.base}; convert it again")
    wanted = {"rank": found.lora.rank, "alpha": found.lora.alpha, "rslora": found.lora.rslora}
    wrong = [f"lora.{name}={value}" for name, value in wanted.items() if getattr(run.lora, name) != value]
    if set(found.lora.targets) != set(run.lora.targets):
        wrong.append(f"lora.targets=[{','.join(found.lora.targets)}]")
    arrays = load_arrays(adapter / "trainable")
    if "vocabulary.base_trained" in arrays and run.config.embeddings != "all":
        wrong.append("embeddings=all")
    if wrong:
        raise UserError(f"vocabulary.adapter: {adapter} needs {' '.join(wrong)}; set it")
    # Lists what is missing or misshapen.
    assemble(run.model_config, run.frozen, lora=run.lora, trainable=arrays)
    tokens, rows = Tokenizer.load(adapter).vocab_size, len(arrays.get("vocabulary.new", ()))
    if tokens != run.model_config.vocab_size + rows:
        raise UserError(
            f"vocabulary.adapter: {adapter} has {rows} new rows, but a tokenizer of {tokens} tokens for a base of "
            f"{run.model_config.vocab_size}; convert it with the tokenizer of its training"
        )


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
