"""Answers by the translation chain of thought, its fallback, and the history that a conversation keeps.

TransLLM (arXiv 2405.13923): the model sees earlier turns in English, its stronger language; an answer that breaks the
format is continued once, after the missing marker.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
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


class Writing:
    """An answer while its tokens come, and how it goes on where its chain breaks off.

    markers: None for a model that writes no chains: all its text is the answer. hidden: ids that are left out of the
    text, such as special tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, markers: Markers | None, prompt: Sequence[int], *, hidden: Container[int] = ()
    ) -> None:
        self._tokenizer, self._markers, self._prompt, self._hidden = tokenizer, markers, prompt, hidden
        self._text = TextStream(tokenizer)
        self._begun = 0
        self._cut_off = self._continued = False
        # All tokens, with the marker that was appended.
        self.ids: list[int] = []

    def grow(self, ids: Sequence[int]) -> Answer:
        """The answer as far as it is known, given all tokens of the present generation so far.

        The raw text and the parts only grow (see `Deltas` for the exception): an incomplete character, or marker, at
        the end is held back.
        """
        self._add(ids[len(self.ids) - self._begun :])
        return self._answer(self._text.text, whole=False)

    def end(self, *, cut_off: bool) -> Answer:
        """The whole answer, when its generation has ended. cut_off: the limit of new tokens ended it."""
        self._cut_off = self._cut_off or cut_off
        return self._answer(self._text.whole)

    def longer(self) -> list[int] | None:
        """The prompt to continue the answer from, if its chain lacks only its last marker; at most once.

        After `go_on`, more tokens belong to the continuation.
        """
        if self._markers is None or self._continued or not _breaks_off(self._answer(self._text.whole), self._markers):
            return None
        return [*self._prompt, *self.ids, *self._appended()]

    def go_on(self) -> None:
        """Continue a chain that breaks off."""
        self._continued = True
        self._add(self._appended())
        self._begun = len(self.ids)

    def _add(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self._text.add([token for token in ids if token not in self._hidden])

    def _appended(self) -> list[int]:
        assert self._markers is not None
        return _appended(self._tokenizer, self._text.whole, self._markers)

    def _answer(self, text: str, *, whole: bool = True) -> Answer:
        options: dict[str, Any] = {"continued": self._continued, "cut_off": whole and self._cut_off}
        if self._markers is None:
            return Answer(text, None, text, **options, parts=Parts(answer=text))
        return answer_of(text, self._markers, whole=whole, **options)


def _breaks_off(answer: Answer, markers: Markers) -> bool:
    """Whether a chain lacks only its last marker. An English answer, or a translation, is complete as it is."""
    english, response, target = markers.in_order()
    begun = answer.raw.startswith(english) and response in answer.raw and target not in answer.raw
    return begun and missing_marker(answer.raw, markers) == target


def _appended(tokenizer: Tokenizer, text: str, markers: Markers) -> list[int]:
    return tokenizer.encode(missing_marker(text, markers) or "")


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
            begun = [*ids, *_appended(self._tokenizer, text, self._markers)]
            continues = fallback and _breaks_off(answer, self._markers)
            if continues and self._has_room([*prompts[number], *begun]):
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
        prompt: Sequence[int] | None = encode_prompt(self._tokenizer, messages, self._markers.in_order())
        writing = Writing(self._tokenizer, self._markers, prompt or ())
        options: Any = {"max_new_tokens": self._max_new_tokens, "stop": end_ids(self._tokenizer), "mode": self._mode}
        while prompt is not None:
            last, ids = None, []
            for ids in self._engine.stream(prompt, **options):
                last = writing.grow(ids)
                yield last
            whole = writing.end(cut_off=self._is_cut_off(ids))
            prompt = writing.longer()
            if prompt is not None and self._has_room(prompt):
                writing.go_on()
            else:
                prompt = None
        if last is None or (last, last.parts) != (whole, whole.parts):
            yield whole

    def _is_cut_off(self, ids: Sequence[int]) -> bool:
        return len(ids) >= self._max_new_tokens

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
