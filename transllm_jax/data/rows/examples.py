"""Token sequences to train on, made from documents, pairs and conversations.

Packing puts examples side by side and never splits one. So what is longer than a row is made shorter here: documents
are split, conversations cut at a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from transllm_jax.tokenizer import chat
from transllm_jax.tokenizer.chain import MARKERS, Markers
from transllm_jax.tokenizer.chat import Message
from transllm_jax.tokenizer.tokenizer import Tokenizer

Outcome = Literal["kept", "cut", "dropped"]


class TextTokenizer(Protocol):
    """What examples need of a tokenizer (`transllm_jax.tokenizer.tokenizer.Tokenizer` is one)."""

    @property
    def bos_ids(self) -> list[int]: ...

    @property
    def document_end_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True, eq=False)
class Example:
    """ids: int32 [n]. mask: uint8 [n], 1 where the token is a target that is trained.

    A token is predicted from those before it in its example, so mask[0] never counts, whatever it is.
    """

    ids: np.ndarray
    mask: np.ndarray

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.shape != self.mask.shape or not len(self.ids):
            raise ValueError(f"ids {self.ids.shape} and mask {self.mask.shape} must be [n] with n > 0")

    def __len__(self) -> int:
        return len(self.ids)


def make_example(ids: Sequence[int], mask: Sequence[int]) -> Example:
    """An Example from plain lists of equal length."""
    return Example(np.asarray(ids, np.int32), np.asarray(mask, np.uint8))


def whole_text(tokenizer: TextTokenizer, ids: list[int]) -> Example:
    """The ids of a text, with its end: all is trained but what the tokenizer puts before a text by itself."""
    bos = list(tokenizer.bos_ids)
    return make_example([*bos, *ids, tokenizer.document_end_id], [0] * len(bos) + [1] * (len(ids) + 1))


def split_example(example: Example, length: int) -> list[Example]:
    """The example in pieces of at most `length` tokens (>= 2), in order.

    A piece begins with the last token of the one before, as context only (mask 0): so each token of the whole
    is a target in exactly one piece.
    """
    if length < 2:
        raise ValueError(f"pieces must hold at least 2 tokens, not {length}")
    if len(example) <= length:
        return [example]
    pieces = []
    for start in range(0, len(example) - 1, length - 1):
        ids, mask = example.ids[start : start + length].copy(), example.mask[start : start + length].copy()
        if start:
            mask[0] = 0
        pieces.append(Example(ids, mask))
    return pieces


def document_examples(tokenizer: TextTokenizer, texts: Sequence[str], length: int) -> list[Example]:
    """Documents for causal LM in examples of at most `length` tokens; longer ones are split."""
    encoded = tokenizer.encode_batch(list(texts))
    return [piece for ids in encoded for piece in split_example(whole_text(tokenizer, ids), length)]


def pair_texts(en: str, th: str, markers: Markers = MARKERS) -> tuple[str, str]:
    """Both directions of a pair as texts, from English and to English."""
    english, target = markers.english, markers.target
    return f"{english}{en}{target}{th}", f"{target}{th}{english}{en}"


def conversation_rows(
    tokenizer: Tokenizer, messages: Sequence[Message], max_length: int, markers: Markers = MARKERS
) -> tuple[list[chat.Row], Outcome]:
    """A conversation by the model's chat template, trained on exactly the answers and their end tokens.

    It is one row, or one an answer where the template rewrites earlier turns. One of more than `max_length` tokens, or
    with a last question that nobody answered, loses whole turns from its end ("cut"); one whose first turn does not fit
    gives none ("dropped"). Raises UserError for what the chat template or `chat.encode_conversation` refuses, such as a
    special token inside a message.
    """
    rows, cut = chat.fitting_rows(tokenizer, messages, max_length, markers.in_order())
    return rows, "dropped" if not rows else "cut" if cut else "kept"
