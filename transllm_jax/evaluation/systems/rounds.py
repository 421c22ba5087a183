"""Conversations of several turns, of which each turn waits for the answer to the one before: they go on in rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from transllm_jax.evaluation.systems.system import Asked, Turn
from transllm_jax.tokenizer.chat import Message


@dataclass
class Talk:
    """A conversation on its way. number: its place. history: the turns so far as the system sees them."""

    number: int
    asked: Asked
    history: list[Message]
    turns: list[Turn] = field(default_factory=list)

    @property
    def question(self) -> str:
        """What the user says now."""
        return self.asked.turns[len(self.turns)]

    @property
    def messages(self) -> list[Message]:
        """What the system is to answer now."""
        return [*self.history, {"role": "user", "content": self.question}]

    def failed(self, error: str) -> Turn:
        """The turn without an answer."""
        return Turn(self.messages, "", "", error=error)


# Answers the next turn of each talk: yields a talk, its turn, and the messages that are remembered of it, in any order.
Round = Callable[[Sequence[Talk]], Iterator[tuple[Talk, Turn, Sequence[Message]]]]


def converse(
    asked: Sequence[Asked], answer: Round, *, window: int, history_en: bool = False
) -> Iterator[tuple[Asked, list[Turn]]]:
    """Yield each question with its answered turns, as they are done.

    window: how many conversations go on together where one has several turns, so that a killed process loses at most
    these. history_en: whether the system sees the turns before the first in English, where there are any. After a turn
    without an answer the conversation's later turns fail, too.
    """
    size = window if any(len(one.turns) > 1 for one in asked) else len(asked)
    for start in range(0, len(asked), max(size, 1)):
        some = asked[start : start + size]
        live = [
            Talk(number, one, list((one.history_en if history_en else ()) or one.history))
            for number, one in enumerate(some)
        ]
        while live:
            waiting = []
            for talk, turn, remembered in answer(live):
                talk.turns.append(turn)
                talk.history += remembered
                while turn.error is not None and len(talk.turns) < len(talk.asked.turns):
                    talk.turns.append(talk.failed("a turn before it has no answer"))
                if len(talk.turns) == len(talk.asked.turns):
                    yield talk.asked, talk.turns
                else:
                    waiting.append(talk)
            live = sorted(waiting, key=lambda talk: talk.number)


def plain_memory(talk: Talk, visible: str) -> list[Message]:
    """A turn as a system remembers it that knows nothing of chains; nothing of a turn without an answer."""
    if not visible:
        return []
    return [{"role": "user", "content": talk.question}, {"role": "assistant", "content": visible}]
