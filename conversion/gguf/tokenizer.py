"""Makes a tokenizer directory from a GGUF file's fields, with only the `tokenizers` library.

transformers reads a GGUF tokenizer only if torch is installed, and splits text by GPT-2's pattern if it does not
know the pre-tokenizer's name (for `smollm`, "a  1" then loses its two-space token). llama.cpp selects the
pre-tokenizer by `tokenizer.ggml.pre` (src/llama-vocab.cpp); only names whose rule is certain are accepted here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from transllm_jax.conversion.hf.sentencepiece_tokenizer import build_tokenizer
from transllm_jax.disk import write_json
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.runs import GPT2_PATTERN
from transllm_jax.tokenizer.llama_cpp import base_cuts, stand_in

_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5
# A whole tokenizer.json, for programs that read those.
HF_JSON = "tokenizer.huggingface.json"
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
# Options that are false by default and would change the ids if true.
_REFUSED = ("add_eos_token", "add_sep_token", "remove_extra_whitespaces")

# How many of the last merges are checked, and how many of them may make tokens that no text can produce.
_LAST_MERGES, _MAX_CUT = 200, 20

# The patterns of the published tokenizer.json files; Qwen's splits off single digits, LLaMA 3's up to three.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = _PATTERN.format(digits=r"\p{N}{1,3}")
_QWEN2_PATTERN = _PATTERN.format(digits=r"\p{N}")
# In Qwen3.5's pattern, marks stay with letters.
_QWEN35_PATTERN = _QWEN2_PATTERN.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")


@dataclass(frozen=True)
class _Rule:
    """What a `tokenizer.ggml.pre` means. `bos`: llama.cpp's default if the file has no `add_bos_token`."""

    pre_tokenizer: Any
    normalizer: Any = None
    ignore_merges: bool = False
    bos: bool = False


def _pattern(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _rules() -> dict[str, _Rule]:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    llama3 = _Rule(_pattern(_LLAMA3_PATTERN), ignore_merges=True, bos=True)
    return {
        "smollm": _Rule(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])),
        "gpt-2": _Rule(gpt2),
        # The models were trained with NFC, which llama.cpp does not implement.
        "qwen2": _Rule(_pattern(_QWEN2_PATTERN), normalizers.NFC()),
        "qwen35": _Rule(_pattern(_QWEN35_PATTERN), normalizers.NFC()),
        "llama-bpe": llama3,
        "llama3": llama3,
        "llama-v3": llama3,
    }


