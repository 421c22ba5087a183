"""What a judge is asked: the messages for one answer, or for two, after one turn or several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from transllm_jax.errors import UserError
from transllm_jax.evaluation.judge.fastchat_prompts import Prompt, prompt_named
from transllm_jax.tokenizer.chat import Message

# fastchat: the published prompts of MT-Bench. transllm-as-published: those of TransLLM's code, with the remains of JSON
# that are in them.
Preset = Literal["fastchat", "transllm-as-published"]
PRESETS: tuple[Preset, ...] = ("fastchat", "transllm-as-published")

_PLACE = re.compile(r"\{(\w+)\}")
# What is added when a judge is asked for the second time.
_AGAIN = {
    "rating": 'End your reply with the rating, a number from 1 to 10, in exactly this format: "Rating: [[number]]".',
    "choice": 'End your reply with your verdict in exactly one of these formats: "[[A]]", "[[B]]" or "[[C]]".',
}


def single_prompt(
    preset: Preset,
    questions: Sequence[str],
    answers: Sequence[str],
    references: Sequence[str] | None,
    *,
    language: str = "",
) -> list[Message]:
    """The messages that ask for a rating of the last answer.

    questions, answers: the turns so far. references: right answers to these turns, if there are any. language: the
    English name of the answers' language, which the preset `transllm-as-published` names.
    """
    math = "-math" if references is not None else ""
    if len(questions) == 1:
        name, values = f"single{math}-v1", {"question": questions[0], "answer": answers[0]}
    else:
        name = f"single{math}-v1-multi-turn"
        values = {**_numbered("question", questions), **_numbered("answer", answers)}
    values |= _numbered("ref_answer", references or [])
    if preset == "transllm-as-published":
        return _as_published(name, prompt_named(name, len(questions)), values, language)
    return _filled(prompt_named(name, len(questions)), values)


def pair_prompt(
    preset: Preset,
    questions: Sequence[str],
    answers: tuple[Sequence[str], Sequence[str]],
    references: Sequence[str] | None,
) -> list[Message]:
    """The messages that ask which of two last answers is better: A, the first of `answers`, or B.

    Raises UserError for the preset `transllm-as-published`, which has no such prompt.
    """
    if preset == "transllm-as-published":
        raise UserError("judge: the preset transllm-as-published grades single answers only; use --preset fastchat")
    first, second = answers
    if references is None:
        name = "pair-v2" if len(questions) == 1 else "pair-v2-multi-turn"
    else:
        name = "pair-math-v1" if len(questions) == 1 else "pair-math-v1-multi-turn"
    if len(questions) == 1:
        values = {"question": questions[0], "answer_a": first[0], "answer_b": second[0]}
    else:
        values = {**_numbered("question", questions), **_numbered("answer_a", first), **_numbered("answer_b", second)}
    return _filled(prompt_named(name, len(questions)), {**values, **_numbered("ref_answer", references or [])})


def again(messages: Sequence[Message], kind: Literal["rating", "choice"]) -> list[Message]:
    """The messages for a second attempt, after a reply without a verdict: they end with a word about the format."""
    *others, last = messages
    return [*others, {**last, "content": f"{last['content']}\n\n{_AGAIN[kind]}"}]


def _numbered(name: str, texts: Sequence[str]) -> dict[str, str]:
    return {f"{name}_{number}": text for number, text in enumerate(texts, 1)}


def _filled(prompt: Prompt, values: Mapping[str, str]) -> list[Message]:
    return [{"role": "system", "content": prompt.system}, {"role": "user", "content": fill(prompt.template, values)}]


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its places filled, each once: what an answer has in braces stays as it is."""
    return _PLACE.sub(lambda place: values[place[1]], template)


def _as_published(name: str, prompt: Prompt, values: Mapping[str, str], language: str) -> list[Message]:
    """The messages of TransLLM's eval/gpt4_eval.py (commit 3ec02f0), made from FastChat's by what differs there.

    The language is named. The system message has its own words and spelling. What followed the prompt in FastChat's
    JSON line was taken over with it; a second turn has all of the prompt in the user's message, with the key between
    its two parts.
    """
    spoken = language.lower()
    category = "math" if "math" in name else "general"
    debris = (
        f'", "description": "Prompt for general questions", "category": "{category}", "output_format": "[[rating]]"'
    )
    if "multi-turn" in name:
        system = prompt.system.replace("answer with the reference", "answer with the  reference")
        text = f'{system}", "prompt_template": "{prompt.template}{debris}'
    else:
        text = prompt.template + debris
    for published, theirs in (
        ("the response provided", f"the {spoken} response provided"),
        ("the user question", f"the user {spoken} question"),
        ("given a reference", "given a english reference"),
    ):
        text = text.replace(published, theirs, 1)
    return [
        {"role": "system", "content": "You are a friendlt and helpful assistant"},
        {"role": "user", "content": fill(text, values)},
    ]
