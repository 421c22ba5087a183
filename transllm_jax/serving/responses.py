"""What clients get, in OpenAI's protocol: completions, chunks of a stream, usage, models."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transllm_jax import __version__
from transllm_jax.generation.answer import Delta
from transllm_jax.serving.history import ANSWER, QUESTION, Source
from transllm_jax.serving.served import Reply, Served

# How the English steps of a chain are given: in fields of their own, in the content between <think> marks, or not.
Reasoning = Literal["both", "think", "none"]


class Fields:
    """The fields of a message, in which more of an answer's parts is given each time."""

    def __init__(self, reasoning: Reasoning) -> None:
        self._reasoning = reasoning
        self._begun: set[str] = set()
        self._open = False

    def of(self, deltas: Iterable[Delta], *, last: bool = False) -> list[dict[str, str]]:
        """What to add to the message. last: no more follows."""
        found: list[dict[str, str]] = []
        for part, text in deltas:
            if part == "answer":
                found.append({"content": self._closing() + text})
            elif self._reasoning != "none":
                found.append(self._step(self._introduction(part) + text))
        if last and (closing := self._closing()):
            found.append({"content": closing})
        return _joined(found)

    def _introduction(self, part: str) -> str:
        first = part not in self._begun
        introduction = {"question_en": QUESTION, "answer_en": ANSWER}[part] if first else ""
        if part == "answer_en" and not self._begun:
            introduction = QUESTION + introduction
        self._begun.add(part)
        return introduction

    def _step(self, text: str) -> dict[str, str]:
        if self._reasoning == "both":
            # Clients read one or the other.
            return {"reasoning_content": text, "reasoning": text}
        opening, self._open = ("" if self._open else "<think>\n"), True
        return {"content": opening + text}

    def _closing(self) -> str:
        closing, self._open = ("\n</think>\n\n" if self._open else ""), False
        return closing


def _joined(found: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The same with neighbours of the same kind in one."""
    joined: list[dict[str, str]] = []
    for fields in found:
        if joined and joined[-1].keys() == fields.keys():
            joined[-1] = {name: joined[-1][name] + text for name, text in fields.items()}
        else:
            joined.append(fields)
    return joined


@dataclass
class Envelope:
    """What all parts of one response say about it. kind: chat.completion or text_completion."""

    model: str
    kind: Literal["chat.completion", "text_completion"]
    identity: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.kind == "chat.completion" else "cmpl"
        self.identity, self.created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """A response that is not streamed."""
        return {**self._head(self.kind), "choices": choices, "usage": usage}

    def chunk(self, choice: dict[str, Any] | None, usage: dict[str, Any] | None, *, told: bool) -> dict[str, Any]:
        """A chunk of a stream; without a choice, the one with the usage. told: whether the client wants the usage."""
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        choices = [] if choice is None else [{"index": 0, **choice}]
        return {**self._head(kind), "choices": choices, **({"usage": usage} if told else {})}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.identity,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"transllm-{__version__}",
        }


def message_of(fields: Iterable[dict[str, str]]) -> dict[str, Any]:
    """The whole message whose parts these are."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for part in fields:
        for name, text in part.items():
            message[name] = message.get(name, "") + text
    return message


def usage_of(
    prompts: Iterable[Sequence[int]],
    replies: Sequence[Reply],
    *,
    history: Sequence[Source] | None = None,
    dropped_turns: int = 0,
) -> dict[str, Any]:
    """How many tokens were read and written; and where the English of each earlier turn is from, oldest first."""
    prompt, completion = sum(map(len, prompts)), sum(reply.completion_tokens for reply in replies)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {"reasoning_tokens": sum(reply.reasoning_tokens for reply in replies)},
    }
    if history is not None:
        usage["history"] = list(history)
    if dropped_turns:
        usage["dropped_turns"] = dropped_turns
    return usage


def model_object(model: Served, created: int) -> dict[str, Any]:
    """A model in the list of models."""
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "transllm",
        "max_model_len": model.longest,
        "chains": model.markers is not None,
        "language": None if model.markers is None else model.markers.language,
    }
