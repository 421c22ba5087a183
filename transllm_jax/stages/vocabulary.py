"""Stage 1: learn tokens of the target language, initialise their rows, add adapters (TransLLM, arXiv 2405.13923).

The model's answers to English text are unchanged: base ids do not move and the adapters begin at zero.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conversion.adapter import ADAPTER, read_adapter
from conversion.hf.directory import open_hf, read_parts, read_weights
from conversion.hf.safetensors_io import dtype_of
from conversion.names import tensors
from conversion.store import MANIFEST
from conversion.token_rows import TokenRows, open_token_rows
from transllm_jax.config import Source, Vocabulary
from transllm_jax.disk import write_json
from transllm_jax.errors import UserError
from transllm_jax.model.parameters import assemble, count_parameters, initial_adapters
from transllm_jax.progress import Phases
from transllm_jax.stages.new_rows import calibrated, mean_rows, random_rows, text_states, token_counts, weighted_rows
from transllm_jax.stages.points import token_ids, tokenless, trains
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
from transllm_jax.tokenizer.growing.prune import OnProgress
from transllm_jax.tokenizer.growing.runs import check_supported
from transllm_jax.tokenizer.llama_cpp import OTHER_IDS, rebuilt_message
from transllm_jax.tokenizer.rewritten import rewritten_letters_message
from transllm_jax.tokenizer.scripts import script_of
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays, save_arrays

# Bytes of a corpus a wanted token up to which it may be too small for them; to learn from so much takes seconds.
TRIED = 200

# How rows were made -> how many of them.
Ways = dict[str, int]


def inputs(run: Run) -> dict[str, Any]:
    """What this stage reads: files and config sections."""
    config = run.config
    return {
        "vocabulary": config.vocabulary.model_dump(),
        "lora": "none" if config.lora is None else config.lora.model_dump(),
        "language": config.language.model_dump(),
        "markers": config.markers.model_dump(),
        "embeddings": config.embeddings,
        "seed": config.seed,
        **run.inputs.source_hashes(run.config.vocabulary.sources),
        **run.inputs.hashes(_files_of(run.config.vocabulary.rows_from)),
        **run.inputs.hashes(_named_files(config.vocabulary)),
    }


def _named_files(section: Vocabulary) -> list[str]:
    """The files that identify the tokenizer and the adapter that the config names."""
    tokenizer = [] if section.tokenizer is None else [f"{section.tokenizer}/tokenizer.json"]
    return tokenizer + ([] if section.adapter is None else [f"{section.adapter}/{ADAPTER}"])


def _files_of(directory: str | None) -> list[str]:
    """The files of a model directory that its rows and tokens follow from."""
    if directory is None:
        return []
    # A checkpoint of ours has the checksums of its arrays in its manifest.
    ours = (Path(directory) / MANIFEST).is_file()
    weights = f"{directory}/{MANIFEST}" if ours else f"{glob.escape(directory)}/*.safetensors"
    return [f"{directory}/config.json", f"{directory}/tokenizer.json", weights]


def require_language(run: Run) -> None:
    """Refuse a language whose script is not known. Raises UserError."""
    try:
        script_of(run.config.language.code, run.config.language.scripts)
    except UserError as error:
        raise UserError(f"language.code: {error}") from None


def require_corpus(run: Run) -> None:
    """Refuse a corpus that is too small for the tokens that are wanted, whatever the base. Raises UserError.

    A new token is a character that the base lacks, or what a merge made: it has at least one byte of the text, and
    stands in it `min_count` times. Characters are counted before merges are, so a byte may count for one of each.
    """
    section = run.config.vocabulary
    if section.size is None:
        return
    least = -(-section.size * section.min_count // 2)
    texts = _first_texts(run, least)
    if texts is not None and (found := sum(map(_size, texts))) < least:
        raise UserError(
            f"vocabulary.corpus gives {found:,} bytes of text: {section.size:,} tokens, each {section.min_count} times,"
            f" need {least:,} at the very least, and many times that for good ones; raise max_bytes or add "
            "text, or lower vocabulary.size"
        )


def _first_texts(run: Run, budget: int) -> list[str] | None:
    """All texts of the corpus in the target language; None where they have more than `budget` bytes."""
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


def _check_corpus(run: Run) -> None:
    """Learn the tokens of a small corpus, for what it cannot give to be known now; a large one gives them."""
    size = run.config.vocabulary.size
    if size is None:
        return
    documents = _first_texts(run, TRIED * size)
    if documents is not None:
        try:
            _learn(run, documents)
        except UserError as error:
            raise UserError(f"vocabulary: {error}") from None


def check(run: Run) -> None:
    """What can be known to be wrong before this stage begins. Raises UserError."""
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
        _token_rows(run)
    for marker in run.markers.in_order():
        if base.token_id(marker) is not None:
            raise UserError(f"markers: {base.source} has the token {marker} already; choose another marker")
    for source in run.config.vocabulary.sources:
        run.inputs.check(source)
    _check_corpus(run)


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write the expanded tokenizer, its report, and the adapters and rows that training starts from."""
    language = run.config.language
    if lost := rewritten_letters_message(run.models.tokenizer("base"), script_of(language.code, language.scripts)):
        run.progress.say(f"  warning: {lost}")
    given = run.config.vocabulary.adapter
    tokenizer, trainable, report = _learned(run) if given is None else _brought(run, Path(given))
    new_tokens = len(trainable["vocabulary.new"])
    first = run.models.config.vocab_size
    if [number for number in token_ids(tokenizer) if number >= first] != list(range(first, first + new_tokens)):
        raise ValueError(f"the new ids of {tokenizer.source} are not the {new_tokens} from {first} on")
    return (
        run.peers.run_on_primary("vocabulary's files", lambda: _written(run, directory, tokenizer, trainable, report))
        or {}
    )


