"""Answers by the translation chain of thought, its fallback, and the history that a conversation keeps.

TransLLM (arXiv 2405.13923): the model sees earlier turns in English, its stronger language; an answer that breaks the
format is continued once, after the missing marker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transllm_jax.generation.engine import WHOLE, Engine, Mode
from transllm_jax.tokenizer.chain import Chain, Markers, missing_marker, parse, visible
from transllm_jax.tokenizer.chat import Message, encode_prompt
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """One answer. `raw`: the whole text. `continued`: whether the fallback was used. `cut_off`: whether the limit of
    new tokens ended it, and not the model."""

    raw: str
    chain: Chain | None
    visible: str
    continued: bool
    cut_off: bool = False

    def recorded(self) -> dict[str, Any]:
        """What an evaluation keeps of it (JSON)."""
        chain = None if self.chain is None else vars(self.chain)
        return {"raw": self.raw, "visible": self.visible, "chain": chain, "cut_off": self.cut_off}


def _answer(raw: str, markers: Markers, continued: bool, cut_off: bool) -> Answer:
    return Answer(raw.strip(), parse(raw, markers), visible(raw, markers), continued, cut_off)


class ChainChat:
    """Answers with chains, in one conversation or a batch of them."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, markers: Markers, *, max_new_tokens: int, mode: Mode = WHOLE
    ) -> None:
        self._engine, self._tokenizer, self._markers = engine, tokenizer, markers
        self._max_new_tokens, self._mode = max_new_tokens, mode

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        fallback: bool = True,
        on_tokens: Callable[[int], None] = lambda count: None,
        between: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """The next answer in each conversation.

        With `fallback`, a broken chain is continued once, if the model's context has room for `max_new_tokens` more.

        on_tokens, between: as in `Engine.generate`.
        """
        prompts = [encode_prompt(self._tokenizer, messages, self._markers.in_order()) for messages in conversations]
        generated = self._generate(prompts, on_tokens, between)
        texts = [self._tokenizer.decode(ids) for ids in generated]
        answers = [
            _answer(text, self._markers, False, self._is_cut_off(ids))
            for text, ids in zip(texts, generated, strict=True)
        ]
        broken = [row for row, text in enumerate(texts) if self._breaks_off(text)] if fallback else []
        longer = {row: [*prompts[row], *generated[row], *self._appended(texts[row])] for row in broken}
        longer = {row: prompt for row, prompt in longer.items() if self._has_room(prompt)}
        if longer:
            for row, ids in zip(longer, self._generate(list(longer.values()), on_tokens, between), strict=True):
                text = self._tokenizer.decode([*generated[row], *self._appended(texts[row]), *ids])
                answers[row] = _answer(text, self._markers, True, self._is_cut_off(ids))
        return answers

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether the model's context has room for a conversation and its next answer."""
        return self._has_room(encode_prompt(self._tokenizer, messages, self._markers.in_order()))

    def _has_room(self, prompt: Sequence[int]) -> bool:
        return len(prompt) + self._max_new_tokens <= self._engine.config.context

    def stream(self, messages: Sequence[Message]) -> Iterator[Answer]:
        """Yield the next answer of a conversation as it grows, at last the whole one (continued once if it is broken).

        The fallback is that of `answers`.
        """
        prompt = encode_prompt(self._tokenizer, messages, self._markers.in_order())
        ids: list[int] = []
        for ids in self._stream(prompt):
            yield _answer(self._tokenizer.decode(ids), self._markers, False, self._is_cut_off(ids))
        text = self._tokenizer.decode(ids)
        begun = [*ids, *self._appended(text)]
        if self._breaks_off(text) and self._has_room([*prompt, *begun]):
            for more in self._stream([*prompt, *begun]):
                yield _answer(self._tokenizer.decode([*begun, *more]), self._markers, True, self._is_cut_off(more))

    def _is_cut_off(self, ids: Sequence[int]) -> bool:
        return len(ids) >= self._max_new_tokens

    def _breaks_off(self, text: str) -> bool:
        """Whether a chain was begun but lacks a marker. An English answer, or a translation, is complete as it is."""
        begun = text.lstrip().startswith(self._markers.english) and self._markers.response in text
        return begun and missing_marker(text, self._markers) is not None

    def _appended(self, text: str) -> list[int]:
        return self._tokenizer.encode(missing_marker(text, self._markers) or "")

    def _generate(
        self, prompts: Sequence[Sequence[int]], on_tokens: Callable[[int], None], between: Callable[[], None]
    ) -> list[list[int]]:
        return self._engine.generate(
            prompts,
            max_new_tokens=self._max_new_tokens,
            stop=end_ids(self._tokenizer),
            mode=self._mode,
            on_tokens=on_tokens,
            between=between,
        )

    def _stream(self, prompt: Sequence[int]) -> Iterator[list[int]]:
        return self._engine.stream(
            prompt, max_new_tokens=self._max_new_tokens, stop=end_ids(self._tokenizer), mode=self._mode
        )


def remembered(question: str, answer: Answer, tokenizer: Tokenizer) -> list[Message]:
    """A finished turn as the model sees it from now on: question and answer, in English if there is a chain.

    Special tokens that the model wrote are removed, since no prompt may contain one. Empty if nothing is left of the
    question or of the answer.
    """
    text = answer.visible
    if answer.chain is not None:
        question, text = answer.chain.question_en, answer.chain.answer_en
    question, text = tokenizer.without_specials(question), tokenizer.without_specials(text)
    if not question or not text:
        return []
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
