"""What stands in tokenizer_config.json beside the chat template: read as transformers reads it, and written back whole.

What an expanded tokenizer says of itself is what its base says, and the new special tokens. `add_bos_token` and
`add_eos_token` are kept, and change nothing: beside a tokenizer.json transformers 5 does not read them, and takes what
stands around a text from the file's post-processor. So do we (`Tokenizer.bos_ids`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tokenizers

from transllm_jax.disk import read_model_json

# A class that takes tokenizer.json as it is.
_GENERIC = "PreTrainedTokenizerFast"
# Code beside the base, which is not copied, and paths of its author.
_ELSEWHERE = frozenset({"auto_map", "tokenizer_file", "name_or_path"})
# Classes that pad on the left unless they are told where.
_LEFT = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"})
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def read_config(directory: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, and of special_tokens_map.json, which older versions of transformers wrote.

    As in transformers the second counts where the config does not list all added tokens. Raises UserError for a file
    that is missing or unreadable.
    """
    config = read_model_json(
        directory / "tokenizer_config.json",
        missing="is missing: it names the end token and the chat template; copy it from the model",
    )
    if "added_tokens_decoder" not in config and (directory / "special_tokens_map.json").is_file():
        tokens = read_model_json(directory / "special_tokens_map.json")
        config |= {key: value if key == "extra_special_tokens" else _typed(value) for key, value in tokens.items()}
    if (directory / "chat_template.jinja").is_file():  # which hides those of the config
        config.pop("chat_template", None)
    return config


def completed(config: dict[str, Any], backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The config with what transformers takes from the padding and truncation of tokenizer.json, and the padding side
    of the class that it names: neither goes along otherwise."""
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
    # A byte-level file makes transformers take the generic class in the place of LLaMA's.
    if name in _LEFT and (name != "LlamaTokenizer" or '"ByteLevel"' not in _pre_tokenizer(backend)):
        config.setdefault("padding_side", "left")
    return config


def config_to_write(config: dict[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json says of a tokenizer that is ours, without a chat template.

    A named class such as GPT2Tokenizer rebuilds its own pre-tokenizer when transformers 5 loads it and so loses ours.
    Cleaning up would take spaces out of a text that is decoded.
    """
    kept = {key: value for key, value in config.items() if key not in _ELSEWHERE and key != "chat_template"}
    return {**kept, "tokenizer_class": _GENERIC, "clean_up_tokenization_spaces": False}


def extended_config(config: dict[str, Any], base: tokenizers.Tokenizer, grown: tokenizers.Tokenizer) -> dict[str, Any]:
    """A copy of a base's config that names the special tokens which `grown` has and `base` lacks, too."""
    config = copy.deepcopy(config)
    there = {token.content for token in base.get_added_tokens_decoder().values()}
    new = {
        number: token
        for number, token in sorted(grown.get_added_tokens_decoder().items())
        if token.special and token.content not in there
    }
    if not new:
        return config
    # Version 4 knows the first name, version 5 both; the second wins unless it is empty, and may also be a dict of
    # named tokens, which stand beside those of the first.
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
