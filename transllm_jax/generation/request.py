"""What an engine is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from transllm_jax.errors import UserError
from transllm_jax.generation.sampling import GREEDY, Sampling

# Why an answer ended: at a stop token or a stop string, or at its limit of tokens.
Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Mode:
    """Which model answers: the trained one, or (`adapters=False, base_only=True`) the original inside it.

    sampling: of `Engine.generate` and `Engine.stream`; a `Request` has its own.
    """

    adapters: bool = True
    base_only: bool = False
    sampling: Sampling = GREEDY


WHOLE = Mode()
ORIGINAL = Mode(adapters=False, base_only=True)


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be answered. Ids without a token are never chosen.

    stop: ids that end the answer. stop_strings: texts that end it; the engine needs `decode` for them. scored: whether
    the log-probabilities of the answer's tokens are wanted.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    sampling: Sampling = GREEDY
    scored: bool = False

    def check(self, context: int, *, decodes: bool = True) -> None:
        """Raise UserError if a model with this context cannot answer it. decodes: whether the engine has `decode`."""
        if not self.prompt:
            raise UserError("generation: an empty prompt; give at least one token")
        if self.max_new_tokens < 1:
            raise ValueError("generation needs room for a new token")
        if any(not text for text in self.stop_strings) or (self.stop_strings and not decodes):
            raise ValueError("a stop string is empty, or the engine has no `decode` to find it with")
        if len(self.prompt) + self.max_new_tokens > context:
            raise UserError(
                f"generation: a prompt of {len(self.prompt)} tokens and {self.max_new_tokens} new ones exceed the "
                f"model's context of {context}; shorten the prompt or lower max_new_tokens"
            )


class Growing(NamedTuple):
    """An answer to one prompt on its way: its ids so far; and, once it has ended, the stop token that ended it."""

    ids: list[int]
    stopped_by: int | None = None


@dataclass(frozen=True)
class Result:
    """An answer: its ids without the stop token, and why it ended.

    stopped_by: the stop token that ended it; None if nothing or a stop string did. logprobs: the log-probability of
    each id by the model itself, if the request is `scored`. text: the answer as text, up to the stop string that ended
    it; None without stop strings. Where a token holds the end of the text and the beginning of the stop string, the ids
    end before that token. made: tokens that were generated, with the stop token.
    """

    ids: list[int]
    finish_reason: Reason
    made: int
    logprobs: list[float] | None = None
    text: str | None = None
    stopped_by: int | None = None
