"""The files of a tokenizer directory: copies them, and reads what does not need the tokenizer itself."""

from __future__ import annotations

import shutil
from pathlib import Path

from transllm_jax.conversion.hf.sentencepiece_tokenizer import write_tokenizer_json
from transllm_jax.disk import read_model_json
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.formats import no_tokenizer_json, refuse_other_format

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


def copy_tokenizer(src: Path, dst: Path) -> None:
    """Copy a tokenizer's files. Raises UserError if `src` holds no tokenizer."""
    require_tokenizer(src)
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)


def copy_or_make_tokenizer(src: Path, dst: Path) -> None:
    """Copy a tokenizer's files; if it has no `tokenizer.json`, make one from its `tokenizer.model`.

    Raises UserError if `src` holds no tokenizer, or one from which no tokenizer.json can be made.
    """
    if (src / "tokenizer.json").is_file() or not (src / "tokenizer.model").is_file():
        copy_tokenizer(src, dst)
        return
    fix = "load it once with transformers' AutoTokenizer and save_pretrained, which writes tokenizer.json"
    refuse_other_format(src / "tokenizer.model")
    path = src / "tokenizer_config.json"
    config = read_model_json(path)
    if (src / "added_tokens.json").is_file():
        raise UserError(f"{src} has no tokenizer.json, and added_tokens.json beside tokenizer.model; {fix}")
    if config.get("legacy") is False:
        raise UserError(f"{path} says legacy=false, and {src} has no tokenizer.json; {fix}")
    write_tokenizer_json(
        src / "tokenizer.model",
        dst,
        add_bos=bool(config.get("add_bos_token", True)),
        add_eos=bool(config.get("add_eos_token", False)),
    )
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)


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
