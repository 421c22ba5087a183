"""Checks that tokenizer.json has the tokens named in the other files, from which transformers reads them too.

Older versions of transformers wrote tokens that were added later to added_tokens.json or tokenizer_config.json. A
program that reads only tokenizer.json then splits such a token as ordinary text, without an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from transllm_jax.disk import read_model_json
from transllm_jax.errors import UserError

_MAP, _ADDED, _CONFIG = "special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"
_FIX = (
    "load it with transformers' AutoTokenizer and save_pretrained, which writes all tokens to tokenizer.json, or "
    "remove it there"
)


def check_tokens(directory: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
    """Raise UserError for a token that one of the files in `directory` names and tokenizer.json lacks.

    config: the content of tokenizer_config.json. (Roles are checked when they are used: a missing padding token does no
    harm.)
    """
    given = _read(directory / _MAP)
    for file, token in [*((_MAP, token) for token in _listed(given)), *_tokens(directory, config)]:
        if backend.token_to_id(token) is None:
            raise UserError(
                f"{directory / file} names the token {token!r}, which tokenizer.json lacks, so a text with it would "
                f"not be tokenised as transformers does; {_FIX}"
            )


def _tokens(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The added tokens, without roles, each with the file that names it."""
    decoder = config.get("added_tokens_decoder")
    for token in decoder.values() if isinstance(decoder, Mapping) else ():
        yield from ((_CONFIG, text) for text in _text(token))
    yield from ((_CONFIG, token) for token in _listed(config))
    yield from ((_ADDED, token) for token in _read(directory / _ADDED))


def _listed(named: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens without a role: a list, or an object with a name for each."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = named.get(key) or ()
        for token in value.values() if isinstance(value, Mapping) else value:
            yield from _text(token)


def _text(token: Any) -> Iterator[str]:
    text = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(text, str):
        yield text


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return read_model_json(path) if path.is_file() else {}
