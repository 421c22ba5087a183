"""Stage 1: learn tokens of the target language, initialise their rows, add adapters (TransLLM, arXiv 2405.13923).

The model's answers to English text do not change: base tokens keep their ids, and the adapters start at zero.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transllm_jax.config import Vocabulary
from transllm_jax.conversion.adapter import ADAPTER, read_adapter
from transllm_jax.conversion.hf.directory import open_hf, read_weights
from transllm_jax.conversion.hf.tokenizer_files import tokenizer_file
from transllm_jax.conversion.names import tensors
from transllm_jax.conversion.store import MANIFEST
from transllm_jax.disk import write_json
from transllm_jax.errors import UserError
from transllm_jax.model.parameters import assemble, count_parameters, initial_adapters
from transllm_jax.progress import Phases
from transllm_jax.stages.alignment import check_aligner
from transllm_jax.stages.initial_rows import ROWS_OF, add_new_rows, base_tables, open_rows_from
from transllm_jax.stages.new_rows import mean_rows
from transllm_jax.stages.points import ids_without_token, token_ids, trains
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.chat import without_thinking
from transllm_jax.tokenizer.growing.expand import (
    Expansion,
    expand,
    expansion_of,
    save_expanded,
    tokens_per_character,
    with_markers,
)
from transllm_jax.tokenizer.growing.icu_words import check_icu
from transllm_jax.tokenizer.growing.prune import OnProgress
from transllm_jax.tokenizer.growing.runs import check_supported
from transllm_jax.tokenizer.llama_cpp import OTHER_IDS, rebuilt_message
from transllm_jax.tokenizer.rewritten import rewritten_letters_message
from transllm_jax.tokenizer.scripts import script_of
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays, save_arrays

# A corpus of at most this many bytes per wanted token may be too small: the check learns tokens from it, in seconds.
SMALL_CORPUS = 200


def inputs(run: Run) -> dict[str, Any]:
    """The stage's inputs: the config sections and files that it reads."""
    config = run.config
    section = config.vocabulary.model_dump()
    if not section["within_words"]:
        del section["within_words"]  # runs of versions without this key stay done
    return {
        "vocabulary": section,
        "lora": "none" if config.lora is None else config.lora.model_dump(),
        "language": config.language.model_dump(),
        "markers": config.markers.model_dump(),
        "embeddings": config.embeddings,
        "seed": config.seed,
        **run.inputs.source_hashes(run.config.vocabulary.sources),
        **run.inputs.hashes(_files_of(run.config.vocabulary.rows_from)),
        **run.inputs.hashes(_named_files(config.vocabulary)),
        **run.inputs.contamination_hashes(config.vocabulary.initial_rows == "aligned"),
    }


def _named_files(section: Vocabulary) -> list[str]:
    """The files that identify the tokenizer and the adapter that the config names."""
    tokenizer = [] if section.tokenizer is None else [f"{section.tokenizer}/tokenizer.json"]
    return tokenizer + ([] if section.adapter is None else [f"{section.adapter}/{ADAPTER}"])


def _files_of(directory: str | None) -> list[str]:
    """The files of a model directory that determine its rows and tokens."""
    if directory is None:
        return []
    # The manifest of one of our own checkpoints holds the checksums of its arrays.
    ours = (Path(directory) / MANIFEST).is_file()
    weights = f"{directory}/{MANIFEST}" if ours else f"{glob.escape(directory)}/*.safetensors"
    return [f"{directory}/config.json", str(tokenizer_file(Path(directory))), weights]


def require_language(run: Run) -> None:
    """Refuse a language whose script is not known. Raises UserError."""
    try:
        script_of(run.config.language.code, run.config.language.scripts)
    except UserError as error:
        raise UserError(f"language.code: {error}") from None


