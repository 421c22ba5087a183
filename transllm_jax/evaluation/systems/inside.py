"""Chains whose English answer is the original's: the trained model reads the question and writes the answer, and the
original, which is the same weights without the adapters, answers in English between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transllm_jax.evaluation.systems.local import Found, LocalSystem, sampling_of
from transllm_jax.evaluation.systems.rounds import Talk, converse
from transllm_jax.evaluation.systems.system import Asked, Turn
from transllm_jax.generation.chain import answer_of, remembered
from transllm_jax.generation.engine import Request
from transllm_jax.tokenizer.ends import end_ids


@dataclass(frozen=True)
class _Begun:
    """A chain that has come to its English answer. ids: the prompt and what the model wrote. question: in English."""

    talk: Talk
    ids: list[int]
    question: str


class OriginalInside:
    """A system of chains whose English answer is the original's; a question in English goes to it directly.

    model: what answers in chains. original: sees earlier turns in English, as the model does. An answer of the model
    that does not come to an English answer is the model's own.
    """

    def __init__(self, name: str, model: LocalSystem, original: LocalSystem) -> None:
        self.name, self.model, self.original = name, model, original

    @property
    def identity(self) -> Mapping[str, Any]:
        """Those of both."""
        return {"kind": "inside", "model": self.model.identity, "original": self.original.identity}

    def answers(
        self, asked: Sequence[Asked], between: Callable[[], None] = lambda: None, *, at_once: int | None = None
    ) -> Iterator[tuple[Asked, list[Turn]]]:
        """As `System.answers`."""
        translations = [one for one in asked if one.translate is not None]
        english = [one for one in asked if one.translate is None and one.language == "english"]
        rest = [one for one in asked if one.translate is None and one.language != "english"]
        if translations:
            yield from self.model.answers(translations, between, at_once=at_once)
        if english:
            yield from self.original.answers(english, between, at_once=at_once)
        answer = partial(self._round, between=between, at_once=at_once or len(asked))
        yield from converse(rest, answer, window=2 * self.model.batch_size, history_en=True)

    def _round(self, talks: Sequence[Talk], *, between: Callable[[], None], at_once: int) -> Found:
        """The next turn of each talk: read, answered in English, and written, all talks together each time."""
        options: dict[str, Any] = {"at_once": at_once, "between": between}
        begun: dict[str, _Begun] = {}
        for one in self._read(talks, options):
            if isinstance(one, _Begun):
                begun[str(one.talk.number)] = one
            else:
                yield one
        asked = [
            Asked(
                number,
                (one.question,),
                "english",
                one.talk.asked.max_new_tokens,
                sampling_of(one.talk),
                tuple(one.talk.history),
            )
            for number, one in begun.items()
        ]
        answered = {one.id: turns[0] for one, turns in self.original.answers(asked, **options)} if asked else {}
        # In the order of the questions: an answer depends on nothing else then.
        yield from self._written([(one, answered[number]) for number, one in begun.items()], options)

    def _read(self, talks: Sequence[Talk], options: Mapping[str, Any]) -> Iterator[_Begun | tuple[Talk, Turn, Any]]:
        """What each question is in English, or the turn of a talk whose answer ends without an English one."""
        tokenizer, markers = self.model.weights.tokenizer, self.model.weights.markers
        response = tokenizer.token_id(markers.response)
        assert response is not None
        stop = [*end_ids(tokenizer), response]
        fitting, requests = [], []
        for talk in talks:
            fault = self.model.fault(talk)
            if fault is not None:
                yield talk, talk.failed(fault), []
                continue
            fitting.append(talk)
            limit = talk.asked.max_new_tokens
            requests.append(Request(self.model.prompt(talk), limit, stop, sampling=sampling_of(talk)))
        for number, result in self.model.engine.run(requests, **options) if requests else ():
            talk, text = fitting[number], tokenizer.decode(result.ids)
            if result.stopped_by != response:
                answer = answer_of(text, markers, cut_off=result.finish_reason == "length")
                yield talk, self.model.turn(talk, answer), remembered(talk.question, answer, tokenizer)
                continue
            question = tokenizer.without_specials(answer_of(text, markers, whole=False).question_en)
            # Nothing before the marker: the question was in English.
            yield _Begun(talk, [*requests[number].prompt, *result.ids, response], question or talk.question)

    def _written(self, answered: Sequence[tuple[_Begun, Turn]], options: Mapping[str, Any]) -> Found:
        """The chains to their end: the answer in the language, after the original's in English."""
        tokenizer, markers = self.model.weights.tokenizer, self.model.weights.markers
        target = tokenizer.token_id(markers.target)
        assert target is not None
        rest, requests = [], []
        for begun, english in answered:
            talk, limit = begun.talk, begun.talk.asked.max_new_tokens
            ids = [*begun.ids, *tokenizer.encode(english.visible), target]
            fault = english.error
            if fault is None and len(ids) + limit > self.model.weights.config.context:
                fault = f"a chain of {len(ids)} tokens and {limit} new ones exceed the model's context"
            if fault is not None or not english.visible:
                yield talk, talk.failed(fault or "the original has no answer in English"), []
                continue
            rest.append((begun, english))
            requests.append(Request(ids, limit, end_ids(tokenizer), sampling=sampling_of(talk)))
        for number, result in self.model.engine.run(requests, **options) if requests else ():
            begun, english = rest[number]
            text = f"{markers.english}{begun.question}{markers.response}{english.visible}{markers.target}"
            answer = answer_of(text + tokenizer.decode(result.ids), markers, cut_off=result.finish_reason == "length")
            yield begun.talk, self.model.turn(begun.talk, answer), remembered(begun.talk.question, answer, tokenizer)
