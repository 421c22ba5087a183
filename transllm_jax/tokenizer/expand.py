"""Stage 1's tokenizer: a base tokenizer with new tokens for the target language and the chain's markers.

What holds, and is tested: ids of the base never move; text without characters of the target script keeps its
ids; decoding gives the text back; a marker is one id; the same corpus gives the same files.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tokenizers

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.atoms import token_bytes
from transllm_jax.tokenizer.merges import Merges, extended, learn_merges
from transllm_jax.tokenizer.runs import RunFinder, check_supported, keep_runs_whole
from transllm_jax.tokenizer.scripts import SCRIPTS, script_of
from transllm_jax.tokenizer.tokenizer import Tokenizer

_REPORTED_CHARACTERS = 2_000_000  # tokens per character is measured on about so much of the corpus


@dataclass(frozen=True)
class Expansion:
    """An expanded tokenizer and what initialising its new rows needs.

    tokenizer   ids of the base unchanged, then `new_tokens`
    new_tokens  the new pieces as readable text, then the markers, in the order of their ids
    pieces      for each of them, in the same order, the base's ids of the text that it replaces (for a
    marker:
                of a word that describes it); never empty
    report      numbers for people and for report.json
    """

    tokenizer: Tokenizer
    new_tokens: list[str]
    pieces: list[list[int]]
    report: dict[str, Any]


def expand(
    base: Tokenizer,
    documents: Iterable[str],
    *,
    size: int,
    language: str = "th",
    markers: list[str],
    min_count: int = 2,
) -> Expansion:
    """Adds exactly `size` tokens learned from `documents` and the markers to a byte-level BPE tokenizer.

    size: new pieces, markers not counted. min_count: the encoded corpus contains each new piece at least
    so often (parts of characters excepted). `documents` is read once; what is kept of it are the distinct
    runs of the script with their counts. Raises UserError for a base of another kind, an unknown
    language, a corpus without the script or one that supports fewer tokens, and a marker that the base
    has.
    """
    script = script_of(language)
    state: dict[str, Any] = json.loads(base.backend.to_str())
    check_supported(state, base.source)
    _check_markers(base, markers)
    if size < 1 or min_count < 1:
        raise UserError(f"size={size} and min_count={min_count}: both must be at least 1")

    finder = RunFinder(state, script)
    runs: Counter[str] = Counter()
    sample: list[str] = []
    sampled = 0
    for document in documents:
        runs.update(finder.find(document))
        if sampled < _REPORTED_CHARACTERS:
            sample.append(document)
            sampled += len(document)
    if not runs:
        raise UserError(f"the corpus has no {script.language} characters: give {script.language} text")

    new_state = _with_base_tokens_in_vocabulary(state, base.source)
    new_state["pre_tokenizer"] = keep_runs_whole(state, script)
    learned = learn_merges(new_state, runs, size, min_count)
    pieces = _pieces(base, new_state["model"]["vocab"], learned)
    new_state = extended(new_state, learned.merges, [*learned.tokens, *markers])
    new_state["added_tokens"] += [_marker(new_state["model"]["vocab"][m], m) for m in markers]
    backend = tokenizers.Tokenizer.from_str(json.dumps(new_state))
    tokenizer = Tokenizer(backend, copy.deepcopy(base.config), base.chat_template, f"{base.source}+{language}")

    names = [token_bytes(t).decode("utf-8", errors="replace") for t in learned.tokens]
    often = sorted(range(size), key=lambda i: -learned.counts[i])
    report = {
        "language": language,
        "markers": list(markers),
        "base_vocabulary": base.vocab_size,
        "vocabulary": tokenizer.vocab_size,
        "new_tokens": size,
        "min_count": min_count,
        "never_produced": sum(n == 0 for n in learned.counts),
        "produced_less_than_min_count": sum(n < min_count for n in learned.counts),
        "tokens_per_character_before": tokens_per_character(base, sample),
        "tokens_per_character_after": tokens_per_character(tokenizer, sample),
        "measured_on_characters": sampled,
        "most_frequent": [{"token": names[i], "count": learned.counts[i]} for i in often[:50]],
        "least_frequent": [{"token": names[i], "count": learned.counts[i]} for i in often[-20:]],
        "longest": sorted(names, key=lambda name: (-len(name), name))[:20],
    }
    words = [base.encode(f" {_describe(m)}") for m in markers]
    return Expansion(tokenizer, names + list(markers), pieces + words, report)


def with_markers(tokenizer: Tokenizer, markers: Iterable[str]) -> tuple[Tokenizer, list[list[int]]]:
    """A tokenizer with markers added behind its last id, and for each of them the ids of a word that describes it.

    Raises UserError for a marker that the tokenizer has already, and for ids with gaps.
    """
    markers = list(markers)
    _check_markers(tokenizer, markers)
    state = _with_base_tokens_in_vocabulary(json.loads(tokenizer.backend.to_str()), tokenizer.source)
    state = extended(state, [], markers)
    state["added_tokens"] += [_marker(state["model"]["vocab"][marker], marker) for marker in markers]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    words = [tokenizer.encode(f" {_describe(marker)}") for marker in markers]
    return Tokenizer(backend, copy.deepcopy(tokenizer.config), tokenizer.chat_template, tokenizer.source), words


def tokens_per_character(tokenizer: Tokenizer, documents: Iterable[str]) -> float:
    """Tokens per Unicode character over all documents. Raises UserError where they have no character."""
    texts = list(documents)
    characters = sum(map(len, texts))
    if not characters:
        raise UserError("no text to measure tokens per character on: give non-empty documents")
    return sum(map(len, tokenizer.encode_batch(texts))) / characters


def _check_markers(base: Tokenizer, markers: list[str]) -> None:
    for marker in markers:
        if not marker or any(c.isspace() for c in marker):
            raise UserError(f"the marker {marker!r} is empty or has white space in it: use one like <TH>")
        if base.token_id(marker) is not None:
            raise UserError(f"the base tokenizer {base.source} has the marker {marker!r} already: choose another")
    if len(set(markers)) != len(markers):
        raise UserError(f"the markers {markers} are not all different: choose different ones")


def _with_base_tokens_in_vocabulary(state: dict[str, Any], source: str) -> dict[str, Any]:
    """A copy of `state` in which added tokens stand in the model's vocabulary too, with their ids.

    LLaMA-3 and Qwen keep them apart, after the vocabulary, where they would be renumbered as it grows.
    """
    state = copy.deepcopy(state)
    vocabulary = state["model"]["vocab"]
    for token in state["added_tokens"]:
        vocabulary.setdefault(token["content"], token["id"])
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(
            f"the {len(vocabulary)} ids of {source} are not 0 to {len(vocabulary) - 1}: new ids cannot "
            f"follow ids with gaps; use a tokenizer.json without"
        )
    return state


def _marker(token_id: int, content: str) -> dict[str, Any]:
    # Nothing is stripped: decoding gives back what was encoded, and a newline before a marker is not swallowed.
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **flags}


def _describe(marker: str) -> str:
    """A word whose rows a marker's row starts from."""
    name = "".join(c for c in marker if c.isalnum())
    if name.lower() == "en":
        return "English"
    return SCRIPTS[name.lower()].language if name.lower() in SCRIPTS else name.capitalize()


def _pieces(base: Tokenizer, vocabulary: dict[str, int], learned: Merges) -> list[list[int]]:
    """For each new token the base's ids of its text; a part of a character has the ids it is made of."""
    made_of: dict[str, list[int]] = {}
    for left, right in learned.merges:
        ids = [i for part in (left, right) for i in made_of.get(part) or [vocabulary[part]]]
        made_of.setdefault(left + right, ids)
    pieces = []
    for token in learned.tokens:
        try:
            pieces.append(base.encode(token_bytes(token).decode("utf-8")))
        except UnicodeDecodeError:
            pieces.append(made_of[token])
    return pieces
