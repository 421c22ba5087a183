"""How a base of either kind is expanded: its runs of text, the tokens learned from them, and the new tokenizer.json."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.atoms import ends_between_characters, token_bytes
from transllm_jax.tokenizer.growing.icu_words import Span
from transllm_jax.tokenizer.growing.merges import extended, learn_merges, merges_of
from transllm_jax.tokenizer.growing.piece_runs import SPACE, PieceRuns
from transllm_jax.tokenizer.growing.pieces import PieceTable, learn_pieces
from transllm_jax.tokenizer.growing.prune import Choice, Learned, OnProgress
from transllm_jax.tokenizer.growing.runs import RunFinder, WordFinder, keep_runs_whole
from transllm_jax.tokenizer.scripts import Script
from transllm_jax.tokenizer.sentencepiece_model import unused
from transllm_jax.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Growth:
    """The parts of expansion that depend on the kind of base.

    find             text -> the text, normalised, and where its runs begin and end
    learn            (runs, cut into words or not, size, min_count, on_progress) -> new tokens
    state            (choice, n) -> tokenizer.json with its first n tokens
    name             a new token as readable text
    base_ids         the base's ids of the text of each new token
    character_parts  how many new tokens end inside a character: intermediate steps of merging a character
    """

    find: Callable[[str], tuple[str, list[Span]]]
    learn: Callable[[Counter[str], int, int, OnProgress], Learned]
    state: Callable[[Choice, int], dict[str, Any]]
    name: Callable[[str], str]
    base_ids: Callable[[Tokenizer, Choice], list[list[int]]]
    character_parts: Callable[[Choice], int]


def byte_level_growth(
    state: dict[str, Any], full_state: dict[str, Any], script: Script, whole_words: bool, markers: list[str]
) -> Growth:
    """Growth of a byte-level BPE base. `full_state`: `state` with every token in its vocabulary."""
    del markers  # `expand` checks that no new token spells one
    finder: RunFinder | WordFinder = (WordFinder if whole_words else RunFinder)(state, script)
    if not whole_words:
        full_state = {**full_state, "pre_tokenizer": keep_runs_whole(state, script)}
    vocabulary: dict[str, int] = full_state["model"]["vocab"]

    def with_first_tokens(choice: Choice, n: int) -> dict[str, Any]:
        kept = set(choice.tokens[:n]) | vocabulary.keys()
        merges = [(a, b) for a, b in choice.merges if {a, b, a + b} <= kept]
        return extended(full_state, merges, choice.tokens[:n])

    return Growth(
        find=finder.find,
        learn=lambda runs, size, min_count, on_progress: learn_merges(
            full_state, runs, size, min_count, on_progress, finder.learnable
        ),
        state=with_first_tokens,
        name=lambda token: token_bytes(token).decode("utf-8", errors="replace"),
        base_ids=lambda base, choice: _base_ids_of_bytes(base, vocabulary, choice),
        character_parts=lambda choice: sum(not ends_between_characters(token) for token in choice.tokens),
    )


def piece_growth(
    state: dict[str, Any], full_state: dict[str, Any], script: Script, whole_words: bool, markers: list[str]
) -> Growth:
    """Growth of a SentencePiece-BPE base. `full_state`: `state` with every token in its vocabulary."""
    table = PieceTable(full_state)
    finder = PieceRuns(state, script, table.known, whole_words=whole_words)
    base_backend = table.backend({}, merges_of(full_state))

    def with_first_tokens(choice: Choice, n: int) -> dict[str, Any]:
        grown = extended(full_state, [], choice.tokens[:n])
        grown["model"]["merges"] = [list(merge) for merge in table.with_pieces(choice.tokens[:n])[0]]
        return grown

    return Growth(
        find=finder.find,
        learn=lambda runs, size, min_count, on_progress: learn_pieces(
            table, finder, runs, size, min_count, set(markers), on_progress
        ),
        state=with_first_tokens,
        name=lambda token: token.replace(SPACE, " "),
        base_ids=lambda _base, choice: [list(base_backend.encode(token).ids) for token in choice.tokens],
        character_parts=lambda _choice: 0,
    )


def check_markers(base: Tokenizer, markers: list[str]) -> None:
    """Raises UserError for markers that cannot be added to a base."""
    for marker in markers:
        if not marker or any(c.isspace() for c in marker):
            raise UserError(f"the marker {marker!r} is empty or has white space in it: use one like <TH>")
        if base.token_id(marker) is not None:
            raise UserError(f"the base tokenizer {base.source} has the marker {marker!r} already: choose another")
    if len(set(markers)) != len(markers):
        raise UserError(f"the markers {markers} are not all different: choose different ones")


def with_base_tokens(state: dict[str, Any], source: str, first_id: int | None = None) -> dict[str, Any]:
    """A copy of `state`, a parsed tokenizer.json, in which every id below the first new one is in the vocabulary.

    Added tokens of LLaMA-3 and Qwen are in a list of their own, after the vocabulary, and would be renumbered as it
    grows. Unused ids up to `first_id` get a token that no text produces, because the `tokenizers` library numbers added
    tokens by the number of tokens and so would fill a gap, because SentencePiece's ids are indices in a list, and
    because a model that is resized to `len(tokenizer)` rows would lose the new ones. Raises UserError for a vocabulary
    with gaps if `first_id` is not given, and for one that reaches beyond `first_id`.
    """
    state = copy.deepcopy(state)
    vocabulary = state["model"]["vocab"]
    for token in state["added_tokens"]:
        vocabulary.setdefault(token["content"], token["id"])
    ids = set(vocabulary.values())
    if first_id is not None:
        if first_id <= max(ids):
            raise UserError(
                f"the new ids cannot begin at {first_id}: {source} has tokens up to {max(ids)}; "
                f"is it the tokenizer of this model?"
            )
        vocabulary.update({unused(number): number for number in range(first_id) if number not in ids})
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(
            f"the {len(vocabulary)} ids of {source} are not 0 to {len(vocabulary) - 1}: new ids cannot "
            f"follow ids with gaps; use a tokenizer.json without gaps"
        )
    return state


def base_ids_of_token(base: Tokenizer, kind: str, token: str) -> list[int]:
    """The base's ids of a new token's text, as within a text; for a part of a character, the ids of its bytes."""
    if kind == "sentencepiece":
        return base.encode(token.replace(SPACE, " "), specials=False, continuing=True)
    try:
        return base.encode(token_bytes(token).decode("utf-8"), specials=False)
    except UnicodeDecodeError:
        return [piece.id for piece in base.backend.model.tokenize(token)]


def _base_ids_of_bytes(base: Tokenizer, vocabulary: dict[str, int], choice: Choice) -> list[list[int]]:
    """The base's ids of each new token's text; for a part of a character, the ids that its merges join."""
    joined: dict[str, list[int]] = {}
    for left, right in choice.merges:
        ids = [i for part in (left, right) for i in joined.get(part) or [vocabulary[part]]]
        joined.setdefault(left + right, ids)
    pieces = []
    for token in choice.tokens:
        try:
            pieces.append(base.encode(token_bytes(token).decode("utf-8")))
        except UnicodeDecodeError:
            pieces.append(joined[token])
    return pieces
