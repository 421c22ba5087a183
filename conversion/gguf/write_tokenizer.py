"""A GGUF file's fields about the tokenizer, from a tokenizer.json: what `tokenizer.py` reads, the other way round.

llama.cpp has two kinds of BPE. `gpt2`, for byte-level tokenizers, has merges and the name of a pre-tokenizer. `llama`,
for SentencePiece, joins the two neighbours that make the piece with the best score; so a piece's score is the negative
place of its merges in the list. Source: src/llama-vocab.cpp.

Types of tokens. llama.cpp prints a user-defined token as text and hides a control token. The markers are printed, since
a client has to see where the answer in the target language begins. Both kinds are single ids in a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transllm_jax.conversion.gguf.tokenizer import HF_JSON, ignores_merges, pre_of, tokens_across_cuts
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.growing.merges import merges_of
from transllm_jax.tokenizer.growing.runs import kind_of
from transllm_jax.tokenizer.sentencepiece_model import is_unused
from transllm_jax.tokenizer.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
CHAT_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class TokenizerFields:
    """fields: by GGUF's names. notes: one line for each text that llama.cpp reads as other ids than the tokenizer."""

    fields: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def tokenizer_fields(
    tokenizer: Tokenizer, rows: int, *, visible: Iterable[str] = (), pre: str | None = None
) -> TokenizerFields:
    """The fields of a BPE tokenizer for a model with `rows` rows in its embedding; ids without a token are unused.

    visible: special tokens that llama.cpp is to print (the markers). pre: llama.cpp's name of the pre-tokenizer, by
    default recognised. Raises UserError for a tokenizer that GGUF cannot hold: of another kind, with more tokens than
    rows, or with a pre-tokenizer that is not known.
    """
    state = json.loads(tokenizer.backend.to_str())
    kind = kind_of(state, tokenizer.source)
    tokens, types = _tokens(tokenizer, state, rows, kind, frozenset(visible))
    notes: list[str] = []
    fields: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if kind == "byte-level":
        name = _pre(state, tokenizer.source, pre, notes)
        _keep_whole(state, name, tokens, types, notes)
        fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
        fields["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges_of(state)]
    else:
        if pre is not None:
            raise UserError(
                f"{tokenizer.source} is a SentencePiece tokenizer, which has no pre-tokenizer; leave it out"
            )
        fields |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        fields["tokenizer.ggml.scores"] = _scores(state, tokens, types, tokenizer.source)
        fields["tokenizer.ggml.add_space_prefix"] = _prefix(state, notes)
    fields |= _special(tokenizer, notes)
    # What the other fields do not say: which tokens are special, own cuts, NFC. llama.cpp does not read it.
    fields[HF_JSON] = json.dumps(state, ensure_ascii=False, separators=(",", ":"))
    if tokenizer.chat_template is not None:
        fields[CHAT_TEMPLATE] = tokenizer.chat_template
    stripping = [
        token.content
        for token in tokenizer.backend.get_added_tokens_decoder().values()
        if token.lstrip or token.rstrip or token.single_word
    ]
    if stripping:
        notes.append(
            f"llama.cpp keeps the white space beside {', '.join(stripping[:3])}, which the tokenizer takes off: leave "
            "it out of prompts"
        )
    return TokenizerFields(fields, notes)


def _tokens(
    tokenizer: Tokenizer, state: dict[str, Any], rows: int, kind: str, visible: frozenset[str]
) -> tuple[list[str], list[int]]:
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    if (size := max(vocabulary.values()) + 1) > rows:
        raise UserError(
            f"{tokenizer.source} has ids up to {size - 1}, the model has {rows} rows; it is not its tokenizer"
        )
    # As llama.cpp's converter names the rows of a padded embedding.
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    added = {token["content"]: token for token in state["added_tokens"]}
    unknown = state["model"].get("unk_token") if kind == "sentencepiece" else None
    for token, number in vocabulary.items():
        tokens[number] = token
        if is_unused(token):
            continue
        if token == unknown:
            types[number] = UNKNOWN
        elif token in added:
            types[number] = USER_DEFINED if token in visible or not added[token]["special"] else CONTROL
        else:
            types[number] = BYTE if kind == "sentencepiece" and token in _BYTES else NORMAL
    return tokens, types


def _pre(state: dict[str, Any], source: str, given: str | None, notes: list[str]) -> str:
    """llama.cpp's name of the pre-tokenizer, with a note if it cuts text in another way."""
    name = given or pre_of(state)
    if name is None:
        raise UserError(
            f"{source}: its pre-tokenizer is none that GGUF is written with here; give llama.cpp's name for it with "
            "--pre (the names are in llama.cpp's src/llama-vocab.cpp)"
        )
    if bool(state["model"].get("ignore_merges")) != ignores_merges(name) and given is None:
        notes.append(f"llama.cpp treats words that are tokens in another way with the pre-tokenizer {name}")
    return name


def _keep_whole(state: dict[str, Any], name: str, tokens: list[str], types: list[int], notes: list[str]) -> None:
    """Make user-defined tokens of those that cross llama.cpp's cuts, if the tokenizer keeps runs of a script whole.

    llama.cpp has no name for such a pre-tokenizer, so its merges would never make these tokens. It finds user-defined
    tokens before it cuts a text, the longest first. That is mostly, but not always, what the merges make of it.
    """
    across = tokens_across_cuts(state, name)
    for number, token in enumerate(tokens):
        if token in across and types[number] == NORMAL:
            tokens[number], types[number] = across[token], USER_DEFINED
    if across:
        notes.append(
            f"llama.cpp has no name for the tokenizer's cuts, so it finds {len(across):,} of its tokens by length "
            "and not by merges: most ids of a text are those of training, not all (vocabulary.cuts: base learns tokens "
            "of which all are)"
        )


def _scores(state: dict[str, Any], tokens: list[str], types: list[int], source: str) -> list[float]:
    """A piece's score: the negative place of the first merge that makes it, 0 for a piece that no merge makes.

    Raises UserError if the merges are not all splits of each piece into two others: SentencePiece, which has no list,
    makes them all.
    """
    merges = merges_of(state)
    place: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        place.setdefault(left + right, number + 1)
    known = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    listed = set(merges)
    for piece in known:
        for size in range(1, len(piece)):
            left, right = piece[:size], piece[size:]
            if left in known and right in known and (left, right) not in listed:
                raise UserError(
                    f"{source}: its merges leave out {left!r} + {right!r}, which SentencePiece and llama.cpp merge; "
                    "it cannot be written as GGUF"
                )
    return [0.0 - place.get(token, 0) if token in known else 0.0 for token in tokens]


def _prefix(state: dict[str, Any], notes: list[str]) -> bool:
    """Whether a space is put before every text, after a special token too."""
    pre = state["pre_tokenizer"] or {}
    if pre.get("type") == "Metaspace":
        if pre["prepend_scheme"] == "first":
            notes.append(
                "llama.cpp puts a space before a text always or never, the tokenizer only at the very beginning: ids "
                "are the same in a prompt that begins with a special token, as those of the chat template do"
            )
        return bool(pre["prepend_scheme"] == "always")
    normalizer = state["normalizer"] or {}
    return any(step["type"] == "Prepend" for step in normalizer.get("normalizers", [normalizer] if normalizer else []))


def _special(tokenizer: Tokenizer, notes: list[str]) -> dict[str, Any]:
    """The ids of special tokens, and what is put before a text."""
    fields: dict[str, Any] = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = tokenizer.role(f"{role}_token")
        number = None if token is None else tokenizer.token_id(token)
        if number is not None:
            fields[f"tokenizer.ggml.{name}_token_id"] = number
    before = tokenizer.bos_ids
    if before:
        fields["tokenizer.ggml.bos_token_id"] = before[0]
    if len(before) > 1:
        notes.append(f"llama.cpp puts one token before a text, the tokenizer {len(before)}")
    fields |= {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": False}
    try:
        ends = list(end_ids(tokenizer))
    except UserError:  # neither a chat template nor an eos token
        return fields
    fields.setdefault("tokenizer.ggml.eos_token_id", ends[0])
    others = [number for number in ends if number != fields["tokenizer.ggml.eos_token_id"]]
    fields |= {f"tokenizer.ggml.{name}_token_id": number for name, number in zip(("eot", "eom"), others, strict=False)}
    if len(others) > 2:
        notes.append(f"llama.cpp has places for three tokens that end an answer, the model has {len(ends)}")
    return fields