def _written(
    run: Run, directory: Path, tokenizer: Tokenizer, trainable: dict[str, np.ndarray], report: dict[str, Any]
) -> dict[str, Any]:
    """Write all files; the summary of the stage."""
    given, new_tokens = run.config.vocabulary.adapter, len(trainable["vocabulary.new"])
    report["table"] = table = _round(run, trainable)
    # Copies train: the frozen weights stay, and with them the original model. They are copies of what the base stores,
    # whatever type the run computes in, so that what is not trained after all keeps its bits.
    if run.models.lora is None:
        trainable |= read_weights(run.models.base, np.float32)
    elif run.config.embeddings == "all":
        base = open_hf(run.models.base)
        for tensor in tensors(base.config):
            if tensor.path in ROWS_OF.values() and f"{tensor.path}_trained" not in trainable:
                trainable[f"{tensor.path}_trained"] = base.read(tensor).astype(np.float32)
    save_expanded(without_thinking(tokenizer), run.models.base, directory)
    save_arrays(directory / "trainable", trainable)
    trained = {path: array for path, array in trainable.items() if trains(run.config, path)}
    counts = {
        "trainable_parameters": count_parameters(trained),
        "frozen_parameters": count_parameters(run.models.frozen),
    }
    write_json(directory / "report.json", {**report, **counts})
    text = f"{report['new_tokens']} new tokens"
    if table["padding_rows"]:
        text += f" and {table['padding_rows']} rows of padding"
    if "tokens_per_character_after" in report:
        before, after = report["tokens_per_character_before"], report["tokens_per_character_after"]
        text += f"; {before:.2f} -> {after:.2f} tokens a character"
    readers = report.get("readers", {})
    if readers.get("transformers") == OTHER_IDS:
        text += f"; {rebuilt_message(run.models.config.model_type)} (vocabulary.cuts: base is)"
    elif readers.get("llama.cpp") == OTHER_IDS:
        text += "; not to be read by llama.cpp, which cuts text as the base does (vocabulary.cuts: base is)"
    if given is not None:
        text += f" and adapters of {given}"
    if copied := report["initial_rows"].get("copy"):
        text += f"; {copied} rows of {run.config.vocabulary.rows_from}, {report['initial_rows']['mean']} made of pieces"
    skipped = run.bad_rows.counts("vocabulary", run.config.vocabulary.sources)
    return {"text": text, "new_tokens": new_tokens, **counts, **({"left_out": skipped} if skipped else {})}


def _round(run: Run, trainable: dict[str, np.ndarray]) -> dict[str, int]:
    """Round the new rows up, with rows of 0 behind the last token; what the whole table then holds."""
    multiple, base = run.config.vocabulary.pad_to_multiple_of, run.models.config.vocab_size
    tokens = len(trainable["vocabulary.new"])
    padding = -tokens % multiple
    for path in ROWS_OF:
        if path in trainable:
            trainable[path] = np.pad(trainable[path], ((0, padding), (0, 0)))
    empty = sum(stop - start for start, stop in tokenless(run.models.tokenizer("base"), base))
    return {
        "rows": base + tokens + padding,
        "base_rows": base,
        "base_rows_without_token": empty,
        "new_rows": tokens + padding,
        "new_tokens": tokens,
        "padding_rows": padding,
        "pad_to_multiple_of": multiple,
    }


