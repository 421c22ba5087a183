"""Tokenizer files in formats that are not read: says what they are, and what to give instead."""

from __future__ import annotations

import re
from pathlib import Path

from transllm_jax.errors import UserError

_HUGGING_FACE = "give a Hugging Face directory that has tokenizer.json"
_WRITES = "AutoTokenizer.from_pretrained(...).save_pretrained(DIR) of transformers writes it"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
_LFS = b"version https://git-lfs.github.com/spec"


def no_tokenizer_json(directory: Path) -> UserError:
    """The error for a directory without tokenizer.json, which says what it has instead."""
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    code = sorted(name for name in names if re.fullmatch(r"tokenization_.*\.py|.*\.tiktoken", name))
    if "tekken.json" in names:
        found = f"but tekken.json, Mistral's own format, which is not read: {_HUGGING_FACE}"
    elif {"vocab.json", "merges.txt"} <= names:
        found = f"but vocab.json and merges.txt, which do not say how text is cut: {_WRITES} from them"
    elif "vocab.txt" in names:
        found = "but vocab.txt, a WordPiece vocabulary: only BPE tokenizers are read; choose another model"
    elif code:
        found = f"but {' and '.join(code)}, a tokenizer with code of its own, which is not run: {_HUGGING_FACE}"
    elif "tokenizer.model" in names:
        found = f"but tokenizer.model: {_WRITES}"
    else:
        return UserError(
            f"{directory} has no tokenizer.json; fetch the tokenizer's files ({_WRITES} for any tokenizer)"
        )
    return UserError(f"{directory} has no tokenizer.json, {found}")


def refuse_other_format(path: Path) -> None:
    """Raises UserError for a file of a tokenizer (.json, or SentencePiece's) that is intact, but in another format."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return  # reading it will raise the error
    if head.startswith(_LFS):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: fetch it (git lfs pull)")
    if path.suffix != ".json" and _TIKTOKEN.match(head):
        raise UserError(
            f"{path} is a tiktoken file (LLaMA-3's own format), which does not say how text is cut or which tokens are "
            f"special: {_HUGGING_FACE}, such as the model's other edition"
        )
