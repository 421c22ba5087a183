"""Answers by the translation chain of thought, its fallback, and the history that a conversation keeps.

TransLLM (arXiv 2405.13923): the model sees earlier turns in English, its stronger language; an answer that breaks the
format is continued once, after the missing marker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from transllm_jax.errors import UserError
from transllm_jax.generation.engine import WHOLE, Engine, Mode, Request
from transllm_jax.generation.sampling import Sampling
from transllm_jax.tokenizer.chain import Chain, Form, Markers, Parts, missing_marker, parse, read, without_begun_marker
from transllm_jax.tokenizer.chat import Message, encode_prompt
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.text_stream import TextStream, text_of
from transllm_jax.tokenizer.tokenizer import Tokenizer

# How an answer was obtained: in a form of `tokenizer/chain.py`, or as a chain that had to be continued.
How = Literal[Form, "continued"]
# The parts of an answer in the order in which they come. Only the last one is for the user; the others lead to it.
Part = Literal["question_en", "answer_en", "answer"]
PARTS: tuple[Part, ...] = ("question_en", "answer_en", "answer")


@dataclass(frozen=True)
class Answer:
    """One answer, whole or as far as it is known.

    raw: the whole text. chain: None if the text is no well-formed chain. visible: what the user sees. continued:
    whether the fallback was used. cut_off: whether the limit of new tokens ended it, and not the model. parts: what
    could be read, also from a malformed text.
    """

    raw: str
    chain: Chain | None
    visible: str
    continued: bool
    cut_off: bool = False
    parts: Parts = field(default=Parts(), compare=False)  # what it holds follows from `raw`

    @property
    def question_en(self) -> str:
        """The question in English; empty if the text has none."""
        return self.parts.question_en

    @property
    def answer_en(self) -> str:
        """The answer in English before the one in the target language; empty if the text has none."""
        return self.parts.answer_en

    @property
    def answer(self) -> str:
        """The answer that the user sees."""
        return self.visible

    @property
    def how(self) -> How:
        """How it was obtained."""
        return "continued" if self.continued else self.parts.form

    @property
    def complete(self) -> bool:
        """Whether the model ended it, in one of the forms that it is trained to write, or without any marker."""
        return bool(self.visible) and not self.cut_off and self.parts.form != "broken"

    def recorded(self) -> dict[str, Any]:
        """What an evaluation keeps of it (JSON)."""
        chain = None if self.chain is None else vars(self.chain)
        return {"raw": self.raw, "visible": self.visible, "chain": chain, "cut_off": self.cut_off}


def answer_of(
    text: str, markers: Markers, *, continued: bool = False, cut_off: bool = False, whole: bool = True
) -> Answer:
    """The answer in a text; whole: False for the beginning of one (see `read` in `tokenizer/chain.py`)."""
    parts = read(text, markers, whole=whole)
    if not whole:
        text = without_begun_marker(text, markers)
    return Answer(text.strip(), parse(text, markers), parts.answer, continued, cut_off, parts)


class Delta(NamedTuple):
    """More text of one part of an answer."""

    part: Part
    text: str


class Deltas:
    """What a growing answer has more of each time, part by part: what a server sends.

    The texts of a part, put together, are this part; no text is taken back. The one exception is a translation into
    English: it comes as `question_en` while it grows, and at last, whole, as the answer.
    """

    def __init__(self) -> None:
        self._given = dict.fromkeys(PARTS, 0)

    def of(self, answer: Answer) -> list[Delta]:
        """What is new, given the answer as far as it is known now (`ChainChat.stream`)."""
        found = []
        for part in PARTS:
            text: str = getattr(answer, part)
            if len(text) > self._given[part]:
                found.append(Delta(part, text[self._given[part] :]))
                self._given[part] = len(text)
        return found


class ChainChat:
    """Answers with chains, in one conversation or a batch of them."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, markers: Markers, *, max_new_tokens: int, mode: Mode = WHOLE
    ) -> None:
        self._engine, self._tokenizer, self._markers = engine, tokenizer, markers
        self._max_new_tokens, self._mode = max_new_tokens, mode

    @property
    def markers(self) -> Markers:
        """The markers of its chains."""
        return self._markers

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

        With `fallback`, a broken chain is continued once, if the model's context has room for `max_new_tokens` more;
        such answers come last.

        samplings: one for each conversation; without them, the mode's, with a seed for each. at_once, on_tokens,
        between: as in `Engine.run`. Raises UserError for a prompt that leaves no room in the context.
        """
        if samplings is None:
            samplings = [self._mode.sampling.for_row(row) for row in range(len(conversations))]
        prompts = [encode_prompt(self._tokenizer, messages, self._markers.in_order()) for messages in conversations]
        # By number: the prompt that is continued, the ids that the answer has so far, and the answer.
        broken: dict[int, tuple[list[int], list[int], Answer]] = {}
        for number, ids in self._run(list(zip(prompts, samplings, strict=True)), at_once, on_tokens, between):
            text = text_of(self._tokenizer, ids)
            answer = answer_of(text, self._markers, cut_off=self._is_cut_off(ids))
            begun = [*ids, *self._appended(text)]
            if fallback and self._breaks_off(answer) and self._has_room([*prompts[number], *begun]):
                broken[number] = [*prompts[number], *begun], begun, answer
            else:
                yield number, answer
        numbers = sorted(broken)
        again = [(broken[number][0], samplings[number]) for number in numbers]
        for row, ids in self._run(again, at_once, on_tokens, between):
            _, begun, answer = broken[numbers[row]]
            text = text_of(self._tokenizer, [*begun, *ids])
            cut_off = answer.cut_off or self._is_cut_off(ids)
            yield numbers[row], answer_of(text, self._markers, continued=True, cut_off=cut_off)

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
        prompt = encode_prompt(self._tokenizer, messages, self._markers.in_order())
        text, answer = TextStream(self._tokenizer), None
        for _ in self._stream(prompt, text, []):
            answer = answer_of(text.text, self._markers, whole=False)
            yield answer
        whole = answer_of(text.whole, self._markers, cut_off=self._is_cut_off(text.ids))
        begun = [*text.ids, *self._appended(text.whole)]
        if self._breaks_off(whole) and self._has_room([*prompt, *begun]):
            for _ in self._stream([*prompt, *begun], text, begun):
                answer = answer_of(text.text, self._markers, continued=True, whole=False)
                yield answer
            cut_off = whole.cut_off or self._is_cut_off(text.ids[len(begun) :])
            whole = answer_of(text.whole, self._markers, continued=True, cut_off=cut_off)
        if answer is None or (answer, answer.parts) != (whole, whole.parts):
            yield whole

    def _is_cut_off(self, ids: Sequence[int]) -> bool:
        return len(ids) >= self._max_new_tokens

    def _breaks_off(self, answer: Answer) -> bool:
        """Whether a chain lacks only its last marker. An English answer, or a translation, is complete as it is."""
        english, response, target = self._markers.in_order()
        begun = answer.raw.startswith(english) and response in answer.raw and target not in answer.raw
        return begun and missing_marker(answer.raw, self._markers) == target

    def _appended(self, text: str) -> list[int]:
        return self._tokenizer.encode(missing_marker(text, self._markers) or "")

    def _run(
        self,
        asked: Sequence[tuple[Sequence[int], Sampling]],
        at_once: int | None,
        on_tokens: Callable[[int], None],
        between: Callable[[], None],
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield the number and the ids of each answer, as answers finish. asked: prompts and their sampling."""
        stop = end_ids(self._tokenizer)
        requests = [Request(prompt, self._max_new_tokens, stop, sampling=sampling) for prompt, sampling in asked]
        options: dict[str, Any] = {"mode": self._mode, "at_once": at_once, "on_tokens": on_tokens, "between": between}
        for number, result in self._engine.run(requests, **options) if requests else ():
            yield number, result.ids

    def _stream(self, prompt: Sequence[int], text: TextStream, begun: Sequence[int]) -> Iterator[None]:
        """Add what is generated to the text, and yield each time. First, the text gets what it lacks of `begun`."""
        text.add(begun[len(text.ids) :])
        for ids in self._engine.stream(
            prompt, max_new_tokens=self._max_new_tokens, stop=end_ids(self._tokenizer), mode=self._mode
        ):
            text.add(ids[len(text.ids) - len(begun) :])
            yield


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
