"""tokenizer_config.json, apart from the chat template: read as transformers reads it, and written back completely.

An expanded tokenizer's config is its base's, with the new special tokens. `add_bos_token` and `add_eos_token` are kept
without effect: if there is a tokenizer.json, transformers 5 ignores them and takes the tokens around a text from that
file's post-processor. So do we (`Tokenizer.bos_ids`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tokenizers

from transllm_jax.disk import read_model_json

# A class that uses tokenizer.json unchanged.
_GENERIC = "PreTrainedTokenizerFast"
# Keys that name the base's code, which is not copied, or paths of its author.
_NOT_COPIED = frozenset({"auto_map", "tokenizer_file", "name_or_path"})
# Classes that pad on the left by default.
_LEFT = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"})
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def read_config(directory: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, and of special_tokens_map.json, which older versions of transformers wrote.

    As in transformers, the second is used if the config does not list all added tokens. Raises UserError for a missing
    or unreadable file.
    """
    config = read_model_json(
        directory / "tokenizer_config.json",
        missing="is missing: it names the end token and the chat template; copy it from the model",
    )
    if "added_tokens_decoder" not in config and (directory / "special_tokens_map.json").is_file():
        tokens = read_model_json(directory / "special_tokens_map.json")
        config |= {key: value if key == "extra_special_tokens" else _typed(value) for key, value in tokens.items()}
    if (directory / "chat_template.jinja").is_file():  # it overrides the templates in the config
        config.pop("chat_template", None)
    return config


def with_implied_settings(config: dict[str, Any], backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The config with settings that transformers takes from elsewhere, and that would be lost when it is saved.

    These are the padding and truncation of tokenizer.json, and the default padding side of the class in the config.
    """
    config = dict(config)
    padding, truncation = backend.padding or {}, backend.truncation or {}
    for key, found in (
        ("padding_side", padding.get("direction")),
        ("pad_token", padding.get("pad_token")),
        ("truncation_side", truncation.get("direction")),
    ):
        if found is not None:
            config.setdefault(key, found)
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    # For a byte-level tokenizer.json transformers uses the generic class instead of LLaMA's.
    if name in _LEFT and (name != "LlamaTokenizer" or '"ByteLevel"' not in _pre_tokenizer(backend)):
        config.setdefault("padding_side", "left")
    return config


def config_to_write(config: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json that we write, without a chat template.

    The class is generic, as one such as GPT2Tokenizer replaces our pre-tokenizer by its own in transformers 5. Cleaning
    up is off, as it removes spaces from decoded text.
    """
    kept = {key: value for key, value in config.items() if key not in _NOT_COPIED and key != "chat_template"}
    return {**kept, "tokenizer_class": _GENERIC, "clean_up_tokenization_spaces": False}


def extended_config(config: dict[str, Any], base: tokenizers.Tokenizer, grown: tokenizers.Tokenizer) -> dict[str, Any]:
    """A copy of a base's config that also names the special tokens that `grown` has and `base` lacks."""
    config = copy.deepcopy(config)
    known = {token.content for token in base.get_added_tokens_decoder().values()}
    new = {
        number: token
        for number, token in sorted(grown.get_added_tokens_decoder().items())
        if token.special and token.content not in known
    }
    if not new:
        return config
    # transformers 4 reads the first name, 5 both; the second wins unless it is empty. The second may also be a dict of
    # named tokens, which are in addition to those of the first.
    lists = [key for key in ("additional_special_tokens", "extra_special_tokens") if _is_filled(config.get(key))]
    for key in lists or ["additional_special_tokens"]:
        listed = list(config.get(key) or [])
        named = {token.get("content") if isinstance(token, dict) else token for token in listed}
        config[key] = listed + [token.content for token in new.values() if token.content not in named]
    if config.get("added_tokens_decoder"):
        config["added_tokens_decoder"] |= {
            str(number): {flag: getattr(token, flag) for flag in _FLAGS} for number, token in new.items()
        }
    return config


def _typed(value: Any) -> Any:
    """A token of special_tokens_map.json, or a list of them, as tokenizer_config.json writes it."""
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return {"__type": "AddedToken", **value, "special": True} if isinstance(value, dict) else value


def _is_filled(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _pre_tokenizer(backend: tokenizers.Tokenizer) -> str:
    step = backend.pre_tokenizer
    return "" if step is None else step.__getstate__().decode()
