"""From an item of a source to token sequences to train on. Everything on which a cached shard depends is here.

A `Transform` is sent to worker processes, and its key is part of a cached shard's name.
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
    chat_examples,
    conversation_rows,
    direct_message,
    make_example,
    pair_texts,
    split_example,
    text_example,
)
from transllm_jax.data.rows.instructions import Instructions
from transllm_jax.disk import sha256_of_json
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chain import MARKERS, Markers
from transllm_jax.tokenizer.tokenizer import Tokenizer

# Part of the key. To be raised if the same settings give other examples.
_FORMAT = 2


class ItemExamples(NamedTuple):
    """The examples of one item, and for each the number of UTF-8 bytes of the text that it trains."""

    examples: list[Example]
    bytes: list[int]


class Prepared(NamedTuple):
    """Items before encoding. kept: whether each item is used; items: those that are used; texts: to encode of these."""

    kept: list[bool]
    items: list[Item]
    texts: list[str]


@dataclass(frozen=True)
class Transform:
    """How items become examples of at most `length` tokens.

    instructions: pairs become translation instructions; if None, texts of both directions. holds_markers: the items are
    chains, which the run made or a source says that it has, and may contain their markers; any other item with a marker
    or special token is a bad row. direct: only the last part of a chain is kept of it. in_chat: a text is an answer in
    the chat template. rules, evaluation: which items are left out (see `data.clean`). exact, near: compute
    each item's hash, and its MinHash signature, by which duplicates are found.
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
    direct: bool = False
    in_chat: bool = False

    @property
    def key(self) -> str:
        """A hash of all fields."""
        parts: list[Any] = [_FORMAT, self.content, self.length, self.markers.in_order()]
        parts += [asdict(self.rules), self.exact, self.near]
        parts.append(None if self.evaluation is None else self.evaluation.key)
        if self.instructions is not None:
            parts.append(asdict(self.instructions))
        if self.holds_markers:
            parts.append("markers")
        # Named only where they are set: the keys of other shards stay what they were.
        parts += [name for name in ("direct", "in_chat") if getattr(self, name)]
        return sha256_of_json(parts)

    def prepare(self, items: Sequence[Item], counts: Counter[str], first: int = 0) -> Prepared:
        """Decide which items are left out, and give the texts to encode of the rest; `finish` makes the examples.

        first: the number of the first item in its shard.
        """
        kept = []
        for item in items:
            why = reason(item, self.rules, self.evaluation)
            if why is not None:
                counts[why] += 1
            kept.append(why is None)
        numbered = enumerate(zip(items, kept, strict=True), first)
        used = [self._as_instruction(item, number) for number, (item, keep) in numbered if keep]
        texts: list[str] = []  # none for conversations, whose messages the chat template encodes one by one
        if self.content == "pairs" and self.instructions is None:
            pairs = [item for item in used if isinstance(item, tuple)]
            texts = [text for english, target in pairs for text in pair_texts(english, target, self.markers)]
        elif self.content == "text" and not self.in_chat:
            texts = [str(item) for item in used]
        return Prepared(kept, used, texts)

    def _as_instruction(self, item: Item, number: int) -> Item:
        """A pair as an instruction if the transform makes instructions; any other item unchanged."""
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
    ) -> list[ItemExamples]:
        """The examples of each item, from the ids of the prepared texts; none for an item that is left out.

        places: the places of all items, for messages. Raises UserError with the place for a conversation that the chat
        template refuses.
        """
        places = [None] * len(prepared.kept) if places is None else places
        used = [place for place, keep in zip(places, prepared.kept, strict=True) if keep]
        whole = [text_example(tokenizer, text_ids) for text_ids in ids]
        examples = iter(self._examples(tokenizer, prepared, whole, counts, used))
        return [next(examples) if keep else ItemExamples([], []) for keep in prepared.kept]

    def _examples(
        self,
        tokenizer: Tokenizer,
        prepared: Prepared,
        whole: list[Example],
        counts: Counter[str],
        places: Sequence[Place | None],
    ) -> list[ItemExamples]:
        if self.content == "conversations" or self.instructions is not None:
            both = zip(prepared.items, places, strict=True)
            return [self._conversation(tokenizer, item, counts, place) for item, place in both]
        if self.in_chat:
            return [self._in_chat(tokenizer, str(item), counts) for item in prepared.items]
        if self.content == "text":
            return [self._document(example, text, counts) for example, text in zip(whole, prepared.texts, strict=True)]
        directions = zip(whole[::2], whole[1::2], strict=True)
        return [self._pair(item, both, counts) for item, both in zip(prepared.items, directions, strict=True)]

    def _pair(self, pair: Item, directions: Sequence[Example], counts: Counter[str]) -> ItemExamples:
        # A direction that is too long is left out, not cut: half a translation would teach the model to stop early.
        short = [example for example in directions if len(example) <= self.length]
        # Counted once per pair, though each direction is left out by itself: all counts are of items.
        counts["longer than a row"] += len(short) < 2
        return ItemExamples(short, [len("".join(map(str, pair)).encode())] * len(short))

    def _document(self, example: Example, text: str, counts: Counter[str]) -> ItemExamples:
        return self._pieces(split_example(example, self.length), text, counts)

    def _in_chat(self, tokenizer: Tokenizer, text: str, counts: Counter[str]) -> ItemExamples:
        return self._pieces(chat_examples(tokenizer, text, self.length, self.markers), text, counts)

    def _pieces(self, pieces: list[Example], text: str, counts: Counter[str]) -> ItemExamples:
        counts["split"] += len(pieces) > 1
        # A piece's share of the bytes is its share of the tokens.
        ends = np.cumsum([len(piece) for piece in pieces])
        edges = np.concatenate([[0], ends * len(text.encode()) // ends[-1]])
        return ItemExamples(pieces, np.diff(edges).tolist())

    def _conversation(
        self, tokenizer: Tokenizer, item: Item, counts: Counter[str], place: Place | None
    ) -> ItemExamples:
        assert isinstance(item, list)
        if self.direct:
            item = [direct_message(message, self.markers) for message in item]
        try:
            rows, outcome = conversation_rows(tokenizer, item, self.length, self.markers)
        except UserError as error:
            raise error if place is None else UserError(f"{place}: {error}") from error
        counts["longer than a row"] += outcome == "dropped"
        counts["cut at a turn"] += outcome == "cut"
        return ItemExamples([make_example(row.ids, row.mask) for row in rows], [row.size for row in rows])

    def keys(self, item: Item) -> tuple[int, np.ndarray | None]:
        """What duplicates are found by: an item's hash (0 if not `exact`), and its signature (None if not `near`)."""
        text = text_of(item)
        return (exact_key(text) if self.exact else 0), (signature(text) if self.near else None)


def refuse_specials(item: Item, place: Place, tokenizer: Tokenizer, markers: Markers) -> None:
    """Refuse a special token or marker inside user data. Raises UserError with file and line."""

    def find_special(text: str) -> str | None:
        return tokenizer.find_special(text) or next((marker for marker in markers.in_order() if marker in text), None)

    refuse_special(item, find_special, place)
