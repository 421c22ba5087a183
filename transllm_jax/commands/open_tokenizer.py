"""Open a tokenizer, whatever it is: a model or tokenizer directory, a run, a GGUF file, its own file, or a hub name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transllm_jax.conversion.fetch import fetch
from transllm_jax.conversion.gguf.header import read_header
from transllm_jax.conversion.gguf.tokenizer import write_tokenizer
from transllm_jax.conversion.hf.tokenizer_files import copy_or_make_tokenizer, make_from_file, tokenizer_file
from transllm_jax.disk import read_model_json
from transllm_jax.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenedTokenizer:
    """A tokenizer and the directory of its files.

    rows: rows of the embedding table of the model in the same directory, which can exceed the number of tokens; None
    without a model.
    """

    tokenizer: Tokenizer
    directory: Path
    rows: int | None = None


def open_tokenizer(source: str, scratch: Path, say: Callable[[str], None] | None = None) -> OpenedTokenizer:
    """Open a tokenizer. If there is no tokenizer.json, one is made in `scratch`, which must outlive the result.

    source: a directory with tokenizer.json or tokenizer.model, a run's work directory (its newest vocabulary), a
    `.gguf` file, a tokenizer.json or a SentencePiece model, whatever its name, or org/name on the hub (the model is
    fetched, too). Raises UserError for anything else.
    """
    path = Path(source).expanduser()
    if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        path = path.parent  # the other file names the special tokens, and there may be more
        source = str(path)
    if path.is_file() and path.suffix != ".gguf":
        scratch.mkdir(parents=True, exist_ok=True)
        make_from_file(path, scratch)
        return OpenedTokenizer(_named(Tokenizer.load(scratch), source), scratch)
    if (path / "run.yaml").is_file():
        base = path / "base"
        path = path / "vocabulary" if (path / "vocabulary" / "tokenizer.json").is_file() else base
        return OpenedTokenizer(Tokenizer.load(path, model=base), path)
    fetched = fetch(source, say=say)
    if fetched.kind == "gguf":
        fields, _ = read_header(fetched.path)
        scratch.mkdir(parents=True, exist_ok=True)
        write_tokenizer(fields, scratch, fetched.path)
        return OpenedTokenizer(_named(Tokenizer.load(scratch), source), scratch)
    directory = fetched.path
    rows = None
    if (directory / "config.json").is_file():
        rows = read_model_json(directory / "config.json").get("vocab_size")
    if tokenizer_file(directory).name == "tokenizer.model":
        scratch.mkdir(parents=True, exist_ok=True)
        copy_or_make_tokenizer(directory, scratch)
        directory = scratch
    return OpenedTokenizer(
        _named(Tokenizer.load(directory, model=fetched.path), source),
        directory,
        rows if isinstance(rows, int) else None,
    )


def _named(tokenizer: Tokenizer, source: str) -> Tokenizer:
    tokenizer.source = source
    return tokenizer
