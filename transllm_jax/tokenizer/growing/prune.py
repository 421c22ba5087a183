"""Choosing merges so that no new token is dead: each occurs in the training text as the tokenizer encodes it.

A token that the encoded corpus hardly contains is a step on the way to longer ones that use it up. The rarest of the
merges that do so is left out and a further merge takes its place, until every token is used. A rare token that no other
uses is left out itself. Where the corpus has no further merges, it supports fewer tokens than were asked for.
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
    """New merges in rank order, and the tokens that they make and the base lacks, in the order of their ids."""

    merges: list[Merge]
    tokens: list[str]


class Options(Protocol):
    """Candidates to choose from, in rank order. What can be left out are keys: a merge, or a token."""

    vocabulary: dict[str, int]  # the base's tokens and every candidate's, with numbers of their own
    whole: bool  # a text that is a token is never cut

    def select(self, size: int, without: set[Any]) -> Choice:
        """The first candidates that make `size` new tokens; fewer where there are no more. Left out are those in
        `without`, and those that cannot be made without them."""

    def users(self, choice: Choice) -> Iterable[tuple[str, Hashable]]:
        """(token, key) in rank order: the key makes something of the token."""

    def makers(self, token: str, choice: Choice) -> Iterable[Hashable]:
        """The keys that make the token; none for one that is always taken."""

    def backend(self, choice: Choice) -> tokenizers.Tokenizer:
        """What encodes runs with the chosen merges, with `vocabulary`'s numbers."""

    def spell(self, token: str) -> str:
        """The text of a token, as it stands in a run."""


@dataclass(frozen=True)
class Learned:
    """What was chosen, and how often the training runs, encoded with it, contain each of its tokens."""

    choice: Choice
    counts: list[int]


def choose(
    options: Options, texts: list[str], weights: Ids, size: int, min_count: int, on_progress: OnProgress, more: bool
) -> Learned | None:
    """Exactly `size` tokens, each `min_count` times in the weighted texts; None where `more` candidates could help.

    Raises UserError that says how many there are where that is fewer.
    """
    useless: set[Any] = set()
    recount = Recount(texts, weights, options.vocabulary, whole=options.whole)
    rounds = 0
    while True:
        choice = options.select(size, useless)
        found = recount.count(
            options.backend(choice), choice.merges, options.spell, lambda share: on_progress("prune", share / 2)
        )
        rare = {token for token in choice.tokens if found[options.vocabulary[token]] < min_count}
        last = dict(options.users(choice))
        out = {last[token] for token in rare if token in last}
        if not out:
            out = {key for token in rare for key in options.makers(token, choice)}
        rounds += 1
        on_progress("prune", 1 - 0.5**rounds)
        if not out:
            break
        useless |= out
    if len(choice.tokens) < size:
        if more:
            return None
        supported = len(choice.tokens)
        raise UserError(
            f"the corpus supports {supported:,} new tokens, not {size:,}: so many occur {min_count} times in it; "
            f"{'ask for at most that many, ' if supported else ''}give more text, or lower the minimal count"
        )
    # Counted afresh: what is said of the tokens does not rest on the bookkeeping above.
    counted, found = found, count(options.backend(choice), texts, weights, len(found))
    assert (counted == found).all(), "counting what changed must give what counting all gives"
    return Learned(choice, [int(found[options.vocabulary[token]]) for token in choice.tokens])
