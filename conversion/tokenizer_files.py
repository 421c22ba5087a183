"""The files of a tokenizer directory, and what can be said of them without loading the tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from conversion.directories import read_json
from transllm_jax.errors import UserError

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


def require_tokenizer(directory: Path) -> None:
    """Raises UserError unless `directory` has a `tokenizer.json`, the form that all of our readers share."""
    if (directory / "tokenizer.json").is_file():
        return
    mend = "fetch the tokenizer's files"
    if (directory / "tokenizer.model").is_file():
        mend = "load it once with transformers' AutoTokenizer and save_pretrained, which writes tokenizer.json"
    raise UserError(f"{directory} has no tokenizer.json; {mend}")


def token_ids(directory: Path) -> set[int]:
    """All token ids that `tokenizer.json` can produce, added tokens among them."""
    path = directory / "tokenizer.json"
    raw = read_json(path)
    try:
        vocabulary = raw["model"]["vocab"]
        ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
        return ids | {token["id"] for token in raw.get("added_tokens") or []}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} has no vocabulary that can be read ({error}); fetch it again") from None