def _tables(run: Run) -> dict[str, np.ndarray]:
    """The base's rows that the new rows begin from, by the path of the new ones, as the run's dtype has them."""
    model, dtype = open_hf(run.models.base), dtype_of(run.config.model.dtype)
    tied = run.models.config.tie_word_embeddings
    return {
        path: read_parts(model, base, [(slice(None), slice(None))], dtype)[0].astype(np.float32)
        for path, base in ROWS_OF.items()
        if not (tied and path == "vocabulary.output_new")
    }


def _learned(run: Run) -> tuple[Tokenizer, dict[str, np.ndarray], dict[str, Any]]:
    """Tokens learned from the corpus; their rows, and fresh adapters."""
    config = run.config
    documents = [text for source in config.vocabulary.corpus for text in run.inputs.read_target(source, "vocabulary")]
    expansion = _expansion(run, documents)
    trainable = {} if run.models.lora is None else initial_adapters(run.models.config, run.models.lora, config.seed)
    ways = _rows(run, expansion, trainable, documents)
    return expansion.tokenizer, trainable, {**expansion.report, "initial_rows": ways}


def _expansion(run: Run, documents: list[str]) -> Expansion:
    """The tokens, learned from the corpus or brought by a tokenizer. Raises UserError."""
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
    """As many tokens as the config wants, learned from the corpus. Raises UserError."""
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
        first_id=run.models.config.vocab_size,
        english=english,
        on_progress=tell,
    )


def _given_expansion(run: Run) -> Expansion:
    """That of the tokenizer that the config names. Raises UserError where it is not one of the base."""
    assert run.config.vocabulary.tokenizer is not None
    base, found = run.models.tokenizer("base"), Tokenizer.load(run.config.vocabulary.tokenizer)
    # The conversation's form is the model's, whatever the tokenizer was expanded with.
    expanded = base.derived(found.backend, source=found.source)
    return expansion_of(base, expanded, run.markers.in_order(), first_id=run.models.config.vocab_size)


def _rows(run: Run, expansion: Expansion, trainable: dict[str, np.ndarray], documents: Sequence[str]) -> Ways:
    """Add the new rows to `trainable`; says how they were made."""
    config, pieces, base = run.config.vocabulary, expansion.pieces, run.models.tokenizer("base")
    counts = np.zeros(0, np.int64)
    if config.initial_rows == "weighted":
        counts = token_counts(base, documents, 0, run.models.config.vocab_size)
    for number, (path, table) in enumerate(_tables(run).items()):
        if config.initial_rows == "weighted":
            trainable[path] = weighted_rows(table, pieces, counts)
        elif config.initial_rows == "random":
            trainable[path] = random_rows(table[token_ids(base)], len(pieces), run.seed_for("new rows"), number)
        else:
            trainable[path] = mean_rows(table, pieces)
    if config.initial_rows == "copy":
        return _copy(run, expansion, trainable)
    if config.initial_rows == "calibrated" and config.english is not None:
        return _calibrate(run, expansion.tokenizer, trainable, documents, config.english)
    return {config.initial_rows: len(pieces)}


def _token_rows(run: Run) -> TokenRows:
    """The model that rows are copied from. Raises UserError for one that they cannot be copied from."""
    assert run.config.vocabulary.rows_from is not None
    try:
        return open_token_rows(run.config.vocabulary.rows_from, run.models.config)
    except UserError as error:
        raise UserError(f"vocabulary.rows_from: {error}") from None


def _copy(run: Run, expansion: Expansion, trainable: dict[str, np.ndarray]) -> Ways:
    """Put the rows that another model has for the new tokens in the place of `trainable`'s."""
    other, first = _token_rows(run), run.models.config.vocab_size
    tokens = [str(expansion.tokenizer.token(first + number)) for number in range(len(expansion.pieces))]
    try:
        found = other.ids(tokens)
        known = np.array([number is not None for number in found])
        for path, rows in other.rows([number for number in found if number is not None]).items():
            trainable[path][known] = rows
    except UserError as error:
        raise UserError(f"vocabulary.rows_from: {error}") from None
    return {"copy": int(known.sum()), "mean": int((~known).sum())}


