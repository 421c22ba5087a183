"""How a base of either kind grows: its runs of text, what is learned from them, and the tokenizer.json that follows."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.atoms import ends_between_characters, token_bytes
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
    """What expansion needs to know of a base.

    find     the runs of a text, normalised
    learn    (runs, size, min_count, on_progress) -> new tokens
    state    (choice, n) -> tokenizer.json with its first n tokens
    name     a new token as readable text
    made_of  for each new token the base's ids of its text
    parts    how many new tokens end inside a character: steps that a text only makes on the way to the character
    """

    find: Callable[[str], list[str]]
    learn: Callable[[Counter[str], int, int, OnProgress], Learned]
    state: Callable[[Choice, int], dict[str, Any]]
    name: Callable[[str], str]
    made_of: Callable[[Tokenizer, Choice], list[list[int]]]
    parts: Callable[[Choice], int]


def byte_level_growth(
    state: dict[str, Any], whole: dict[str, Any], script: Script, whole_words: bool, markers: list[str]
) -> Growth:
    """Growth of a byte-level BPE base. `whole`: `state` with every token in its vocabulary."""
    del markers  # no piece is written like one: expand checks it
    finder: RunFinder | WordFinder = (WordFinder if whole_words else RunFinder)(state, script)
    if not whole_words:
        whole = {**whole, "pre_tokenizer": keep_runs_whole(state, script)}

    def first(choice: Choice, n: int) -> dict[str, Any]:
        kept = set(choice.tokens[:n]) | whole["model"]["vocab"].keys()
        merges = [(a, b) for a, b in choice.merges if {a, b, a + b} <= kept]
        return extended(whole, merges, choice.tokens[:n])

    return Growth(
        finder.find,
        lambda runs, size, min_count, tell: learn_merges(whole, runs, size, min_count, tell, finder.learnable),
        first,
        lambda token: token_bytes(token).decode("utf-8", errors="replace"),
        lambda base, choice: _bytes_made_of(base, whole["model"]["vocab"], choice),
        lambda choice: sum(not ends_between_characters(token) for token in choice.tokens),
    )


def piece_growth(
    state: dict[str, Any], whole: dict[str, Any], script: Script, whole_words: bool, markers: list[str]
) -> Growth:
    """Growth of a SentencePiece-BPE base. `whole`: `state` with every token in its vocabulary."""
    table = PieceTable(whole)
    finder = PieceRuns(state, script, table.known, whole_words=whole_words)
    plain = table.backend({}, merges_of(whole))

    def first(choice: Choice, n: int) -> dict[str, Any]:
        grown = extended(whole, [], choice.tokens[:n])
        grown["model"]["merges"] = [list(merge) for merge in table.with_pieces(choice.tokens[:n])[0]]
        return grown

    return Growth(
        finder.find,
        lambda runs, size, min_count, tell: learn_pieces(table, finder, runs, size, min_count, set(markers), tell),
        first,
        lambda token: token.replace(SPACE, " "),
        lambda _base, choice: [list(plain.encode(token).ids) for token in choice.tokens],
        lambda _choice: 0,
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

    Added tokens of LLaMA-3 and Qwen stand apart, after the vocabulary, where they would be renumbered as it grows.
    Ids up to `first_id` that stand for nothing get a token that no text makes: the `tokenizers` library numbers what is
    added by how many tokens there are, and so would give a gap's ids away; SentencePiece's ids are places in a list;
    and whoever resizes a model to `len(tokenizer)` rows would cut off the new ones.
    Raises UserError for a vocabulary with gaps where `first_id` is not given, and for one that reaches beyond it.
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
            f"follow ids with gaps; use a tokenizer.json without"
        )
    return state


def made_of_text(base: Tokenizer, kind: str, token: str) -> list[int]:
    """The base's ids of a new token's text, wherever in a text it stands; of a part of a character, of its bytes."""
    if kind == "sentencepiece":
        return base.encode(token.replace(SPACE, " "), specials=False, continuing=True)
    try:
        return base.encode(token_bytes(token).decode("utf-8"), specials=False)
    except UnicodeDecodeError:
        return [piece.id for piece in base.backend.model.tokenize(token)]


def _bytes_made_of(base: Tokenizer, vocabulary: dict[str, int], choice: Choice) -> list[list[int]]:
    """For each new token the base's ids of its text; a part of a character has the ids it is made of."""
    made_of: dict[str, list[int]] = {}
    for left, right in choice.merges:
        ids = [i for part in (left, right) for i in made_of.get(part) or [vocabulary[part]]]
        made_of.setdefault(left + right, ids)
    pieces = []
    for token in choice.tokens:
        try:
            pieces.append(base.encode(token_bytes(token).decode("utf-8")))
        except UnicodeDecodeError:
            pieces.append(made_of[token])
    return pieces
