"""Sound files of tokenizers that are not read: what they are, and what to give in their place."""

from __future__ import annotations

import re
from pathlib import Path

from transllm_jax.errors import UserError

_HUGGING_FACE = "give a Hugging Face directory that has tokenizer.json"
_WRITES = "AutoTokenizer.from_pretrained(...).save_pretrained(DIR) of transformers writes it"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
_LFS = b"version https://git-lfs.github.com/spec"


def no_tokenizer_json(directory: Path) -> UserError:
    """The error for a directory without tokenizer.json, which says what is there instead."""
    there = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    code = sorted(name for name in there if re.fullmatch(r"tokenization_.*\.py|.*\.tiktoken", name))
    if "tekken.json" in there:
        found = f"but tekken.json, Mistral's own format, which is not read: {_HUGGING_FACE}"
    elif {"vocab.json", "merges.txt"} <= there:
        found = f"but vocab.json and merges.txt, which do not say how text is cut: {_WRITES} from them"
    elif "vocab.txt" in there:
        found = "but vocab.txt, a WordPiece vocabulary: only BPE tokenizers are read; choose another model"
    elif code:
        found = f"but {' and '.join(code)}, a tokenizer in code of its own, which is not run: {_HUGGING_FACE}"
    elif "tokenizer.model" in there:
        found = f"but tokenizer.model: {_WRITES}"
    else:
        return UserError(
            f"{directory} has no tokenizer.json; fetch the tokenizer's files ({_WRITES} for any tokenizer)"
        )
    return UserError(f"{directory} has no tokenizer.json, {found}")


def refuse_other_format(path: Path) -> None:
    """Raises UserError for a tokenizer.model or tokenizer.json that is whole, but something else than its name says."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return  # who reads it says why
    if head.startswith(_LFS):
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself: fetch it (git lfs pull)")
    if path.suffix == ".model" and _TIKTOKEN.match(head):
        raise UserError(
            f"{path} is a tiktoken file (LLaMA-3's own format), which does not say how text is cut or which tokens are "
            f"special: {_HUGGING_FACE}, as the model's other edition has"
        )
