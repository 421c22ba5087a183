"""A conversation with a run's model, its original, or an exported model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from transllm_jax.commands.open_chat import open_chat_model
from transllm_jax.disk import is_utf8
from transllm_jax.errors import UserError
from transllm_jax.generation.chain import Answer, ChainChat, remembered
from transllm_jax.generation.engine import Engine, Mode
from transllm_jax.generation.sampling import GREEDY, Sampling
from transllm_jax.tokenizer.chat import Message
from transllm_jax.tokenizer.tokenizer import Tokenizer


@dataclass
class Session:
    """One conversation with a model, and the turns that it remembers (in English where there were chains).

    forgotten: how many of the oldest turns were dropped because the model's context was full. early: whether the model
    is that of a run whose last stage, which teaches chains, is not done.
    """

    name: str
    chat: ChainChat
    tokenizer: Tokenizer
    history: list[Message] = field(default_factory=list)
    forgotten: int = 0
    early: bool = False

    def ask(self, question: str) -> Iterator[Answer]:
        """Yield the answer as it grows. The turn is remembered once the whole answer has been taken.

        Raises UserError for a question with a special token in it, or one that does not fit the context.
        """
        if not is_utf8(question):
            raise UserError("the question is not UTF-8; use a UTF-8 locale, such as LANG=C.UTF-8")
        found = self.tokenizer.find_special(question)
        if found:
            raise UserError(f"the question contains the special token {found}; write it in another way")
        if not question.strip():
            raise UserError("the question is empty; ask something")
        asked: Message = {"role": "user", "content": question}
        while self.history and not self.chat.fits([*self.history, asked]):
            del self.history[:2]
            self.forgotten += 1
        answer = None
        for answer in self.chat.stream([*self.history, asked]):
            yield answer
        if answer is not None:
            self.history += remembered(question, answer, self.tokenizer)


def open_session(
    given: Path | str, *, base: bool = False, max_new_tokens: int = 256, sampling: Sampling = GREEDY
) -> Session:
    """Open a session with a work directory's newest point (or its original model), or with an exported model.

    given: a directory, or the URL of a run on an object store. Raises UserError for a directory that is neither.
    """
    opened = open_chat_model(given, base=base)
    # One conversation, one answer at a time. A cache of this size seldom has to grow, which takes a compilation.
    engine = Engine(opened.split, opened.config, batch_size=1, cache_size=2048)
    chat = ChainChat(
        engine, opened.tokenizer, opened.markers, max_new_tokens=max_new_tokens, mode=Mode(sampling=sampling)
    )
    return Session(opened.name, chat, opened.tokenizer, early=opened.early)


def show(console: Console, answers: Iterator[Answer], *, show_chain: bool) -> None:
    """Print an answer while it grows: its visible part, with `show_chain` also the chain before it."""
    printed = ""

    def print_more(text: str) -> None:
        nonlocal printed
        if text.startswith(printed):
            console.print(text[len(printed) :], end="", soft_wrap=True)
            printed = text

    answer = None
    for answer in answers:
        print_more(_steady(answer, show_chain))
    if answer is not None:
        # Print the rest: an answer without a chain is printed only now, and so is what was held back.
        whole = answer.raw if show_chain else answer.visible
        if not whole.startswith(printed):
            console.print()
            printed = ""
        print_more(whole)
    console.print()


def _steady(answer: Answer, show_chain: bool) -> str:
    """The part of a growing answer that can be printed: without `show_chain`, only the chain's last part.

    An incomplete character at the end is held back, since the next tokens will change it.
    """
    if show_chain:
        return answer.raw.rstrip("\ufffd")
    return answer.chain.answer_target.rstrip("\ufffd") if answer.chain is not None else ""
