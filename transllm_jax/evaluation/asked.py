"""Asks a point checkable questions in both languages, and judges its answers (`evaluation/answers.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transllm_jax.data.read.questions import Question
from transllm_jax.evaluation.answers import Checkable, Judge, is_understood, reason_of
from transllm_jax.generation.chain import ChainChat
from transllm_jax.generation.engine import Engine
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.chat import Message, encode_prompt
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer


class English:
    """Asks in English. marked: the answer follows the marker of English answers, as the drift of English answers is
    measured, so that it is in English whatever the model would begin with."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, markers: Markers, max_new_tokens: int, *, marked: bool
    ) -> None:
        self._engine, self._tokenizer, self._markers = engine, tokenizer, markers
        self._max_new_tokens = max_new_tokens
        self._begin = tokenizer.encode(markers.response) if marked else []

    def answers(self, conversations: Sequence[Sequence[Message]], between: Callable[[], None]) -> list[str]:
        """The answers, each up to the next marker."""
        order = self._markers.in_order()
        prompts = [[*encode_prompt(self._tokenizer, messages, order), *self._begin] for messages in conversations]
        generated = self._engine.generate(
            prompts, max_new_tokens=self._max_new_tokens, stop=end_ids(self._tokenizer), between=between
        )
        texts = [self._tokenizer.decode(ids) for ids in generated]
        return [_before_markers(text, order) for text in texts]


def _before_markers(text: str, markers: Sequence[str]) -> str:
    for marker in markers:
        text = text.partition(marker)[0]
    return text.strip()


class Asking:
    """The first `limit` of the questions, or `few` of these, with the judges of all in each language."""

    def __init__(
        self,
        questions: Sequence[Question],
        limit: int,
        *,
        few: int | None = None,
        in_chains: bool,
        english_history: bool | None = None,
    ) -> None:
        """few: taken evenly, because a file may be sorted by kind. in_chains: whether the model was trained to answer
        in chains. english_history: whether it sees earlier turns in English, by default if it answers in chains.
        """
        limit = min(limit, len(questions))
        few = limit if few is None else min(few, limit)
        self._english_history = in_chains if english_history is None else english_history
        self._numbers = [number * limit // few for number in range(few)]
        self._questions, self._in_chains = [questions[number] for number in self._numbers], in_chains
        self._target = Judge(Checkable(one.question, one.answers, one.kind) for one in questions)
        self._english = Judge(
            Checkable(one.wordings[0] if one.wordings else "", one.answers_en, one.kind) for one in questions
        )

    def in_target(self, chat: ChainChat, between: Callable[[], None]) -> list[dict[str, Any]]:
        """What the model answers in the target language."""
        asked = [one.asked_in_chains if self._english_history else one.asked for one in self._questions]
        return [answer.recorded() for answer in chat.answers(asked, fallback=False, between=between)]

    def in_english(self, english: English, between: Callable[[], None]) -> list[str | None]:
        """What the model answers in English; None for questions without an English wording."""
        asked = [number for number, one in enumerate(self._questions) if one.wordings]
        found = english.answers([self._questions[number].asked_in_english for number in asked], between)
        answers = dict(zip(asked, found, strict=True))
        return [answers.get(number) for number in range(len(self._questions))]

    def judged(self, target: Sequence[Mapping[str, Any]], english: Sequence[str | None]) -> list[dict[str, Any]]:
        """A row for each question: what was asked and answered, and what is right.

        target, english: what `in_target` and `in_english` gave. Where the model answers in chains, a row also has the
        chain, whether it understood the question, whether its English answer is right (None without an English
        wording), and the reason of a wrong answer.
        """
        rows = []
        for number, one, answer, in_english in zip(self._numbers, self._questions, target, english, strict=True):
            right = self._target.is_right(number, answer["visible"])
            row: dict[str, Any] = {
                "kind": one.kind,
                "question": one.question,
                "raw": answer["raw"],
                "visible": answer["visible"],
                "right": right,
                "english": None
                if in_english is None
                else {
                    "question": one.wordings[0],
                    "raw": in_english,
                    "right": self._english.is_right(number, in_english),
                },
            }
            rows.append(row | self._chain(number, one, answer, right) if self._in_chains else row)
        return rows

    def _chain(self, number: int, one: Question, answer: Mapping[str, Any], right: bool) -> dict[str, Any]:
        chain = answer["chain"]
        understood = english_right = None
        if one.wordings:
            understood = chain is not None and is_understood(chain["question_en"], one.wordings)
            english_right = chain is not None and self._english.is_right(number, chain["answer_en"])
        reason = reason_of(
            in_form=chain is not None and not answer["cut_off"], understood=understood, english_right=english_right
        )
        return {
            "chain": chain,
            "understood": understood,
            "chain_english": english_right,
            "reason": None if right else reason,
        }


def metrics_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The measures of `Asking.judged`: shares of right answers, in chains also of the steps before the answer.

    Those of English are None if no question has an English wording.
    """
    in_english = [row["english"]["right"] for row in rows if row["english"] is not None]
    metrics = {"answers": _share([row["right"] for row in rows]), "answers_in_english": _share(in_english)}
    if any("chain" in row for row in rows):
        known = [row for row in rows if row["understood"] is not None]
        metrics["understood"] = _share([row["understood"] for row in known])
        metrics["answers_chain_english"] = _share([row["chain_english"] for row in known])
    return metrics


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None