def pre_of(state: dict[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer in `state`, a byte-level tokenizer.json; None if it is none of ours.

    For one that keeps runs of a script whole it is the one that comes nearest (`tokenizer.llama_cpp.stand_in`).
    """
    cuts, run = base_cuts(state)
    if run is not None and (nearest := stand_in(state)) is not None:
        return nearest
    for name, rule in _rules().items():
        probe = Tokenizer(models.BPE())
        probe.pre_tokenizer = rule.pre_tokenizer
        if _steps(json.loads(probe.to_str())["pre_tokenizer"]) == _steps(cuts):
            return name
    return None


def tokens_across_cuts(state: dict[str, Any], name: str) -> dict[str, str]:
    """Tokens of whole runs that llama.cpp's merges never make, as its pre-tokenizer `name` cuts them: token -> text.

    Empty for a tokenizer.json that keeps no runs whole. For a name that is not known here, the base's own cuts count.
    """
    cuts, run = base_cuts(state)
    if run is None:
        return {}
    if name in (rules := _rules()):
        pre_tokenizer = rules[name].pre_tokenizer
    else:
        pre_tokenizer = Tokenizer.from_str(json.dumps({**state, "pre_tokenizer": cuts})).pre_tokenizer
    whole, decoder = re.compile(run), decoders.ByteLevel()
    found = {}
    for token in state["model"]["vocab"]:
        text = decoder.decode([token])
        if whole.fullmatch(text) and len(pre_tokenizer.pre_tokenize_str(text)) > 1:
            found[token] = text
    return found


def ignores_merges(name: str) -> bool:
    """Whether llama.cpp takes a word that is a token as that token, whatever the merges say, for a pre-tokenizer."""
    rule = _rules().get(name)
    return rule is not None and rule.ignore_merges


def _steps(step: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The steps of a pre-tokenizer in one form: GPT-2's pattern may be a step of its own or a part of ByteLevel."""
    found: list[tuple[str, str]] = []
    for part in [] if step is None else step.get("pretokenizers", [step]):
        if part["type"] == "Split":
            found.append(("Split", part["pattern"].get("Regex", "")))
        elif part["type"] == "ByteLevel" and part["use_regex"]:
            found += [("Split", GPT2_PATTERN), ("ByteLevel", "")]
        else:
            found.append((part["type"], "one by one" if part.get("individual_digits") else ""))
    return found


def special_ids(fields: dict[str, Any]) -> dict[str, int]:
    """Hugging Face's `{"bos_token_id": id, ...}` for each of bos, eos, unk and pad that the file has.

    Raises UserError for an id that is not a whole number.
    """
    ids = {}
    for name, field in _IDS.items():
        key = f"tokenizer.ggml.{field}"
        if key in fields:
            if not isinstance(fields[key], int):
                raise UserError(f"the GGUF file's {key} is {fields[key]!r}, not a whole number; use another file")
            ids[f"{name}_token_id"] = int(fields[key])
    return ids


def end_ids(fields: dict[str, Any]) -> list[int]:
    """The ids that end an answer: eos, then end of turn and end of message if the file names them."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    found = [fields[key] for key in keys if key in fields]
    if wrong := [value for value in found if not isinstance(value, int)]:
        raise UserError(f"the GGUF file's end tokens are {wrong}, not whole numbers; use another file")
    return list(dict.fromkeys(map(int, found)))


def write_tokenizer(fields: dict[str, Any], directory: str | Path, where: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    `fields` are the GGUF file's metadata by name; `where` is the file's path for messages. Two kinds of tokenizer are
    supported: `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE). Raises UserError for another kind, an unknown
    pre-tokenizer, inconsistent fields, or a file without a chat template.
    """
    directory = Path(directory)
    model = fields.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UserError(
            f"{where}: the tokenizer is of type {model!r}, only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece "
            "BPE) are read from GGUF; use the model's Hugging Face directory"
        )
    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str) or not template:
        raise UserError(f"{where} has no chat template; a chat model is needed")
    refused = [f"tokenizer.ggml.{name}" for name in _REFUSED if fields.get(f"tokenizer.ggml.{name}")]
    if refused:
        raise UserError(f"{where}: {', '.join(refused)} is not supported; use another file of the model")
    tokens, types = _tokens(fields, where)
    ids = special_ids(fields)
    if outside := [f"{key} {number}" for key, number in ids.items() if not 0 <= number < len(tokens)]:
        raise UserError(f"{where}: {', '.join(outside)} is outside of the vocabulary of {len(tokens)} tokens")

    if HF_JSON in fields:
        tokenizer = _from_json(fields[HF_JSON], tokens, types, where)
    elif model == "gpt2":
        tokenizer = _byte_level(fields, tokens, types, where)
    else:
        tokenizer = build_tokenizer(
            tokens,
            _scores(fields, where),
            types,
            where,
            bos=_bos(fields, True, where),
            add_space_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        )
    if HF_JSON not in fields and tokenizer.get_vocab_size() != len(tokens):
        raise UserError(f"{where}: its special tokens are not in its vocabulary; use another file of the model")

    tokenizer.save(str(directory / "tokenizer.json"))
    context = fields.get(f"{fields.get('general.architecture')}.context_length", 2048)
    config: dict[str, Any] = {f"{key.removesuffix('_id')}": tokens[number] for key, number in ids.items()}
    config |= {
        # This class uses tokenizer.json unchanged; a model's own class would rebuild the pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(context),
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", config)
    # `newline=""` keeps the template exact, even if it contains carriage returns.
    with (directory / "chat_template.jinja").open("w", encoding="utf-8", newline="") as file:
        file.write(template)


def _from_json(text: Any, tokens: list[str], types: list[int], where: str | Path) -> Tokenizer:
    """The tokenizer.json in a file, which says more than the other fields; its ids have to be theirs."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises a bare Exception for any broken text
        raise UserError(f"{where}: {HF_JSON} cannot be read ({error}); use another file of the model") from None
    named, decoder = {number: token for token, number in tokenizer.get_vocab().items()}, decoders.ByteLevel()
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        own = named.pop(number, None)
        # A user-defined token is spelled as text, and in tokenizer.json maybe as bytes.
        if own not in (token, None if kind == _UNUSED else token) and (
            own is None or kind != _USER_DEFINED or decoder.decode([own]) != token
        ):
            raise UserError(
                f"{where}: token {number} is {own!r} in {HF_JSON} and {token!r} in tokenizer.ggml.tokens; use another "
                "file of the model"
            )
    if named:
        raise UserError(f"{where}: {HF_JSON} has ids from {min(named)} on that tokenizer.ggml.tokens lacks")
    return tokenizer


def _bos(fields: dict[str, Any], default: bool, where: str | Path) -> int | None:
    """The id of the BOS token if the tokenizer puts one before every text, else None."""
    if not fields.get("tokenizer.ggml.add_bos_token", default):
        return None
    if "tokenizer.ggml.bos_token_id" not in fields:
        raise UserError(f"{where} asks for a BOS token but has no tokenizer.ggml.bos_token_id; use another file")
    return int(fields["tokenizer.ggml.bos_token_id"])


def _byte_level(fields: dict[str, Any], tokens: list[str], types: list[int], where: str | Path) -> Tokenizer:
    rules = _rules()
    name = fields.get("tokenizer.ggml.pre")
    if name not in rules:
        raise UserError(
            f"{where}: the pre-tokenizer {name!r} is not one of {', '.join(rules)}; "
            "use the model's Hugging Face directory"
        )
    rule = rules[name]
    tokenizer = Tokenizer(_bpe(fields, tokens, where, ignore_merges=rule.ignore_merges))
    if rule.normalizer is not None:
        tokenizer.normalizer = rule.normalizer
    tokenizer.pre_tokenizer = rule.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    _check_cuts(tokenizer, fields["tokenizer.ggml.merges"], name, where)
    number = _bos(fields, rule.bos, where)
    if number is not None:
        bos = tokens[number]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, number)]
        )
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    defined = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined])
    return tokenizer


def _check_cuts(tokenizer: Tokenizer, merges: list[str], name: str, where: str | Path) -> None:
    """Raises UserError for a tokenizer that was expanded with another pre-tokenizer, which a GGUF file does not hold.

    The named pre-tokenizer then splits tokens that the last merges make: half of them for Thai. It splits none of the
    tokens of the last 4,000 merges of LLaMA 3, Qwen2.5, Qwen3 and SmolLM2.
    """
    made = (tokenizer.decoder.decode(["".join(merge.split(" "))]) for merge in reversed(merges))
    # A token with U+FFFD is a part of a character, which has no text of its own.
    last = list(islice((text for text in made if "\ufffd" not in text), _LAST_MERGES))
    cut = [text for text in last if len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) > 1]
    if len(cut) > _MAX_CUT:
        raise UserError(
            f"{where}: the pre-tokenizer {name!r} that it names never makes {len(cut)} of the last {len(last)} tokens, "
            f"such as {cut[0]!r}: the tokenizer was expanded with another pre-tokenizer, which GGUF does not store; "
            "use the model's Hugging Face directory"
        )


def _scores(fields: dict[str, Any], where: str | Path) -> list[float]:
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or not all(isinstance(score, int | float) for score in scores):
        raise UserError(f"{where}: tokenizer.ggml.scores is missing or not of numbers; use another file of the model")
    return scores


def _tokens(fields: dict[str, Any], where: str | Path) -> tuple[list[str], list[int]]:
    tokens = fields.get("tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types) or not tokens:
        raise UserError(f"{where}: tokenizer.ggml.tokens and token_type are missing or of different lengths")
    if not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{where}: tokenizer.ggml.tokens are not strings; use another file of the model")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{where}: tokenizer.ggml.tokens has the same token twice; use another file of the model")
    return tokens, types


def _bpe(fields: dict[str, Any], tokens: list[str], where: str | Path, *, ignore_merges: bool) -> models.BPE:
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise UserError(f"{where}: tokenizer.ggml.merges is missing or not of strings; use another file of the model")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{where}: tokenizer.ggml.merges has a merge that is not of two tokens; use another file")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    known = {pair for pair in pairs if {*pair, "".join(pair)} <= vocabulary.keys()}
    if len(known) != len(set(pairs)):
        raise UserError(f"{where}: tokenizer.ggml.merges has merges of tokens that do not exist; use another file")
    return models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges)
