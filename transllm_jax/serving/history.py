"""The English history of a conversation, which clients do not send back.

The model sees earlier turns in English (arXiv 2405.13923), and a client keeps what its user saw. So the English of each
earlier turn is taken from the first of these: the reasoning that the client sends back; a memory of what was answered,
by what was visible; the model's own translation; the text itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, NamedTuple

from transllm_jax.serving.protocol import Said
from transllm_jax.tokenizer.chat import Message
from transllm_jax.tokenizer.tokenizer import Tokenizer

# Where the English of an earlier turn is from. left out: nothing was answered in it.
Source = Literal["reasoning", "cache", "translation", "text", "left out"]
# What introduces the two parts of the reasoning. They are read back from what a client returns.
QUESTION, ANSWER = "Question: ", "\n\nAnswer: "
_REASONING = re.compile(r"\s*Question:\s*(.*?)\s*\n\s*Answer:\s*(.*?)\s*", re.DOTALL)

Translate = Callable[[str], Awaitable[str | None]]


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


def read_reasoning(text: str) -> Turn | None:
    """The question and the answer in English in what a client returns; None if both are not there."""
    found = _REASONING.fullmatch(text)
    return Turn(*found.groups()) if found is not None and all(found.groups()) else None


class Memory:
    """The English of the last turns, by a hash of what was visible. It forgets the ones that were longest unused."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()

    def __len__(self) -> int:
        return len(self._turns)

    def find(self, name: str, said: Sequence[Said]) -> Turn | None:
        """The turn with which a visible conversation of a model ends; failing that, the last one of these words.

        A client may leave out the beginning of a conversation.
        """
        for key in _keys(name, said):
            if key in self._turns:
                self._turns.move_to_end(key)
                return self._turns[key]
        return None

    def keep(self, name: str, said: Sequence[Said], turn: Turn) -> None:
        """Remember the turn with which a visible conversation of a model ends."""
        for key in _keys(name, said):
            self._turns[key] = turn
            self._turns.move_to_end(key)
        while len(self._turns) > self._most:
            self._turns.popitem(last=False)


def _keys(name: str, said: Sequence[Said]) -> list[bytes]:
    """Hashes of the whole conversation and of its last turn alone."""
    seen = [message for message in said if message.role != "system"]
    keys = []
    for part in dict.fromkeys((tuple(seen), tuple(seen[-2:]))):
        digest = hashlib.blake2b(name.encode(), digest_size=16)
        for message in part:
            text = message.content.replace("\r\n", "\n").strip().encode()
            digest.update(f"{message.role} {len(text)} ".encode() + text)
        keys.append(digest.digest())
    return keys


# Gives the turn with which a visible conversation ends, as the model is to see it.
Find = Callable[[Sequence[Said]], Awaitable[tuple[Turn, Source]]]


async def seen_by_model(said: Sequence[Said], find: Find, tokenizer: Tokenizer) -> tuple[list[Message], list[Source]]:
    """A conversation as the model sees it, and where each earlier turn is from.

    Messages that are no answer, and have none, stay as they are. Raises what `find` raises.
    """
    messages: list[Message] = []
    sources: list[Source] = []
    for place, message in enumerate(said):
        if message.role != "assistant":
            messages.append({"role": message.role, "content": message.content})
            continue
        asked = messages[-1] if messages and messages[-1]["role"] == "user" else None
        turn, source = await find(said[: place + 1])
        question, answer = (tokenizer.without_specials(text) for text in turn)
        if not answer or (asked is not None and not question):
            source = "left out"
            if asked is not None:
                messages.pop()
        else:
            if asked is not None:
                asked["content"] = question
            messages.append({"role": "assistant", "content": answer})
        sources.append(source)
    return messages, sources


def said_in(said: Sequence[Said]) -> Turn:
    """The turn with which a conversation ends, as it is."""
    question = said[-2].content if len(said) > 1 and said[-2].role == "user" else ""
    return Turn(question, said[-1].content)


class English:
    """Finds the English of earlier turns of a model."""

    def __init__(self, name: str, memory: Memory, translate: Translate) -> None:
        self._name, self._memory, self._translate = name, memory, translate

    async def __call__(self, said: Sequence[Said]) -> tuple[Turn, Source]:
        """The English of the turn with which a visible conversation ends. Raises what `translate` raises."""
        if returned := read_reasoning(said[-1].reasoning):
            return returned, "reasoning"
        if known := self._memory.find(self._name, said):
            return known, "cache"
        seen = said_in(said)
        if not seen.answer or all(map(_is_plain, seen)):
            return seen, "text"
        made = await asyncio.gather(*map(self._english, seen))
        if any(text is None for text in made):
            return seen, "text"
        turn = Turn(*(text or "" for text in made))
        self._memory.keep(self._name, said, turn)
        return turn, "translation"

    async def _english(self, text: str) -> str | None:
        return text if _is_plain(text) else await self._translate(text)


async def as_said(said: Sequence[Said]) -> tuple[Turn, Source]:
    """For a model that writes no chains."""
    return said_in(said), "text"


def _is_plain(text: str) -> bool:
    """Whether a text has no letters but those of English."""
    return all(letter.isascii() for letter in text if letter.isalpha())
