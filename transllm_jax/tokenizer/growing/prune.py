"""Chooses merges so that no new token is dead: each occurs in the training text as the tokenizer encodes it.

A token that the encoded corpus hardly contains is an intermediate step to longer tokens, which absorb it. The last of
the merges that do so is left out and a further merge takes its place, until every token is used. A rare token that no
other uses is left out itself. If the corpus has no further merges, it supports fewer tokens than requested.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import tokenizers

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.encoded import Ids, Merge, Recount, count

OnProgress = Callable[[str, float], None]


@dataclass(frozen=True)
class Choice:
    """The chosen merges in rank order, and the tokens that they make and the base lacks, in the order of their ids."""

    merges: list[Merge]
    tokens: list[str]


class Candidates(Protocol):
    """Candidates for new tokens, in rank order. Each has a key by which it can be left out: a merge, or a token."""

    vocabulary: dict[str, int]  # the base's tokens and all candidates' -> ids, which are not the final ones
    ignore_merges: bool  # a text that is a token is never cut

    def select(self, size: int, without: set[Any]) -> Choice:
        """The first candidates that make `size` new tokens; fewer if there are no more.

        Left out are those in `without`, and those that cannot be made without them.
        """

    def users(self, choice: Choice) -> Iterable[tuple[str, Hashable]]:
        """(token, key) in rank order, for each key that makes another token of the token."""

    def makers(self, token: str, choice: Choice) -> Iterable[Hashable]:
        """The keys that make the token; none for one that is always taken."""

    def backend(self, choice: Choice) -> tokenizers.Tokenizer:
        """A tokenizer that encodes runs with the chosen merges, as ids in `vocabulary`."""

    def spell(self, token: str) -> str:
        """The text of a token in a run."""


@dataclass(frozen=True)
class Learned:
    """The choice, and how often each of its tokens occurs in the training runs when they are encoded with it."""

    choice: Choice
    counts: list[int]


class TooLittleText(UserError):
    """The corpus supports fewer tokens than requested. supported: how many."""

    def __init__(self, message: str, supported: int) -> None:
        super().__init__(message)
        self.supported = supported


def choose(
    candidates: Candidates,
    texts: list[str],
    weights: Ids,
    size: int,
    min_count: int,
    on_progress: OnProgress,
    more: bool,
) -> Learned | None:
    """Exactly `size` tokens, each of which occurs at least `min_count` times in the weighted texts.

    If there are fewer: None if training could give `more` candidates, else raises UserError with their number.
    """
    useless: set[Any] = set()
    recount = Recount(texts, weights, candidates.vocabulary, ignore_merges=candidates.ignore_merges)
    rounds = 0
    while True:
        choice = candidates.select(size, useless)
        found = recount.count(
            candidates.backend(choice), choice.merges, candidates.spell, lambda share: on_progress("prune", share / 2)
        )
        rare = {token for token in choice.tokens if found[candidates.vocabulary[token]] < min_count}
        last_user = dict(candidates.users(choice))
        to_drop = {last_user[token] for token in rare if token in last_user}
        if not to_drop:
            to_drop = {key for token in rare for key in candidates.makers(token, choice)}
        rounds += 1
        on_progress("prune", 1 - 0.5**rounds)
        if not to_drop:
            break
        useless |= to_drop
    if len(choice.tokens) < size:
        if more:
            return None
        supported = len(choice.tokens)
        raise TooLittleText(
            f"the corpus supports {supported:,} new tokens, not {size:,}: this many occur {min_count} times in it; "
            f"{'ask for at most that many, ' if supported else ''}give more text, or lower the minimal count",
            supported,
        )
    # Counted again from scratch, so that the result does not depend on the incremental counts.
    incremental, found = found, count(candidates.backend(choice), texts, weights, len(found))
    assert (incremental == found).all(), "incremental counts must equal a full count"
    return Learned(choice, [int(found[candidates.vocabulary[token]]) for token in choice.tokens])
