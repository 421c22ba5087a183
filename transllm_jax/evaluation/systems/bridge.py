"""A translation bridge: the question is translated into English, a model answers, the answer is translated back.

It is what the transferred model competes with: the original model as it is, between two translations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from transllm_jax.config import TranslatorEndpoint
from transllm_jax.evaluation.systems.local import LocalSystem
from transllm_jax.evaluation.systems.rounds import Talk, converse
from transllm_jax.evaluation.systems.system import Asked, System, Turn
from transllm_jax.generation.endpoint import Client, Request, request_body
from transllm_jax.generation.pieces import cut, join
from transllm_jax.generation.translate import Direction
from transllm_jax.tokenizer.chat import Message

# Conversations that go on together: what a killed process loses at most.
WINDOW = 64


class TextTranslator(Protocol):
    """Translates texts; None for one that it says nothing to."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def translate(
        self, texts: Sequence[str], direction: Direction, between: Callable[[], None]
    ) -> list[str | None]: ...


@dataclass(frozen=True)
class PairTranslator:
    """A run's model of stage `translate`, which translates between two markers, sentence by sentence."""

    system: LocalSystem
    max_new_tokens: int
    between_sentences: str

    @property
    def identity(self) -> Mapping[str, Any]:
        """That of the model, and how it is used."""
        how = {"by": "sentence", "between_sentences": self.between_sentences}
        return {**self.system.identity, "max_new_tokens": self.max_new_tokens, **how}

    def translate(self, texts: Sequence[str], direction: Direction, between: Callable[[], None]) -> list[str | None]:
        """As `TextTranslator.translate`; a text of which a sentence has no translation has none."""
        pieces = [cut(text) for text in texts]
        sentences = list(dict.fromkeys(piece.text for own in pieces for piece in own if piece.translate))
        made = dict(
            self.system.translate(
                sentences,
                direction,
                max_new_tokens=self.max_new_tokens,
                # Always the same slots, whatever is left to do.
                at_once=self.system.batch_size,
                between=between,
            )
        )
        found = {sentence: made[number].text for number, sentence in enumerate(sentences)}
        space = " " if direction == "to_english" else self.between_sentences
        translated: list[str | None] = []
        for own in pieces:
            texts_of = [found[piece.text] for piece in own if piece.translate]
            kept = [text for text in texts_of if text is not None]
            translated.append(join(own, kept, space) if own and len(kept) == len(texts_of) else None)
        return translated


class EndpointTranslator:
    """A server that translates when it is asked to. language: the target language's name."""

    def __init__(
        self, settings: TranslatorEndpoint, language: str, max_new_tokens: int, say: Callable[[str], None]
    ) -> None:
        self._settings, self._language = settings, language
        self._limit = settings.max_tokens or max_new_tokens
        self._client = Client(settings, "endpoint", say)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The server's URL, the model's name there, and what it is asked."""
        settings = self._settings
        return {
            "url": settings.endpoint,
            "model": settings.model,
            "prompt": settings.prompt,
            "body": settings.body,
            "language": self._language,
            "max_tokens": self._limit,
        }

    def translate(self, texts: Sequence[str], direction: Direction, between: Callable[[], None]) -> list[str | None]:
        """As `TextTranslator.translate`."""
        language = self._language if direction == "to_target" else "English"
        requests = []
        for number, text in enumerate(texts):
            prompt = self._settings.prompt.replace("{language}", language).replace("{text}", text)
            body = request_body(self._settings, [{"role": "user", "content": prompt}], self._limit, 0)
            requests.append(Request(str(number), body))
        found: list[str | None] = [None] * len(texts)
        for reply in self._client.replies(requests):
            between()
            if reply is not None and reply.error is None:
                found[int(reply.id)] = reply.text.strip() or None
        return found


class Bridge:
    """A system of English answers between two translations; a question in English goes to it directly.

    inner: what answers in English; it sees earlier turns in English. An answer's chain is the English question, the
    English answer and its translation, so that what failed is counted as in a chain.
    """

    def __init__(self, name: str, inner: System, translator: TextTranslator) -> None:
        self.name, self.inner, self.translator = name, inner, translator

    @property
    def identity(self) -> Mapping[str, Any]:
        """Those of both."""
        return {"kind": "bridge", "inner": self.inner.identity, "translator": self.translator.identity}

    def answers(
        self, asked: Sequence[Asked], between: Callable[[], None] = lambda: None, *, at_once: int | None = None
    ) -> Iterator[tuple[Asked, list[Turn]]]:
        """As `System.answers`."""
        english = [one for one in asked if _is_direct(one)]
        if english:
            yield from self.inner.answers(english, between, at_once=at_once)
        rest = [one for one in asked if not _is_direct(one)]
        for start in range(0, len(rest), WINDOW):
            some = rest[start : start + WINDOW]
            yield from converse(some, partial(self._round, between=between), window=WINDOW, history_en=True)

    def _round(
        self, talks: Sequence[Talk], between: Callable[[], None]
    ) -> Iterator[tuple[Talk, Turn, Sequence[Message]]]:
        for talk, turn in self._translations([talk for talk in talks if talk.asked.translate], between):
            yield talk, turn, []
        chats = [talk for talk in talks if talk.asked.translate is None]
        if not chats:
            return
        questions = self.translator.translate([talk.question for talk in chats], "to_english", between)
        asked, waiting = [], {}
        for number, (talk, question) in enumerate(zip(chats, questions, strict=True)):
            if question is None:
                yield talk, talk.failed("the question has no translation into English"), []
                continue
            sampling = talk.asked.sampling
            if talk.turns:
                sampling = sampling.for_row(len(talk.turns))
            limit = talk.asked.max_new_tokens
            asked.append(Asked(str(number), (question,), "english", limit, sampling, tuple(talk.history)))
            waiting[str(number)] = talk, question
        answered = [(*waiting[one.id], turns[0]) for one, turns in self.inner.answers(asked, between, at_once=WINDOW)]
        texts = [turn.visible for _, _, turn in answered]
        given = [text or "." for text in texts]  # nothing is not to be translated, but keeps its place
        back = self.translator.translate(given, "to_target", between) if given else []
        for (talk, question, turn), text, answer in zip(answered, texts, back, strict=True):
            yield self._turn(talk, question, turn, answer if text else None)

    def _turn(
        self, talk: Talk, question: str, english: Turn, answer: str | None
    ) -> tuple[Talk, Turn, Sequence[Message]]:
        if english.error is not None:
            return talk, talk.failed(english.error), []
        remembered: list[Message] = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": english.visible},
        ]
        raw = f"{question}\n\n{english.raw}\n\n{answer or ''}"
        chain = {"question_en": question, "answer_en": english.visible, "answer": answer} if answer else None
        turn = Turn(talk.messages, raw, answer or "", chain, "bridge", english.cut_off)
        return talk, turn, remembered if english.visible else []

    def _translations(self, talks: Sequence[Talk], between: Callable[[], None]) -> Iterator[tuple[Talk, Turn]]:
        """Translations alone: those of the translator."""
        directions: tuple[Direction, Direction] = ("to_target", "to_english")
        for direction in directions:
            some = [
                (talk, talk.asked.translate[1])
                for talk in talks
                if talk.asked.translate is not None and talk.asked.translate[0] == direction
            ]
            made = self.translator.translate([text for _, text in some], direction, between) if some else []
            for (talk, _), text in zip(some, made, strict=True):
                yield talk, Turn(talk.messages, text or "", text or "", how="bridge")


def _is_direct(asked: Asked) -> bool:
    """Whether a question needs no translation."""
    return asked.language == "english" and asked.translate is None
