"""Token sequences to train on, made from documents, pairs and conversations.

Packing never splits an example. So texts that are longer than a row are shortened here: documents are split, and
conversations are cut at a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from transllm_jax.errors import UserError
from transllm_jax.tokenizer import chat
from transllm_jax.tokenizer.chain import MARKERS, Markers, read
from transllm_jax.tokenizer.chat import Message
from transllm_jax.tokenizer.tokenizer import Tokenizer

Outcome = Literal["kept", "cut", "dropped"]


class TextTokenizer(Protocol):
    """The part of `transllm_jax.tokenizer.tokenizer.Tokenizer` that examples need."""

    @property
    def bos_ids(self) -> list[int]: ...

    @property
    def document_end_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True, eq=False)
class Example:
    """ids: int32 [n]. mask: uint8 [n], 1 for tokens that are trained as targets.

    A token is predicted from those before it in its example, so mask[0] has no effect.
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


def text_example(tokenizer: TextTokenizer, ids: list[int]) -> Example:
    """An example of a text's ids: BOS, if the tokenizer adds one, is context; the ids and the end token are trained."""
    bos = list(tokenizer.bos_ids)
    return make_example([*bos, *ids, tokenizer.document_end_id], [0] * len(bos) + [1] * (len(ids) + 1))


def split_example(example: Example, length: int) -> list[Example]:
    """The example in pieces of at most `length` tokens (>= 2), in order. Raises ValueError for a smaller length.

    Each piece but the first begins with the last token of the one before, as context only (mask 0), so each token of
    the example is a target in exactly one piece.
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
    """Documents for causal LM as examples of at most `length` tokens; longer documents are split."""
    encoded = tokenizer.encode_batch(list(texts))
    return [piece for ids in encoded for piece in split_example(text_example(tokenizer, ids), length)]


def pair_texts(en: str, th: str, markers: Markers = MARKERS) -> tuple[str, str]:
    """A pair as two texts: from English to the target language, and from the target language to English."""
    english, target = markers.english, markers.target
    return f"{english}{en}{target}{th}", f"{target}{th}{english}{en}"


def conversation_rows(
    tokenizer: Tokenizer, messages: Sequence[Message], max_length: int, markers: Markers = MARKERS
) -> tuple[list[chat.Row], Outcome]:
    """A conversation in the model's chat template; exactly the answers and their end tokens are trained.

    It becomes one row, or one row per answer if the template rewrites earlier turns. A conversation of more than
    `max_length` tokens, or with a last question without an answer, loses whole turns at its end ("cut"). If its first
    turn does not fit, it has no rows ("dropped"). Raises UserError for what the chat template or
    `chat.encode_conversation` refuses, such as a special token inside a message.
    """
    rows, cut = chat.fitting_rows(tokenizer, messages, max_length, markers.in_order())
    return rows, "dropped" if not rows else "cut" if cut else "kept"


def direct_message(message: Message, markers: Markers = MARKERS) -> Message:
    """A message that is a chain as its last part alone, the answer in the target language; any other unchanged."""
    parts = read(message["content"], markers)
    if message["role"] != "assistant" or parts.form != "chain":
        return message
    direct: Message = {**message, "content": parts.answer}
    return direct


def chat_examples(tokenizer: Tokenizer, text: str, length: int, markers: Markers = MARKERS) -> list[Example]:
    """A document as an answer to an empty question, in the model's chat template; a longer one in pieces, each of at
    most `length` tokens and with the template before it. The text and the end token after it are trained.

    Raises UserError if the template refuses it, or leaves no room for text in a row.
    """
    messages: list[Message] = [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]
    (row,) = chat.encode_conversation(tokenizer, messages, markers.in_order())
    first = row.mask.index(1)
    before, answer = row.ids[:first], [id for id, trained in zip(row.ids, row.mask, strict=True) if trained]
    room = length - len(before)
    if room < 2:
        raise UserError(f"the chat template takes {len(before)} tokens of a row of {length}; raise length")
    return [
        make_example(
            [*before, *answer[start : start + room]], [0] * len(before) + [1] * len(answer[start : start + room])
        )
        for start in range(0, len(answer), room)
    ]
