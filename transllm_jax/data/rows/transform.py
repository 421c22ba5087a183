"""From an item of a source to the token sequences that are trained on: all that a cached shard depends on.

A `Transform` goes to worker processes, and its key is part of a cached shard's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from transllm_jax.choices import Content
from transllm_jax.data.clean.cleaning import Rules, reason, text_of
from transllm_jax.data.clean.contamination import EvaluationTexts
from transllm_jax.data.clean.near_duplicates import exact_key, signature
from transllm_jax.data.read.files import Place
from transllm_jax.data.read.shards import Item
from transllm_jax.data.read.sources import refuse_special
from transllm_jax.data.rows.examples import (
    Example,
    conversation_rows,
    make_example,
    pair_texts,
    split_example,
    whole_text,
)
from transllm_jax.data.rows.instructions import Instructions
from transllm_jax.disk import sha256_of_json
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chain import MARKERS, Markers
from transllm_jax.tokenizer.tokenizer import Tokenizer

_FORMAT = 2  # of what `examples_of` gives


class Made(NamedTuple):
    """What became of one item: its examples, and of each the UTF-8 bytes of the text that it trains."""

    examples: list[Example]
    bytes: list[int]


class Prepared(NamedTuple):
    """Items before they are encoded. kept: of each, whether it is trained on; items: those that are; texts: of them."""

    kept: list[bool]
    items: list[Item]
    texts: list[str]


@dataclass(frozen=True)
class Transform:
    """How items become examples of at most `length` tokens.

    instructions: pairs become translation instructions; None: the text of both directions. holds_markers: the run made
    the items itself, and they may hold the chain's markers; in any other item a marker or special token makes it a bad
    row. rules, evaluation: what is left out (see `data.cleaning`). exact: note each item's hash, so that duplicates can
    be found; near: its MinHash signature too.
    """

    content: Content
    length: int
    markers: Markers = MARKERS
    instructions: Instructions | None = None
    holds_markers: bool = False
    rules: Rules = field(default_factory=Rules)
    evaluation: EvaluationTexts | None = None
    exact: bool = True
    near: bool = False

    @property
    def key(self) -> str:
        """A hash of all of it."""
        parts: list[Any] = [_FORMAT, self.content, self.length, self.markers.in_order()]
        parts += [asdict(self.rules), self.exact, self.near]
        parts.append(None if self.evaluation is None else self.evaluation.key)
        if self.instructions is not None:
            parts.append(asdict(self.instructions))
        if self.holds_markers:
            parts.append("markers")
        return sha256_of_json(parts)

    def made(self, tokenizer: Tokenizer, items: Sequence[Item], counts: Counter[str]) -> list[Made]:
        """The examples of each item; none for one that was left out, which is counted by its reason."""
        prepared = self.prepare(items, counts)
        return self.finish(tokenizer, prepared, tokenizer.encode_batch(prepared.texts), counts)

    def prepare(self, items: Sequence[Item], counts: Counter[str], first: int = 0) -> Prepared:
        """The first part of `made`: what is left out, and the texts to encode of the rest.

        first: the number of the first item in its shard.
        """
        kept = []
        for item in items:
            why = reason(item, self.rules, self.evaluation)
            if why is not None:
                counts[why] += 1
            kept.append(why is None)
        numbered = enumerate(zip(items, kept, strict=True), first)
        given = [self._asked(item, number) for number, (item, keep) in numbered if keep]
        texts: list[str] = []  # a conversation is encoded message by message, by the chat template
        if self.content == "pairs" and self.instructions is None:
            pairs = [item for item in given if isinstance(item, tuple)]
            texts = [text for english, target in pairs for text in pair_texts(english, target, self.markers)]
        elif self.content == "text":
            texts = [str(item) for item in given]
        return Prepared(kept, given, texts)

    def _asked(self, item: Item, number: int) -> Item:
        """A pair as an instruction, where the transform makes instructions; any other item as it is."""
        if self.instructions is None or not isinstance(item, tuple):
            return item
        return self.instructions.conversation(*item, number, self.markers)

    def finish(
        self,
        tokenizer: Tokenizer,
        prepared: Prepared,
        ids: Sequence[list[int]],
        counts: Counter[str],
        places: Sequence[Place | None] | None = None,
    ) -> list[Made]:
        """The last part of `made`: the examples, of the ids of the prepared texts.

        places: where all the items stand. Raises UserError, with the place, for a conversation that the chat template
        refuses.
        """
        places = [None] * len(prepared.kept) if places is None else places
        given = [place for place, keep in zip(places, prepared.kept, strict=True) if keep]
        whole = [whole_text(tokenizer, one) for one in ids]
        examples = iter(self._examples(tokenizer, prepared, whole, counts, given))
        return [next(examples) if keep else Made([], []) for keep in prepared.kept]

    def _examples(
        self,
        tokenizer: Tokenizer,
        prepared: Prepared,
        whole: list[Example],
        counts: Counter[str],
        places: Sequence[Place | None],
    ) -> list[Made]:
        if self.content == "conversations" or self.instructions is not None:
            both = zip(prepared.items, places, strict=True)
            return [self._conversation(tokenizer, item, counts, place) for item, place in both]
        if self.content == "text":
            return [self._document(example, text, counts) for example, text in zip(whole, prepared.texts, strict=True)]
        found = []
        for pair, ways in zip(prepared.items, zip(whole[::2], whole[1::2], strict=True), strict=True):
            # Half a translation teaches to stop early: a long one is left out, not cut.
            short = [example for example in ways if len(example) <= self.length]
            # Pairs, as all else is counted by items, though each direction goes by itself.
            counts["longer than a row"] += len(short) < 2
            found.append(Made(short, [len("".join(map(str, pair)).encode())] * len(short)))
        return found

    def _document(self, example: Example, text: str, counts: Counter[str]) -> Made:
        pieces = split_example(example, self.length)
        counts["split"] += len(pieces) > 1
        # A piece's share of the bytes is its share of the tokens.
        ends = np.cumsum([len(piece) for piece in pieces])
        edges = np.concatenate([[0], ends * len(text.encode()) // ends[-1]])
        return Made(pieces, np.diff(edges).tolist())

    def _conversation(self, tokenizer: Tokenizer, item: Item, counts: Counter[str], place: Place | None) -> Made:
        assert isinstance(item, list)
        try:
            rows, outcome = conversation_rows(tokenizer, item, self.length, self.markers)
        except UserError as error:
            raise error if place is None else UserError(f"{place}: {error}") from error
        counts["longer than a row"] += outcome == "dropped"
        counts["cut at a turn"] += outcome == "cut"
        return Made([make_example(row.ids, row.mask) for row in rows], [row.size for row in rows])

    def keys(self, item: Item) -> tuple[int, np.ndarray | None]:
        """What duplicates of an item are found by: a hash, and a signature where near ones are wanted."""
        text = text_of(item)
        return (exact_key(text) if self.exact else 0), (signature(text) if self.near else None)


def refuse_specials(item: Item, place: Place, tokenizer: Tokenizer, markers: Markers) -> None:
    """Refuse a special token or marker inside user data. Raises UserError with file and line."""

    def find_special(text: str) -> str | None:
        return tokenizer.find_special(text) or next((m for m in markers.in_order() if m in text), None)

    refuse_special(item, find_special, place)
