"""A model that answers through our own engine: a run at one of its points, or a model directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from transllm_jax.errors import UserError
from transllm_jax.evaluation.systems.rounds import Talk, converse, plain_memory
from transllm_jax.evaluation.systems.system import Asked, Turn
from transllm_jax.generation.answer import Answer
from transllm_jax.generation.chain import ChainChat, remembered
from transllm_jax.generation.engine import Engine, Request
from transllm_jax.generation.sampling import Sampling
from transllm_jax.generation.translate import Direction, Made, ModelTranslator, translation_prompt
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.parameters import Split
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.chat import Message, encode_prompt
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer

_Found = Iterator[tuple[Talk, Turn, Sequence[Message]]]


@dataclass(frozen=True)
class Weights:
    """An opened model.

    tuned: whether stage `transfer` trained it: then earlier turns are in English, and a marker comes before its English
    answers. in_chains: whether it was trained to answer in chains there. in_pairs: whether it was last trained to
    translate between two markers, as stage `translate` does.
    """

    split: Split
    config: LlamaConfig
    tokenizer: Tokenizer
    markers: Markers
    tuned: bool = False
    in_chains: bool = False
    in_pairs: bool = False


@dataclass
class LocalSystem:
    """Answers with our own engine.

    Where the model answers in chains, a broken one is continued once, earlier turns are remembered in English, and an
    answer in English begins with the marker of English answers. original: opens the original model of its run, which
    may be this one; None if there is none. inside: the original writes the English answers, within chains and to
    English questions. batch_size: answers at a time.
    """

    name: str
    weights: Weights
    identity: Mapping[str, Any]
    batch_size: int = 32
    original: Callable[[], LocalSystem] | None = field(default=None, repr=False)
    inside: bool = False

    @cached_property
    def engine(self) -> Engine:
        """The engine of its weights."""
        return Engine(self.weights.split, self.weights.config, batch_size=self.batch_size)

    def answers(
        self, asked: Sequence[Asked], between: Callable[[], None] = lambda: None, *, at_once: int | None = None
    ) -> Iterator[tuple[Asked, list[Turn]]]:
        """As `System.answers`."""
        answer = partial(self._round, between=between, at_once=at_once or len(asked))
        yield from converse(asked, answer, window=2 * self.batch_size, history_en=self.weights.tuned)

    def translate(
        self,
        texts: Sequence[str],
        direction: Direction,
        *,
        max_new_tokens: int,
        at_once: int | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Made]]:
        """Yield the number of each text and its translation in the format of pairs.

        at_once: as in `answers`.
        """
        translator = ModelTranslator(
            self.engine,
            self.weights.tokenizer,
            self.weights.markers,
            max_new_tokens=max_new_tokens,
            between=between,
        )
        yield from translator.each(texts, direction, at_once=at_once)

    def _round(self, talks: Sequence[Talk], *, between: Callable[[], None], at_once: int) -> _Found:
        """The next turn of each talk. Those that are asked in the same way, with the same limit, are asked together."""
        groups: dict[tuple[Any, ...], list[Talk]] = {}
        for talk in talks:
            groups.setdefault((*self._way(talk.asked), talk.asked.max_new_tokens), []).append(talk)
        for (way, direction, limit), some in groups.items():
            fitting = []
            for talk in some:
                fault = self._fault(talk, way, direction)
                if fault is None:
                    fitting.append(talk)
                else:
                    yield talk, talk.failed(fault), []
            if not fitting:
                continue
            if way == "pair":
                yield from self._translated(fitting, direction, limit, at_once, between)
            elif way == "english":
                yield from self._in_english(fitting, limit, at_once, between)
            else:
                yield from self._chatted(fitting, limit, at_once, between)

    def _way(self, asked: Asked) -> tuple[str, Direction | None]:
        if asked.translate is not None:
            return ("pair", asked.translate[0]) if self.weights.in_pairs else ("chat", None)
        return ("english" if asked.language == "english" and self.weights.tuned else "chat"), None

    def _fault(self, talk: Talk, way: str, direction: Direction | None) -> str | None:
        """Why a turn cannot be answered."""
        try:
            prompt = len(self._prompt(talk, way, direction))
        except UserError as error:
            return str(error)
        new, context = talk.asked.max_new_tokens, self.weights.config.context
        if prompt + new > context:
            return f"a prompt of {prompt} tokens and {new} new ones exceed the model's context of {context}"
        return None

    def _prompt(self, talk: Talk, way: str, direction: Direction | None) -> list[int]:
        tokenizer, markers = self.weights.tokenizer, self.weights.markers
        if way == "pair" and direction is not None and talk.asked.translate is not None:
            return translation_prompt(tokenizer, markers, talk.asked.translate[1], direction)
        begun = tokenizer.encode(markers.response) if way == "english" else []
        return [*encode_prompt(tokenizer, talk.messages, markers.in_order()), *begun]

    def _chatted(self, talks: Sequence[Talk], limit: int, at_once: int, between: Callable[[], None]) -> _Found:
        tokenizer = self.weights.tokenizer
        chat = self._chat(limit)
        if self.inside and self.original is not None:
            chat = chat.with_original(self.original()._chat(limit))
        samplings = [_sampling(talk) for talk in talks]
        messages = [talk.messages for talk in talks]
        for number, answer in chat.each(messages, samplings=samplings, at_once=at_once, between=between):
            talk = talks[number]
            turn = self._turn(talk, answer)
            if self.weights.in_chains:
                kept: Sequence[Message] = remembered(talk.question, answer, tokenizer)
            else:
                kept = plain_memory(talk, turn.visible)
            yield talk, turn, kept

    def _chat(self, limit: int) -> ChainChat:
        return ChainChat(self.engine, self.weights.tokenizer, self.weights.markers, max_new_tokens=limit)

    def _turn(self, talk: Talk, answer: Answer) -> Turn:
        chain = answer.chain
        return Turn(
            prompt=talk.messages,
            raw=answer.raw,
            visible=self.weights.tokenizer.without_specials(answer.visible),
            chain=None
            if chain is None
            else {"question_en": chain.question_en, "answer_en": chain.answer_en, "answer": chain.answer_target},
            how=answer.how if self.weights.in_chains else None,
            cut_off=answer.cut_off,
        )

    def _in_english(self, talks: Sequence[Talk], limit: int, at_once: int, between: Callable[[], None]) -> _Found:
        """English answers: after their marker, up to the next one; or the original's."""
        if self.inside and self.original is not None:
            yield from self.original()._chatted(talks, limit, at_once, between)
            return
        tokenizer, markers = self.weights.tokenizer, self.weights.markers
        stop = end_ids(tokenizer)
        requests = [
            Request(self._prompt(talk, "english", None), limit, stop, sampling=_sampling(talk)) for talk in talks
        ]
        for number, result in self.engine.run(requests, at_once=at_once, between=between):
            text = tokenizer.decode(result.ids)
            visible = text
            for marker in markers.in_order():
                visible = visible.partition(marker)[0]
            visible, cut_off = tokenizer.without_specials(visible), result.finish_reason == "length"
            talk = talks[number]
            turn = Turn(talk.messages, markers.response + text, visible, how="english", cut_off=cut_off)
            yield talk, turn, plain_memory(talk, visible)

    def _translated(
        self,
        talks: Sequence[Talk],
        direction: Direction,
        limit: int,
        at_once: int,
        between: Callable[[], None],
    ) -> _Found:
        texts = [talk.asked.translate[1] for talk in talks if talk.asked.translate is not None]
        found = self.translate(texts, direction, max_new_tokens=limit, at_once=at_once, between=between)
        markers = self.weights.markers
        order = (markers.english, markers.target) if direction == "to_target" else (markers.target, markers.english)
        for number, (text, finished) in found:
            prompt: list[Message] = [{"role": "user", "content": f"{order[0]}{texts[number].strip()}{order[1]}"}]
            yield talks[number], Turn(prompt, text or "", text or "", cut_off=not finished), []


def _sampling(talk: Talk) -> Sampling:
    """The sampling of a talk's next turn: later turns have seeds of their own."""
    sampling = talk.asked.sampling
    return sampling.for_row(len(talk.turns)) if talk.turns else sampling
