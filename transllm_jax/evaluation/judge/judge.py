"""A judge's verdicts: each asked for once, and once more if the reply holds none; kept, counted and paid for once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from transllm_jax.errors import UserError
from transllm_jax.evaluation.judge.cache import Cache
from transllm_jax.evaluation.judge.cost import Spending
from transllm_jax.evaluation.judge.model import Model, Prompt, prompt_key
from transllm_jax.generation.endpoint import Reply
from transllm_jax.tokenizer.chat import Message

V = TypeVar("V")

# Prompts in a row without a reply after which the judge counts as unreachable.
SILENT = 5
# Thoughts that a limit cut off have no end.
_THOUGHTS = re.compile(r"\A\s*<think>(?:.*</think>|.*\Z)|\A.*</think>", re.DOTALL)


@dataclass(frozen=True)
class Ask(Generic[V]):
    """One verdict that is wanted. read: finds it in a reply, or None. again: the messages of the second attempt."""

    messages: Sequence[Message]
    read: Callable[[str], V | None]
    again: Sequence[Message]
    repeat: int = 0


@dataclass(frozen=True)
class Verdict(Generic[V]):
    """What a judge said. value: None if nothing could be read. raw: its replies, of one attempt or two, as they came.

    error: why there is no reply, such as a time-out.
    """

    value: V | None
    raw: tuple[str, ...] = ()
    error: str | None = None

    def recorded(self) -> dict[str, Any]:
        """As JSON."""
        return {"value": self.value, "raw": list(self.raw), **({} if self.error is None else {"error": self.error})}


@dataclass
class Judge:
    """A model with what it has said already. say: prints a line. repeats: verdicts on each answer or pair."""

    model: Model
    cache: Cache
    spending: Spending = field(default_factory=Spending)
    say: Callable[[str], None] = lambda line: None
    repeats: int = 1

    def verdicts(
        self,
        asks: Mapping[str, Ask[V]],
        between: Callable[[], None] = lambda: None,
        on_verdict: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Verdict[V]]:
        """The verdicts by the names of what is asked, in their order.

        What a reply does not say is asked again once. A prompt that gets no reply (time-outs to the last attempt, or
        refused) has no value, and is asked again by the next command. between: called between replies, may raise.
        on_verdict: gets the number of replies so far. Raises UserError before the first request if they would cost more
        than the limit, while they come if they do, and if the judge cannot be reached.
        """
        first = self._replies(
            {name: Prompt(ask.messages, ask.repeat) for name, ask in asks.items()}, between, on_verdict
        )
        unclear = {
            name: Prompt(asks[name].again, asks[name].repeat)
            for name, reply in first.items()
            if reply.error is None and asks[name].read(spoken(reply.text)) is None
        }
        second = self._replies(unclear, between, lambda done: None, why=", asked again")
        return {name: _verdict(ask, first[name], second.get(name)) for name, ask in asks.items()}

    def recorded(self) -> dict[str, Any]:
        """Who judged, for the results (JSON)."""
        return {
            "judge": dict(self.model.identity),
            "max_tokens": self.model.max_tokens,
            "repeats": self.repeats,
            "spent": self.spending.recorded(),
        }

    def _replies(
        self,
        prompts: Mapping[str, Prompt],
        between: Callable[[], None],
        on_verdict: Callable[[int], None],
        *,
        why: str = "",
    ) -> dict[str, Reply]:
        keys = {name: prompt_key(self.model, prompt) for name, prompt in prompts.items()}
        found = {key: reply for key in keys.values() if (reply := self.cache.get(key)) is not None}
        # Equal prompts, such as those for equal answers of two systems, are asked once.
        missing = {keys[name]: prompt for name, prompt in prompts.items() if keys[name] not in found}
        on_verdict(len(found))
        if missing:
            plan = self.spending.check_plan([prompt.messages for prompt in missing.values()], self.model.max_tokens)
            self.say(f"  judge {self.model.name}{why}: {plan}")
        silent = 0
        for reply in self.model.replies(missing, between) if missing else ():
            prompt, found[reply.id] = missing[reply.id], reply
            if reply.error is not None:
                silent += 1
                if silent >= SILENT:
                    raise UserError(
                        f"judge {self.model.name}: no reply to {silent} prompts in a row, to the last one because of "
                        f"{reply.error}; the verdicts so far are kept: start again when this is settled"
                    )
                continue
            silent = 0
            asked = {"judge": self.model.name, "messages": list(prompt.messages), "seed": prompt.seed}
            self.cache.add(reply.id, reply, asked)
            self.spending.add(prompt.messages, reply)
            on_verdict(len(found))
            self.spending.check()
        return {name: found[key] for name, key in keys.items()}


def spoken(text: str) -> str:
    """What a judge says after its thoughts, which some servers leave in the text; nothing if it was cut off in them."""
    return _THOUGHTS.sub("", text)


def _verdict(ask: Ask[V], first: Reply, second: Reply | None) -> Verdict[V]:
    replies = [first] if second is None else [first, second]
    last = replies[-1]
    raw = tuple(reply.text for reply in replies if reply.error is None)
    return Verdict(None if last.error is not None else ask.read(spoken(last.text)), raw, last.error)