def require_corpus(run: Run) -> None:
    """Refuse a corpus that is too small for the wanted number of tokens with any base. Raises UserError.

    A new token is a character that the base lacks, or the result of a merge. It has at least one byte and occurs in the
    text `min_count` times. Characters are counted before merges, so a byte may count for one token of each kind.
    """
    section = run.config.vocabulary
    if section.size is None:
        return
    least = -(-section.size * section.min_count // 2)
    texts = _first_texts(run, least)
    if texts is not None and (given := sum(map(_size, texts))) < least:
        raise UserError(
            f"vocabulary.corpus gives {given:,} bytes of text: {section.size:,} tokens, each {section.min_count} times,"
            f" need {least:,} at the very least, and many times that for good ones; raise max_bytes or add "
            "text, or lower vocabulary.size"
        )


def check(run: Run) -> None:
    """Find what is wrong with the stage's config and files before it begins. Raises UserError."""
    base = run.models.tokenizer("base")
    if run.config.vocabulary.adapter is not None:
        _check_adapter(run, Path(run.config.vocabulary.adapter))
    else:
        check_supported(json.loads(base.backend.to_str()), base.source)
    if run.config.vocabulary.tokenizer is not None:
        try:
            _given_expansion(run)
        except UserError as error:
            raise UserError(f"vocabulary.tokenizer: {error}") from None
    if run.config.vocabulary.rows_from is not None:
        open_rows_from(run)
    for marker in run.markers.in_order():
        if base.token_id(marker) is not None:
            raise UserError(f"markers: {base.source} has the token {marker} already; choose another marker")
    if run.config.vocabulary.within_words:
        try:
            check_icu()
        except UserError as error:
            raise UserError(f"vocabulary.within_words: {error}") from None
    if run.config.vocabulary.initial_rows == "aligned":
        check_aligner()
    for source in run.config.vocabulary.sources:
        run.inputs.check(source)
    _check_corpus(run)


def _check_adapter(run: Run, adapter: Path) -> None:
    """Refuse an adapter that was made for another base, or has another shape than the config says. Raises UserError."""
    description = read_adapter(adapter)
    if not description.fits(open_hf(run.models.base)):
        raise UserError(
            f"vocabulary.adapter: {adapter} was made for another base than {run.models.base}; convert it again"
        )
    # The config refuses `adapter` together with `lora: none`.
    assert run.models.lora is not None
    wanted = {"rank": description.lora.rank, "alpha": description.lora.alpha, "rslora": description.lora.rslora}
    wrong = [f"lora.{name}={value}" for name, value in wanted.items() if getattr(run.models.lora, name) != value]
    if set(description.lora.targets) != set(run.models.lora.targets):
        wrong.append(f"lora.targets=[{','.join(description.lora.targets)}]")
    arrays = load_arrays(adapter / "trainable")
    if "vocabulary.base_trained" in arrays and run.config.embeddings != "all":
        wrong.append("embeddings=all")
    if wrong:
        raise UserError(f"vocabulary.adapter: {adapter} needs {' '.join(wrong)}; set it")
    # Raises UserError that lists missing and misshapen arrays.
    assemble(run.models.config, run.models.frozen, lora=run.models.lora, trainable=arrays)
    rows, first = len(arrays.get("vocabulary.new", ())), run.models.config.vocab_size
    ids = token_ids(Tokenizer.load(adapter))
    if [number for number in ids if number >= first] != list(range(first, first + rows)):
        raise UserError(
            f"vocabulary.adapter: {adapter} has {rows} new rows, but a tokenizer of {len(ids)} tokens for a base of "
            f"{first}; convert it with the tokenizer of its training"
        )


def _check_corpus(run: Run) -> None:
    """Learn the tokens of a small corpus, which may not have enough; a large corpus has. Raises UserError."""
    size = run.config.vocabulary.size
    if size is None:
        return
    documents = _first_texts(run, SMALL_CORPUS * size)
    if documents is not None:
        try:
            _learn(run, documents)
        except UserError as error:
            raise UserError(f"vocabulary: {error}") from None


def _first_texts(run: Run, budget: int) -> list[str] | None:
    """All texts of the corpus in the target language; None if they have more than `budget` bytes."""
    texts: list[str] = []
    for source in run.config.vocabulary.corpus:
        for text in run.inputs.target_texts(source):
            texts.append(text)
            budget -= _size(text)
            if budget < 0:
                return None
    return texts


def _size(text: str) -> int:
    return len(text.encode())


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write the expanded tokenizer, its report, and the adapters and rows that training starts from."""
    language = run.config.language
    if lost := rewritten_letters_message(run.models.tokenizer("base"), script_of(language.code, language.scripts)):
        run.progress.say(f"  warning: {lost}")
    adapter = run.config.vocabulary.adapter
    start = _learn_tokens(run) if adapter is None else _from_adapter(run, Path(adapter))
    new_tokens = len(start.trainable["vocabulary.new"])
    first = run.models.config.vocab_size
    if [number for number in token_ids(start.tokenizer) if number >= first] != list(range(first, first + new_tokens)):
        raise ValueError(f"the new ids of {start.tokenizer.source} are not the {new_tokens} from {first} on")
    return run.peers.run_on_primary("vocabulary's files", lambda: _write(run, directory, start, new_tokens)) or {}


@dataclass(frozen=True)
class _Start:
    """What training starts from: the expanded tokenizer, adapters and new rows, and the report on them."""

    tokenizer: Tokenizer
    trainable: dict[str, np.ndarray]
    report: dict[str, Any]


def _learn_tokens(run: Run) -> _Start:
    """Tokens learned from the corpus, with their rows and fresh adapters."""
    config = run.config
    documents, pairs = _corpus(run)
    expansion = _expansion(run, documents)
    trainable = {} if run.models.lora is None else initial_adapters(run.models.config, run.models.lora, config.seed)
    rows_made = add_new_rows(run, expansion, trainable, documents, pairs)
    return _Start(expansion.tokenizer, trainable, {**expansion.report, "initial_rows": rows_made})


def _corpus(run: Run) -> tuple[list[str], list[tuple[str, str]]]:
    """The corpus's texts in the target language; and its (English, target) pairs, if rows are made with them.

    Rows may not learn from evaluation texts what these ask for, so pairs that hold one are not among the pairs. Tokens
    are learned from all texts.
    """
    documents: list[str] = []
    pairs: list[tuple[str, str]] = []
    for source in run.config.vocabulary.corpus:
        if source.format == "pairs" and run.config.vocabulary.initial_rows == "aligned":
            found = run.inputs.read(source, "vocabulary", run.models.tokenizer("base").find_special)
            documents += [pair[1] for pair in found]
            pairs += run.inputs.uncontaminated(found, "vocabulary.initial_rows")
        else:
            documents += run.inputs.read_target(source, "vocabulary")
    return documents, pairs


def _expansion(run: Run, documents: list[str]) -> Expansion:
    """The new tokens: those of the given tokenizer, or learned from the corpus. Raises UserError."""
    config, base = run.config, run.models.tokenizer("base")
    english = config.vocabulary.english
    try:
        if config.vocabulary.size is None:
            expansion = _given_expansion(run)
            if documents:
                both = (base, expansion.tokenizer)
                before, after = (tokens_per_character(tokenizer, documents) for tokenizer in both)
                expansion.report.update(tokens_per_character_before=before, tokens_per_character_after=after)
            return expansion
        with Phases(run.progress) as tell:
            texts = None if english is None else run.inputs.read_english(english, "vocabulary")
            return _learn(run, documents, texts, tell)
    except UserError as error:
        raise UserError(f"vocabulary: {error}") from None


def _learn(
    run: Run, documents: list[str], english: list[str] | None = None, tell: OnProgress | None = None
) -> Expansion:
    """The number of tokens that the config wants, learned from the corpus. Raises UserError."""
    config = run.config
    assert config.vocabulary.size is not None
    return expand(
        run.models.tokenizer("base"),
        documents,
        size=config.vocabulary.size,
        language=config.language.code,
        scripts=config.language.scripts,
        markers=list(run.markers.in_order()),
        min_count=config.vocabulary.min_count,
        cuts=config.vocabulary.cuts,
        within_words=config.vocabulary.within_words,
        first_id=run.models.config.vocab_size,
        english=english,
        on_progress=tell,
    )


def _given_expansion(run: Run) -> Expansion:
    """The new tokens of the tokenizer that the config names. Raises UserError if it does not expand the base's."""
    assert run.config.vocabulary.tokenizer is not None
    base, given = run.models.tokenizer("base"), Tokenizer.load(run.config.vocabulary.tokenizer)
    # The chat template is the model's, whatever template the given tokenizer has.
    expanded = base.derived(given.backend, source=given.source)
    return expansion_of(base, expanded, run.markers.in_order(), first_id=run.models.config.vocab_size)


def _from_adapter(run: Run, adapter: Path) -> _Start:
    """The tokens, rows and adapters that `transllm convert from-peft` wrote, with the chain's markers added."""
    tokenizer = Tokenizer.load(adapter)
    trainable = load_arrays(adapter / "trainable")
    markers = [marker for marker in run.markers.in_order() if tokenizer.token_id(marker) is None]
    size = run.models.config.vocab_size
    if markers:
        first = size + len(trainable.get("vocabulary.new", ()))
        tokenizer, pieces = with_markers(tokenizer, markers, first_id=first)
        for path, table in base_tables(run).items():
            given = trainable.get(path, np.zeros((0, table.shape[1]), np.float32))
            known = np.concatenate([trainable.get(f"{ROWS_OF[path]}_trained", table), given])
            trainable[path] = np.concatenate([given, mean_rows(known, pieces)])
    new_tokens = len(trainable["vocabulary.new"])
    report = {
        "language": run.config.language.code,
        "adapter": str(adapter),
        "markers": list(run.markers.in_order()),
        "base_vocabulary": size,
        "vocabulary": tokenizer.vocab_size,
        "new_tokens": new_tokens,
        "initial_rows": {"adapter": new_tokens - len(markers), "mean": len(markers)},
    }
    return _Start(tokenizer, trainable, report)


def _write(run: Run, directory: Path, start: _Start, new_tokens: int) -> dict[str, Any]:
    """Write all files; returns the stage's summary."""
    trainable = start.trainable
    table = _pad_new_rows(run, trainable)
    _add_base_copies(run, trainable)
    save_expanded(without_thinking(start.tokenizer), run.models.base, directory)
    save_arrays(directory / "trainable", trainable)
    trained = {path: array for path, array in trainable.items() if trains(run.config, path)}
    counts = {
        "trainable_parameters": count_parameters(trained),
        "frozen_parameters": count_parameters(run.models.frozen),
    }
    report = {**start.report, "table": table, **counts}
    write_json(directory / "report.json", report)
    skipped = run.bad_rows.counts("vocabulary", run.config.vocabulary.sources)
    left_out = {"left_out": skipped} if skipped else {}
    return {"text": _summary_text(run, report), "new_tokens": new_tokens, **counts, **left_out}


def _pad_new_rows(run: Run, trainable: dict[str, np.ndarray]) -> dict[str, int]:
    """Pad the new rows with rows of 0 to a multiple of `pad_to_multiple_of`; returns the table's numbers of rows."""
    multiple, base = run.config.vocabulary.pad_to_multiple_of, run.models.config.vocab_size
    tokens = len(trainable["vocabulary.new"])
    padding = -tokens % multiple
    for path in ROWS_OF:
        if path in trainable:
            trainable[path] = np.pad(trainable[path], ((0, padding), (0, 0)))
    empty = sum(stop - start for start, stop in ids_without_token(run.models.tokenizer("base"), base))
    return {
        "rows": base + tokens + padding,
        "base_rows": base,
        "base_rows_without_token": empty,
        "new_rows": tokens + padding,
        "new_tokens": tokens,
        "padding_rows": padding,
        "pad_to_multiple_of": multiple,
    }


def _add_base_copies(run: Run, trainable: dict[str, np.ndarray]) -> None:
    """Add copies of the base's own weights, if these train.

    The frozen weights stay, and with them the original model. The copies have the bits that the base stores, whatever
    dtype the run computes in, so that a copy that does not train after all loses nothing.
    """
    if run.models.lora is None:
        trainable |= read_weights(run.models.base, np.float32)
    elif run.config.embeddings == "all":
        base = open_hf(run.models.base)
        for tensor in tensors(base.config):
            if tensor.path in ROWS_OF.values() and f"{tensor.path}_trained" not in trainable:
                trainable[f"{tensor.path}_trained"] = base.read(tensor).astype(np.float32)


def _summary_text(run: Run, report: Mapping[str, Any]) -> str:
    text, table, section = f"{report['new_tokens']} new tokens", report["table"], run.config.vocabulary
    if table["padding_rows"]:
        text += f" and {table['padding_rows']} rows of padding"
    if "tokens_per_character_after" in report:
        before, after = report["tokens_per_character_before"], report["tokens_per_character_after"]
        text += f"; {before:.2f} -> {after:.2f} tokens a character"
    readers = report.get("readers", {})
    if readers.get("transformers") == OTHER_IDS:
        text += f"; {rebuilt_message(run.models.config.model_type)} (vocabulary.cuts: base learns tokens that all read)"
    elif readers.get("llama.cpp") == OTHER_IDS:
        text += "; transformers and vLLM read all of its ids, llama.cpp most (all with vocabulary.cuts: base)"
    if section.adapter is not None:
        text += f" and adapters of {section.adapter}"
    if copied := report["initial_rows"].get("copy"):
        text += f"; {copied} rows of {section.rows_from}, {report['initial_rows']['mean']} made of pieces"
    return text
