"""Answers by the translation chain of thought, and the history that a conversation keeps.

TransLLM (arXiv 2405.13923): the model sees earlier turns in English, its stronger language; an answer that breaks the
format is continued once, after the missing marker (`generation/writing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transllm_jax.errors import UserError
from transllm_jax.generation.answer import Answer
from transllm_jax.generation.engine import WHOLE, Engine, Mode, Request, Result
from transllm_jax.generation.request import Growing
from transllm_jax.generation.sampling import Sampling
from transllm_jax.generation.writing import AskOriginal, Leg, Writing, next_legs
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.chat import Message, encode_prompt
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer


def ask_original(tokenizer: Tokenizer, messages: Sequence[Message]) -> AskOriginal:
    """How the original model is asked in English within a chain: with its own tokenizer and template, after the earlier
    turns. messages: what the trained model is asked, with earlier turns in English."""

    def ask(question: str) -> Leg:
        asked = [*messages[:-1], Message(role="user", content=question)] if question else messages
        return Leg(encode_prompt(tokenizer, asked), end_ids(tokenizer), original=True)

    return ask


class ChainChat:
    """Answers with chains, in one conversation or a batch of them.

    original: a chat with the original model, which then writes the English answers; without it the model itself does.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        markers: Markers,
        *,
        max_new_tokens: int,
        mode: Mode = WHOLE,
        original: ChainChat | None = None,
    ) -> None:
        self._engine, self._tokenizer, self._markers = engine, tokenizer, markers
        self._max_new_tokens, self._mode, self._original = max_new_tokens, mode, original

    @property
    def markers(self) -> Markers:
        """The markers of its chains."""
        return self._markers

    def with_original(self, original: ChainChat) -> ChainChat:
        """The same chat, in which this one writes the English answers."""
        return ChainChat(
            self._engine,
            self._tokenizer,
            self._markers,
            max_new_tokens=self._max_new_tokens,
            mode=self._mode,
            original=original,
        )

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        fallback: bool = True,
        on_tokens: Callable[[int], None] = lambda count: None,
        between: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """The next answer in each conversation; see `each`."""
        found = dict(self.each(conversations, fallback=fallback, on_tokens=on_tokens, between=between))
        return [found[number] for number in range(len(conversations))]

    def each(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        samplings: Sequence[Sampling] | None = None,
        at_once: int | None = None,
        fallback: bool = True,
        on_tokens: Callable[[int], None] = lambda count: None,
        between: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Answer]]:
        """Yield the number of a conversation, from 0, and its next answer, as answers finish.

        With `fallback`, a broken chain is continued once. What goes on, in the room that the model's context has for
        `max_new_tokens` more, comes last.

        samplings: one for each conversation; without them, the mode's, with a seed for each. at_once, on_tokens,
        between: as in `Engine.run`. Raises UserError for a prompt that leaves no room in the context.
        """
        if samplings is None:
            samplings = [self._mode.sampling.for_row(row) for row in range(len(conversations))]
        options: dict[str, Any] = {"at_once": at_once, "on_tokens": on_tokens, "between": between}
        writings = {number: self._writing(messages, mends=fallback) for number, messages in enumerate(conversations)}
        while writings:
            _, numbers = next_legs(writings)
            asked = [(writings[number].leg, samplings[number]) for number in numbers]
            for row, result in self._run(asked, options):
                number, writing = numbers[row], writings[numbers[row]]
                writing.grow(result.ids)
                answer = self._end(writing, result.ids, result.stopped_by)
                if answer is not None:
                    del writings[number]
                    yield number, answer

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether the model's context has room for a conversation and its next answer."""
        return self._has_room(encode_prompt(self._tokenizer, messages, self._markers.in_order()))

    def _has_room(self, prompt: Sequence[int]) -> bool:
        return len(prompt) + self._max_new_tokens <= self._engine.config.context

    def fitting(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """A conversation without its oldest turns, so that the model's context has room for it and its next answer.

        Returns it, and how many turns were left out. System messages and the last question are kept in any case.
        """
        kept, left_out = list(messages), 0
        while not self.fits(kept):
            turns = [place for place, message in enumerate(kept) if message["role"] == "user"]
            if len(turns) < 2:
                break
            del kept[turns[0] : turns[1]]
            left_out += 1
        return kept, left_out

    def stream(self, messages: Sequence[Message]) -> Iterator[Answer]:
        """Yield the next answer of a conversation as it grows, at last the whole one (continued once if it is broken).

        The raw text and the parts only grow (see `Deltas` for the exception): an incomplete character, or marker, at
        the end is held back. The fallback, and the whole answer, are those of `answers`.
        """
        writing, whole = self._writing(messages), None
        while whole is None:
            chat, grown, last = self._of(writing.leg), Growing([]), None
            options: Any = {"max_new_tokens": self._max_new_tokens, "stop": writing.leg.stop, "mode": chat._mode}
            for grown in chat._engine.stream(writing.leg.prompt, **options):
                last = writing.grow(grown.ids)
                yield last
            whole = self._end(writing, *grown)
        if last is None or (last, last.parts) != (whole, whole.parts):
            yield whole

    def _writing(self, messages: Sequence[Message], *, mends: bool = True) -> Writing:
        return Writing(
            self._tokenizer,
            self._markers,
            encode_prompt(self._tokenizer, messages, self._markers.in_order()),
            mends=mends,
            ask_original=None if self._original is None else ask_original(self._original._tokenizer, messages),
        )

    def _of(self, leg: Leg) -> ChainChat:
        """The chat whose model writes a leg."""
        return self._original if leg.original and self._original is not None else self

    def _end(self, writing: Writing, ids: Sequence[int], stopped_by: int | None) -> Answer | None:
        """End a leg with these tokens: the whole answer; None if it goes on."""
        cut_off = len(ids) >= self._max_new_tokens
        return writing.end(
            cut_off=cut_off, stopped_by=stopped_by, has_room=lambda leg: self._of(leg)._has_room(leg.prompt)
        )

    def _run(self, asked: Sequence[tuple[Leg, Sampling]], options: dict[str, Any]) -> Iterator[tuple[int, Result]]:
        """Yield the number of each leg and what was written, as they finish. asked: legs of one model."""
        chat = self._of(asked[0][0])
        requests = [Request(leg.prompt, self._max_new_tokens, leg.stop, sampling=sampling) for leg, sampling in asked]
        yield from chat._engine.run(requests, mode=chat._mode, **options)


def remembered(question: str, answer: Answer, tokenizer: Tokenizer) -> list[Message]:
    """A finished turn as the model sees it from now on: question and answer, in English if it wrote both.

    Special tokens that the model wrote are removed, since no prompt may contain one. Empty if nothing is left of the
    question or of the answer, or if the chat template cannot write such an answer (Qwen3's cuts what is before
    `</think>`): the conversation would end there, since every prompt contains what is remembered.
    """
    text = answer.visible
    if answer.question_en and answer.answer_en:
        question, text = answer.question_en, answer.answer_en
    question, text = tokenizer.without_specials(question), tokenizer.without_specials(text)
    if not question or not text:
        return []
    turn: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    try:
        encode_prompt(tokenizer, [*turn, {"role": "user", "content": "And?"}])
    except UserError:
        return []
    return turn
