"""A conversation with a run's model, its original, or another model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from transllm_jax.commands.lines import Lines, Plain
from transllm_jax.commands.open_chat import ChatModel, English, open_chat_model
from transllm_jax.disk import is_utf8
from transllm_jax.errors import UserError
from transllm_jax.generation.answer import Answer
from transllm_jax.generation.chain import ChainChat, remembered
from transllm_jax.generation.engine import Engine, Mode
from transllm_jax.generation.sampling import GREEDY, Sampling
from transllm_jax.tokenizer.chain import MARKERS, Markers
from transllm_jax.tokenizer.chat import Message
from transllm_jax.tokenizer.tokenizer import Tokenizer


@dataclass
class Session:
    """One conversation with a model, and the turns that it remembers (in English where there were chains).

    forgotten: how many of the oldest turns were dropped because the model's context was full. early: whether the model
    is that of a run whose last stage, which teaches chains, is not done. original: opens the original model inside it;
    None if there is none. in_chains: whether the model answers in chains. english: which model writes the English
    answers.
    """

    name: str
    chat: ChainChat
    tokenizer: Tokenizer
    history: list[Message] = field(default_factory=list)
    forgotten: int = 0
    early: bool = False
    original: Callable[[], ChainChat] | None = None
    in_chains: bool = False
    english: English = "model"

    def ask(self, question: str, *, original: bool = False) -> Iterator[Answer]:
        """Yield the answer as it grows. The turn is remembered once the whole answer has been taken, and only then are
        older turns forgotten that no longer fit into the model's context.

        original: the original model answers, as it was before any training. Raises UserError for a question with a
        special token or a control character in it, one that does not fit the context, and if there is no original.
        """
        check_question(question, self.tokenizer)
        chat = self._original() if original else self.chat
        if not original and self.english == "original":
            chat = chat.with_original(self._original())
        asked: Message = {"role": "user", "content": question.strip()}
        kept, left_out = chat.fitting([*self.history, asked])
        answer = None
        for answer in chat.stream(kept):
            yield answer
        if answer is not None:
            self.history = [*kept[:-1], *remembered(asked["content"], answer, self.tokenizer)]
            self.forgotten += left_out

    def reset(self) -> None:
        """Forget the conversation."""
        self.history, self.forgotten = [], 0

    def set_english(self, english: English) -> None:
        """Say which model writes the English answers. Raises UserError if there is no original, or are no chains."""
        if english == "original":
            self.require_original()
            if not self.in_chains:
                raise UserError(f"{self.name} does not answer in chains; /base asks the original model")
        self.english = english

    def require_original(self) -> Callable[[], ChainChat]:
        """What opens the original model. Raises UserError if there is none."""
        if self.original is None:
            raise UserError(f"there is no original model beside {self.name}; open a run's work directory")
        return self.original

    def _original(self) -> ChainChat:
        opens = self.require_original()
        if self._opened is None:
            self._opened = opens()
        return self._opened

    _opened: ChainChat | None = field(default=None, init=False, repr=False)


def check_question(question: str, tokenizer: Tokenizer) -> None:
    """Raises UserError for a question that cannot be asked: an empty one, or one with special tokens, with control
    characters, or with bytes that are not UTF-8.
    """
    if not is_utf8(question):
        raise UserError("the question is not UTF-8; use a UTF-8 terminal and locale, such as LANG=C.UTF-8")
    if not question.strip():
        raise UserError("the question is empty; ask something")
    # A line break on Windows is `\r\n`.
    controls = [letter for letter in question if unicodedata.category(letter) == "Cc" and letter not in "\t\r\n"]
    if controls:
        raise UserError(f"the question contains the control character U+{ord(controls[0]):04X}; leave it out")
    found = tokenizer.find_special(question)
    if found:
        raise UserError(f"the question contains the special token {found}; write it in another way")


def open_session(
    given: Path | str,
    *,
    base: bool = False,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    english: English = "model",
) -> Session:
    """Open a session with a work directory's newest point (or its original model), or with another model.

    given: see `open_chat_model`, also for errors.
    """
    opened = open_chat_model(given, base=base)

    def chat_with(model: ChatModel) -> ChainChat:
        # One conversation, one answer at a time. A cache of this size seldom has to grow, which takes a compilation.
        engine = Engine(model.split, model.config, batch_size=1, cache_size=2048)
        mode = Mode(sampling=sampling)
        return ChainChat(engine, model.tokenizer, model.markers, max_new_tokens=max_new_tokens, mode=mode)

    first = opened.original
    session = Session(
        opened.name,
        chat_with(opened),
        opened.tokenizer,
        early=opened.early,
        original=None if first is None else (lambda: chat_with(first())),
        in_chains=opened.in_chains,
    )
    session.set_english(english)
    return session


def show(console: Console, answers: Iterator[Answer], *, show_chain: bool, markers: Markers = MARKERS) -> Answer | None:
    """Print an answer while it grows: what the user sees, or, with `show_chain`, the whole text.

    On a terminal, in lines of its width; the English steps of a chain are dim, and each begins a line. Returns the
    whole answer; None if there was none.
    """
    on_terminal = console.is_terminal
    out = Lines(console) if on_terminal else Plain(console)
    answer, given = None, 0
    out.wait()
    for answer in answers:
        text = answer.raw if show_chain else answer.visible
        for more, style in _styled(text, given, markers) if show_chain and on_terminal else [(text[given:], "")]:
            out.write(more, style)
        given = len(text)
    out.end()
    return answer


def _styled(raw: str, given: int, markers: Markers) -> Iterator[tuple[str, str]]:
    """A raw text from a place on, in pieces with their styles, and with line breaks before the markers."""
    place, style, in_chain = 0, "", False
    for piece in re.split("(" + "|".join(map(re.escape, markers.in_order())) + ")", raw):
        is_marker = piece in markers.in_order()
        if is_marker:
            in_chain = in_chain or piece == markers.english
            style = "dim" if in_chain and piece != markers.target else ""
            if 0 < place >= given:
                yield "\n", ""
        if place + len(piece) > given:
            yield piece[max(given - place, 0) :], "dim" if is_marker else style
        place += len(piece)
