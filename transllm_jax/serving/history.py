"""The English history of a conversation, which clients do not send back.

The model sees earlier turns in English (arXiv 2405.13923), and a client keeps what its user saw. So the English of each
earlier turn is taken from the first of these: the reasoning that the client sends back; a memory of what was answered,
by what was visible; the model's own translation; the text itself.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from transllm_jax.serving.protocol import Said
from transllm_jax.tokenizer.chat import Message
from transllm_jax.tokenizer.tokenizer import Tokenizer

# Where the English of an earlier turn is from. left out: nothing was answered in it.
Source = Literal["reasoning", "cache", "translation", "text", "left out"]
# What introduces the two parts of the reasoning. They are read back from what a client returns.
QUESTION, ANSWER = "Question: ", "\n\nAnswer: "

# Turns of a conversation that are translated together: others ask, too.
TOGETHER = 4

Translate = Callable[[str], Awaitable[str | None]]


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


def read_reasoning(text: str) -> Turn | None:
    """The question and the answer in English in what a client returns; None if both are not there."""
    first, *lines = text.strip().split("\n")
    # Clients send any text, and as much as they like: this looks at each line once.
    place = next((place for place, line in enumerate(lines) if line.lstrip().startswith(ANSWER.strip())), None)
    if place is None or not first.startswith(QUESTION.strip()):
        return None
    answer = "\n".join([lines[place].lstrip().removeprefix(ANSWER.strip()), *lines[place + 1 :]])
    turn = Turn("\n".join([first.removeprefix(QUESTION.strip()), *lines[:place]]).strip(), answer.strip())
    return turn if all(turn) else None


class Memory:
    """The English of the last turns, by a hash of what was visible. It forgets the ones that were longest unused."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()

    def __len__(self) -> int:
        return len(self._turns)

    def find(self, keys: Sequence[bytes]) -> Turn | None:
        """The turn with which a visible conversation of a model ends, by its `keys_of`; failing that, the last one of
        these words.

        A client may leave out the beginning of a conversation.
        """
        for key in keys:
            if key in self._turns:
                self._turns.move_to_end(key)
                return self._turns[key]
        return None

    def keep(self, keys: Sequence[bytes], turn: Turn) -> None:
        """Remember the turn with which a visible conversation of a model ends."""
        for key in keys:
            self._turns[key] = turn
            self._turns.move_to_end(key)
        while len(self._turns) > self._most:
            self._turns.popitem(last=False)


def keys_of(name: str, said: Sequence[Said]) -> Iterator[list[bytes]]:
    """For the conversation up to each message: hashes of the whole of it, and of its last turn alone."""
    whole, last = hashlib.blake2b(name.encode(), digest_size=16), b""
    for message in said:
        before = last
        if message.role != "system":
            text = message.content.replace("\r\n", "\n").strip().encode()
            last = f"{message.role} {len(text)} ".encode() + text
            whole.update(last)
        turn = hashlib.blake2b(name.encode() + before + last, digest_size=16)
        yield [whole.copy().digest(), turn.digest()]


# Gives the turn that the answer at a place of the conversation ends, as the model is to see it.
Find = Callable[[int], Awaitable[tuple[Turn, Source]]]


async def seen_by_model(said: Sequence[Said], find: Find, tokenizer: Tokenizer) -> tuple[list[Message], list[Source]]:
    """A conversation as the model sees it, and where each earlier turn is from.

    Messages that are no answer, and have none, stay as they are. Raises what `find` raises.
    """
    messages: list[Message] = []
    sources: list[Source] = []
    answers = [place for place, message in enumerate(said) if message.role == "assistant"]
    # All at once: one translation does not wait for another.
    turns = dict(zip(answers, await asyncio.gather(*map(find, answers)), strict=True))
    for place, message in enumerate(said):
        if message.role != "assistant":
            messages.append({"role": message.role, "content": message.content})
            continue
        asked = messages[-1] if messages and messages[-1]["role"] == "user" else None
        turn, source = turns[place]
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


def said_at(said: Sequence[Said], place: int) -> Turn:
    """The turn that the answer at a place ends, as it is."""
    question = said[place - 1].content if place and said[place - 1].role == "user" else ""
    return Turn(question, said[place].content)


class English:
    """Finds the English of the earlier turns of a conversation with a model."""

    def __init__(self, name: str, said: Sequence[Said], memory: Memory, translate: Translate) -> None:
        self._said, self._memory, self._translate = said, memory, translate
        self._keys = list(keys_of(name, said))
        self._room = asyncio.Semaphore(TOGETHER)

    async def __call__(self, place: int) -> tuple[Turn, Source]:
        """The English of the turn that the answer at a place ends. Raises what `translate` raises."""
        if returned := read_reasoning(self._said[place].reasoning):
            return returned, "reasoning"
        if known := self._memory.find(self._keys[place]):
            return known, "cache"
        seen = said_at(self._said, place)
        if not seen.answer or all(map(_is_plain, seen)):
            return seen, "text"
        async with self._room:
            made = await asyncio.gather(*map(self._english, seen))
        if any(text is None for text in made):
            return seen, "text"
        turn = Turn(*(text or "" for text in made))
        self._memory.keep(self._keys[place], turn)
        return turn, "translation"

    async def _english(self, text: str) -> str | None:
        return text if _is_plain(text) else await self._translate(text)


async def as_said(said: Sequence[Said], place: int) -> tuple[Turn, Source]:
    """For a model that writes no chains."""
    return said_at(said, place), "text"


def _is_plain(text: str) -> bool:
    """Whether a text has no letters but those of English."""
    return all(letter.isascii() for letter in text if letter.isalpha())