def _brought(run: Run, adapter: Path) -> tuple[Tokenizer, dict[str, np.ndarray], dict[str, Any]]:
    """The tokens, rows and adapters of `transllm convert from-peft`; the markers are added."""
    tokenizer = Tokenizer.load(adapter)
    trainable = load_arrays(adapter / "trainable")
    markers = [marker for marker in run.markers.in_order() if tokenizer.token_id(marker) is None]
    size = run.models.config.vocab_size
    made = 0
    if markers:
        first = size + len(trainable.get("vocabulary.new", ()))
        tokenizer, words = with_markers(tokenizer, markers, first_id=first)
        for path, table in _tables(run).items():
            brought = trainable.get(path, np.zeros((0, table.shape[1]), np.float32))
            known = np.concatenate([trainable.get(f"{ROWS_OF[path]}_trained", table), brought])
            trainable[path] = np.concatenate([brought, mean_rows(known, words)])
        made = len(markers)
    report = {
        "language": run.config.language.code,
        "adapter": str(adapter),
        "markers": list(run.markers.in_order()),
        "base_vocabulary": size,
        "vocabulary": tokenizer.vocab_size,
        "new_tokens": len(trainable["vocabulary.new"]),
        "initial_rows": {"adapter": len(trainable["vocabulary.new"]) - made, "mean": made},
    }
    return tokenizer, trainable, report


# The path of new rows -> that of the base's rows of the same table.
ROWS_OF = {"vocabulary.new": "vocabulary.base", "vocabulary.output_new": "vocabulary.output_base"}


def _check_adapter(run: Run, adapter: Path) -> None:
    """Refuse an adapter of another base or shape than the run's. Raises UserError."""
    found = read_adapter(adapter)
    if not found.fits(open_hf(run.models.base)):
        raise UserError(
            f"vocabulary.adapter: {adapter} was made for another base than {run.models.base}; convert it again"
        )
    # A config without adapters cannot name one.
    assert run.models.lora is not None
    wanted = {"rank": found.lora.rank, "alpha": found.lora.alpha, "rslora": found.lora.rslora}
    wrong = [f"lora.{name}={value}" for name, value in wanted.items() if getattr(run.models.lora, name) != value]
    if set(found.lora.targets) != set(run.models.lora.targets):
        wrong.append(f"lora.targets=[{','.join(found.lora.targets)}]")
    arrays = load_arrays(adapter / "trainable")
    if "vocabulary.base_trained" in arrays and run.config.embeddings != "all":
        wrong.append("embeddings=all")
    if wrong:
        raise UserError(f"vocabulary.adapter: {adapter} needs {' '.join(wrong)}; set it")
    # Lists what is missing or misshapen.
    base = run.models.config
    assemble(base, run.models.frozen, lora=run.models.lora, trainable=arrays)
    tokenizer, rows, first = (
        Tokenizer.load(adapter),
        len(arrays.get("vocabulary.new", ())),
        run.models.config.vocab_size,
    )
    ids = token_ids(tokenizer)
    if [number for number in ids if number >= first] != list(range(first, first + rows)):
        raise UserError(
            f"vocabulary.adapter: {adapter} has {rows} new rows, but a tokenizer of {len(ids)} tokens for a base of "
            f"{first}; convert it with the tokenizer of its training"
        )


def _calibrate(
    run: Run, tokenizer: Tokenizer, trainable: dict[str, np.ndarray], documents: Sequence[str], english: Source
) -> Ways:
    """Give the new output rows their frequency as a prior; the tokens' counts are those in the corpus."""
    models, base = run.models, run.models.config
    path = "vocabulary.new" if base.tie_word_embeddings else "vocabulary.output_new"
    split = assemble(base, models.frozen, lora=models.lora, trainable=trainable, layout=models.layout)
    counts = token_counts(tokenizer, documents, base.vocab_size, len(trainable[path]))
    trainable[path] = calibrated(
        trainable[path],
        counts,
        text_states(split, tokenizer, documents),
        text_states(split, tokenizer, run.inputs.read_english(english, "vocabulary")),
        _tables(run)[path][token_ids(run.models.tokenizer("base"))],
    )
    return {"calibrated": int((counts > 0).sum()), "mean": int((counts == 0).sum())}
