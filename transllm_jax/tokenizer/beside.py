"""Tokens that other files name beside tokenizer.json, from where transformers takes them.

Older versions of transformers wrote tokens that were added later to added_tokens.json or tokenizer_config.json. Who
reads tokenizer.json alone cuts such a token as ordinary text, and nothing fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from transllm_jax.disk import read_model_json
from transllm_jax.errors import UserError

_MAP, _ADDED, _CONFIG = "special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"
_MEND = (
    "load it with transformers' AutoTokenizer and save_pretrained, which writes all tokens to tokenizer.json, or "
    "remove it there"
)


def check_tokens(directory: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
    """Refuse a token that one of the files in `directory` names and tokenizer.json lacks. Raises UserError.

    config: the content of tokenizer_config.json. (Of roles, whoever needs one looks: a padding token that is nowhere
    does no harm.)
    """
    given = _read(directory / _MAP)
    for file, token in [*((_MAP, token) for token in _listed(given)), *_tokens(directory, config)]:
        if backend.token_to_id(token) is None:
            raise UserError(
                f"{directory / file} names the token {token!r}, which tokenizer.json lacks, so that a text with it "
                f"would be cut otherwise than transformers does; {_MEND}"
            )


def _tokens(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The tokens that are added, beside roles, with the file that names each."""
    decoder = config.get("added_tokens_decoder")
    for token in decoder.values() if isinstance(decoder, Mapping) else ():
        yield from ((_CONFIG, text) for text in _text(token))
    yield from ((_CONFIG, token) for token in _listed(config))
    yield from ((_ADDED, token) for token in _read(directory / _ADDED))


def _listed(named: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens without a role: a list, or an object of a name for each."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = named.get(key) or ()
        for token in value.values() if isinstance(value, Mapping) else value:
            yield from _text(token)


def _text(token: Any) -> Iterator[str]:
    text = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(text, str):
        yield text


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file, nothing where it is not there."""
    return read_model_json(path) if path.is_file() else {}
