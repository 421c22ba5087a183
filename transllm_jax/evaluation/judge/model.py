"""The model that judges: any OpenAI-compatible server, or one of our own engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from transllm_jax.config import Endpoint
from transllm_jax.errors import UserError
from transllm_jax.evaluation.judge.cache import key_of
from transllm_jax.evaluation.systems.system import Asked, System
from transllm_jax.generation.endpoint import Client, Reply, Request, request_body
from transllm_jax.generation.sampling import Sampling
from transllm_jax.tokenizer.chat import Message

# As FastChat's judge; and tokens of a reply at most.
TEMPERATURE, MAX_TOKENS = 0.0, 2048
# Where a message about the judge's server says that the fault is: `judge-endpoint.key` is `--judge-endpoint key=...`.
WHERE = "judge-endpoint"


# What a server may refuse in every request, and what to give then.
_REMEDIES = {
    "max_completion_tokens": "max_tokens_as=max_completion_tokens",
    "temperature": "body={temperature: null}",
    "seed": "body={seed: null}",
}


@dataclass(frozen=True)
class Prompt:
    """What a judge is asked: the messages, and the seed, which differs between repeats."""

    messages: Sequence[Message]
    seed: int = 0


class Model(Protocol):
    """Something that replies to prompts. identity: as a System's; replies of equal ones are the same."""

    name: str
    max_tokens: int

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def replies(self, prompts: Mapping[str, Prompt], between: Callable[[], None]) -> Iterator[Reply]:
        """Yield a reply to each prompt, with its name as `id`, in any order.

        A prompt that the model cannot reply to gets a reply with an error. Raises UserError for faults that are not of
        one prompt: a wrong key (401), an unknown model (404).
        """
        ...


def prompt_key(model: Model, prompt: Prompt) -> str:
    """The key under which a model's reply to a prompt is kept."""
    parameters = {"temperature": TEMPERATURE, "max_tokens": model.max_tokens, "seed": prompt.seed}
    return key_of(model.identity, prompt.messages, parameters)


class EndpointModel:
    """A judge behind a server."""

    def __init__(self, settings: Endpoint, say: Callable[[str], None], max_tokens: int = MAX_TOKENS) -> None:
        """say: prints a line, from any thread. Raises UserError if a library or the key is missing."""
        assert settings.endpoint is not None
        self.name, self.max_tokens = settings.model, max_tokens
        self._settings = settings.model_copy(update={"refused": "drop"})
        self._client = Client(self._settings, WHERE, say, stop=False)

    def reach(self) -> None:
        """Raises UserError if the server cannot be reached."""
        self._client.reach()

    @property
    def identity(self) -> Mapping[str, Any]:
        """The server's URL, the model's name there, and what is added to each request; as a server's as a system."""
        settings = self._settings
        return {"kind": "endpoint", "url": settings.endpoint, "model": settings.model, "body": dict(settings.body)}

    def replies(self, prompts: Mapping[str, Prompt], between: Callable[[], None]) -> Iterator[Reply]:
        """As `Model.replies`."""
        requests = [
            Request(id, request_body(self._settings, prompt.messages, self.max_tokens, prompt.seed))
            for id, prompt in prompts.items()
        ]
        with closing(self._client.replies(requests)) as coming:
            for reply in coming:
                between()
                if reply is not None:
                    self._check(reply)
                    yield reply

    def _check(self, reply: Reply) -> None:
        """Raises UserError if the server refuses something that every request has."""
        if reply.error is None or not reply.error.startswith("status 4"):
            return
        for name, remedy in _REMEDIES.items():
            if name in reply.error and name not in self._settings.body:
                raise UserError(
                    f"{WHERE}: {self._settings.place} refuses {name!r} ({reply.error}); give --judge-endpoint "
                    f"'{remedy}'"
                )


class SystemModel:
    """A judge that any system of an evaluation plays, such as a local model."""

    def __init__(self, system: System, max_tokens: int = MAX_TOKENS) -> None:
        self.name, self.max_tokens, self._system = system.name, max_tokens, system

    @property
    def identity(self) -> Mapping[str, Any]:
        """The system's."""
        return self._system.identity

    def replies(self, prompts: Mapping[str, Prompt], between: Callable[[], None]) -> Iterator[Reply]:
        """As `Model.replies`."""
        asked = [self._asked(id, prompt) for id, prompt in prompts.items()]
        for one, (turn,) in self._system.answers(asked, between):
            yield Reply(one.id, turn.visible, "length" if turn.cut_off else "stop", error=turn.error)

    def _asked(self, id: str, prompt: Prompt) -> Asked:
        *history, last = prompt.messages
        sampling = Sampling(TEMPERATURE, seed=prompt.seed)
        return Asked(id, (last["content"],), "english", self.max_tokens, sampling, tuple(history))


def refuse_own_judge(model: Model, systems: Sequence[System], *, confirmed: bool) -> None:
    """Raises UserError if a judge would judge its own answers, unless that is confirmed: it would favour them."""
    for system in systems:
        if not confirmed and is_same(model.identity, system.identity):
            raise UserError(
                f"the judge {model.name} is the system {system.name}: it would judge its own answers; give another "
                "judge, or --judge-is-system to do it all the same"
            )


def is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities are those of one model: equal ones, or a server's model under the same name, whatever its
    address and the keys of its requests."""
    if dict(one) == dict(other):
        return True
    return one.get("kind") == other.get("kind") == "endpoint" and one.get("model") == other.get("model")
