"""What is evaluated: anything that answers questions, of one turn or several, whatever makes the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from transllm_jax.generation.sampling import GREEDY, Sampling
from transllm_jax.generation.translate import Direction
from transllm_jax.tokenizer.chat import Message

Language = Literal["target", "english"]


@dataclass(frozen=True)
class Asked:
    """A question, or the first of several: each later turn is asked after the answer to the one before.

    turns: what the user says, in order. history: turns before the first, with their answers; history_en: the same in
    English, for systems that remember earlier turns in English. language: of the questions and of the wanted answers.
    sampling: its seed is this question's own. translate: the turn asks for this translation; a system that was trained
    on another format of translations uses that.
    """

    id: str
    turns: tuple[str, ...]
    language: Language = "target"
    max_new_tokens: int = 512
    sampling: Sampling = GREEDY
    history: tuple[Message, ...] = ()
    history_en: tuple[Message, ...] = ()
    translate: tuple[Direction, str] | None = None


@dataclass(frozen=True)
class Turn:
    """An answered turn.

    prompt: the messages that were sent, with the history as the system sees it (English, for chains). raw: all that
    came back. visible: what the user reads; only this is ever shown to a judge. chain: `question_en`, `answer_en`,
    `answer` of a well-formed chain. how: as `generation.chain.Answer.how`; None for systems that know nothing of
    chains. cut_off: whether a limit of tokens ended it. error: why there is no answer; then `visible` is empty, and the
    turn still counts.
    """

    prompt: list[Message]
    raw: str
    visible: str
    chain: dict[str, str] | None = None
    how: str | None = None
    cut_off: bool = False
    error: str | None = None

    def recorded(self) -> dict[str, Any]:
        """As JSON; `Turn(**recorded)` reads it back."""
        return asdict(self)


class System(Protocol):
    """Something that answers.

    name: for tables and directories. identity: all that an answer depends on besides the question (JSON): weights,
    adapter, template, URL and model. Two systems with equal identities are one.
    """

    name: str

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def answers(
        self, asked: Sequence[Asked], between: Callable[[], None] = lambda: None, *, at_once: int | None = None
    ) -> Iterator[tuple[Asked, list[Turn]]]:
        """Yield each question with its answered turns, in the order in which they are done.

        at_once: how many questions there are of all, if some are answered already: the rest then gets the answers that
        it would have got with them, to the bit, where the system allows it. `between` is called between parts of the
        work and may raise. Raises UserError for faults that are not of one question, such as a server that refuses the
        key.
        """
        ...
