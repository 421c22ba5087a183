"""The files of a tokenizer directory: copies them, and reads what does not need the tokenizer itself."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transllm_jax.conversion.hf.sentencepiece_tokenizer import write_tokenizer_json
from transllm_jax.disk import read_model_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.formats import no_tokenizer_json, refuse_other_format
from transllm_jax.tokenizer.sentencepiece_model import special_pieces
from transllm_jax.tokenizer.tokenizer import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


# The class whose defaults a SentencePiece model follows.
_CLASS = "LlamaTokenizer"


def copy_tokenizer(src: Path, dst: Path) -> None:
    """Copy a tokenizer's files. Raises UserError if `src` holds no tokenizer."""
    require_tokenizer(src)
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)


def tokenizer_file(directory: Path) -> Path:
    """The file that a tokenizer is read from: tokenizer.json, or tokenizer.model if there is only that."""
    path, model = directory / "tokenizer.json", directory / "tokenizer.model"
    return model if model.is_file() and not path.is_file() else path


def copy_or_make_tokenizer(src: Path, dst: Path) -> None:
    """Copy a tokenizer's files; if it has no `tokenizer.json`, make one from its `tokenizer.model`.

    Special tokens that no other file names are then those of `tokenizer.model`. Raises UserError if `src` holds no
    tokenizer, or one from which no tokenizer.json can be made.
    """
    if tokenizer_file(src).name == "tokenizer.json":
        copy_tokenizer(src, dst)
        return
    fix = "load it once with transformers' AutoTokenizer and save_pretrained, which writes tokenizer.json"
    refuse_other_format(src / "tokenizer.model")
    path = src / "tokenizer_config.json"
    config = read_model_json(path) if path.is_file() else {}
    if (src / "added_tokens.json").is_file():
        raise UserError(f"{src} has no tokenizer.json, and added_tokens.json beside tokenizer.model; {fix}")
    if config.get("legacy") is False:
        raise UserError(f"{path} says legacy=false, and {src} has no tokenizer.json; {fix}")
    found = special_pieces(src / "tokenizer.model")
    write_tokenizer_json(
        src / "tokenizer.model",
        dst,
        # Without a config, whether there is a BOS piece decides.
        add_bos=bool(config.get("add_bos_token", "bos_token" in found or path.is_file())),
        add_eos=bool(config.get("add_eos_token", False)),
    )
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)
    named = src / "special_tokens_map.json"
    known = {**config, **(read_model_json(named) if named.is_file() else {})}
    if missing := {role: piece for role, piece in found.items() if role not in known}:
        write_json(dst / "tokenizer_config.json", {"tokenizer_class": _CLASS, **missing, **config})


def make_from_file(file: Path, dst: Path) -> None:
    """Write a tokenizer directory from one file: a tokenizer.json (any name that ends in .json), or SentencePiece's.

    Its special tokens are those of a SentencePiece model; a tokenizer.json does not say which is which. Raises
    UserError if the file is neither, or cannot be converted.
    """
    if file.suffix == ".json":
        shutil.copyfile(file, dst / "tokenizer.json")
        write_json(dst / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        return
    found = special_pieces(file)
    write_tokenizer_json(file, dst, add_bos="bos_token" in found)
    shutil.copyfile(file, dst / "tokenizer.model")
    write_json(dst / "tokenizer_config.json", {"tokenizer_class": _CLASS, **found})


@contextmanager
def readable_tokenizer(directory: Path | None) -> Iterator[Path | None]:
    """`directory`, or a temporary copy of its tokenizer with a tokenizer.json, if it has only a tokenizer.model.

    Raises UserError if none can be made from it.
    """
    if directory is None or tokenizer_file(directory).name == "tokenizer.json":
        yield directory
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy_or_make_tokenizer(directory, Path(scratch))
        yield Path(scratch)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """`Tokenizer.load`, also of a directory that has a tokenizer.model and no tokenizer.json. Raises UserError."""
    directory = Path(directory)
    with readable_tokenizer(directory) as readable:
        tokenizer = Tokenizer.load(readable or directory, model=directory)
    tokenizer.source = str(directory)
    return tokenizer


def require_tokenizer(directory: Path) -> None:
    """Raises UserError unless `directory` has a `tokenizer.json`, which all of our code reads."""
    if not (directory / "tokenizer.json").is_file():
        raise no_tokenizer_json(directory)


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds any file from which a tokenizer can be loaded."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def token_ids(directory: Path, where: str | Path | None = None) -> set[int]:
    """All token ids of `tokenizer.json`, with those of added tokens. `where` names the directory in messages."""
    path = directory / "tokenizer.json"
    raw = read_model_json(path)
    path = Path(where or directory) / "tokenizer.json"
    try:
        vocabulary = raw["model"]["vocab"]
        ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
        return ids | {token["id"] for token in raw.get("added_tokens") or []}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} has no vocabulary that can be read ({error}); fetch it again") from None
