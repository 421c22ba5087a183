"""A tokenizer directory out of a GGUF file's fields, with the `tokenizers` library alone.

transformers reads a GGUF tokenizer only where torch is installed, and cuts text by GPT-2's pattern where it
does not know the pre-tokenizer's name (for `smollm`, "a  1" then loses its two-space token). llama.cpp keys
the pre-tokenizer on `tokenizer.ggml.pre` (src/llama-vocab.cpp); only names whose rule is certain are
accepted here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from conversion.directories import write_json
from transllm_jax.errors import UserError

_CONTROL = 3
_USER_DEFINED = 4

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


def _pre_tokenizer(name: str) -> Any:
    """The rule behind `tokenizer.ggml.pre`, or None if the name is not known."""
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _LLAMA3_NAMES:
        split = pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return None


def special_ids(fields: dict[str, Any]) -> dict[str, int]:
    """Hugging Face's `{"bos_token_id": id, ...}` for bos, eos, unk and pad, as far as the file has them."""
    return {
        f"{name}_token_id": int(fields[f"tokenizer.ggml.{field}"])
        for name, field in _IDS.items()
        if f"tokenizer.ggml.{field}" in fields
    }


def write_tokenizer(fields: dict[str, Any], directory: str | Path, where: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    `fields` are the GGUF file's metadata by name, `where` is the file's path for messages. Raises UserError
    for a tokenizer model other than byte-level BPE (`gpt2`), a pre-tokenizer that is not known,
    inconsistent fields, and a file without a chat template.
    """
    directory = Path(directory)
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise UserError(
            f"{where}: the tokenizer is of type {model!r}, only 'gpt2' (byte-level BPE) is read from GGUF; "
            "use the model's Hugging Face directory"
        )
    name = fields.get("tokenizer.ggml.pre")
    pre_tokenizer = _pre_tokenizer(str(name))
    if pre_tokenizer is None:
        raise UserError(
            f"{where}: the pre-tokenizer {name!r} is not one of smollm, gpt-2, {', '.join(_LLAMA3_NAMES)}; "
            "use the model's Hugging Face directory"
        )
    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str) or not template:
        raise UserError(f"{where} has no chat template; a chat model is needed")
    if fields.get("tokenizer.ggml.add_eos_token"):
        raise UserError(f"{where}: tokenizer.ggml.add_eos_token is not supported; use another file of the model")
    tokens, types = _tokens(fields, where)
    ids = special_ids(fields)
    for key, number in ids.items():
        if not 0 <= number < len(tokens):
            raise UserError(f"{where}: {key} {number} is outside of the vocabulary of {len(tokens)} tokens")

    tokenizer = Tokenizer(_bpe(fields, tokens, where, ignore_merges=name in _LLAMA3_NAMES))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    # llama.cpp puts BOS before every text of a llama-bpe file unless the file says otherwise.
    if fields.get("tokenizer.ggml.add_bos_token", name in _LLAMA3_NAMES):
        if "bos_token_id" not in ids:
            raise UserError(f"{where} asks for a BOS token but has no tokenizer.ggml.bos_token_id; use another file")
        bos = tokens[ids["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, ids["bos_token_id"])],
        )
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    defined = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined])
    if tokenizer.get_vocab_size() != len(tokens):
        raise UserError(f"{where}: its special tokens are not in its vocabulary; use another file of the model")

    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {f"{key.removesuffix('_id')}": tokens[number] for key, number in ids.items()}
    config |= {
        # The class that takes tokenizer.json as it is; a model's own class would rebuild the pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(fields.get("llama.context_length", 2048)),
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", config)
    # Exactly the template's characters: `newline=""` keeps a carriage return that it may hold.
    with (directory / "chat_template.jinja").open("w", encoding="utf-8", newline="") as file:
        file.write(template)


def _tokens(fields: dict[str, Any], where: str | Path) -> tuple[list[str], list[int]]:
    tokens = fields.get("tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types) or not tokens:
        raise UserError(f"{where}: tokenizer.ggml.tokens and token_type are missing or of different lengths")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{where}: tokenizer.ggml.tokens has the same token twice; use another file of the model")
    return tokens, types


def _bpe(fields: dict[str, Any], tokens: list[str], where: str | Path, *, ignore_merges: bool) -> models.BPE:
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise UserError(f"{where}: tokenizer.ggml.merges is missing; use another file of the model")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{where}: tokenizer.ggml.merges has a merge that is not of two tokens; use another file")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    known = {pair for pair in pairs if {*pair, "".join(pair)} <= vocabulary.keys()}
    if len(known) != len(set(pairs)):
        raise UserError(f"{where}: tokenizer.ggml.merges has merges of tokens that do not exist; use another file")
    return models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges)
