"""In place of an engine, one that says what a test has written down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.generation.chain import ChainChat
from transllm_jax.generation.request import WHOLE, Growing, Mode, Request, Result
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.chat import Message
from transllm_jax.tokenizer.tokenizer import Tokenizer

MARKERS = Markers()
WHOLE_CHAIN = "<EN>What is it?<RESPONSE>A fox.<TH>สุนัข"


def chain_tokenizer(directory: Path) -> Tokenizer:
    """The tiny tokenizer with the chain's markers as special tokens."""
    made = Tokenizer.load(build_tiny_tokenizer(directory))
    made.backend.add_special_tokens(list(MARKERS.in_order()))
    return made


class Script:
    """In place of an engine: gives out texts in order, and keeps what it was asked.

    A stop token in a text ends it.
    """

    def __init__(self, tokenizer: Tokenizer, *texts: str) -> None:
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.config = SimpleNamespace(context=10_000)
        self.calls: list[list[list[int]]] = []
        self.options: list[dict[str, Any]] = []
        self.at_once: list[int | None] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        on_tokens: Callable[[int], None] = lambda count: None,
        between: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> list[list[int]]:
        self.calls.append([list(prompt) for prompt in prompts])
        self.options.append(options)
        answers = [self.tokenizer.encode(self.texts.pop(0)) for _ in prompts]
        on_tokens(sum(map(len, answers)))
        return answers

    def run(
        self, requests: Iterable[Request], *, mode: Mode = WHOLE, at_once: int | None, **seen: Any
    ) -> Iterator[tuple[int, Result]]:
        self.at_once.append(at_once)
        requests = list(requests)
        first = requests[0]
        options = {"max_new_tokens": first.max_new_tokens, "stop": first.stop, "mode": mode}
        answers = self.generate([request.prompt for request in requests], **options, **seen)
        for number, (request, ids) in enumerate(zip(requests, answers, strict=True)):
            end = next((place for place, token in enumerate(ids) if token in request.stop), len(ids))
            stopped_by = ids[end] if end < len(ids) else None
            yield number, Result(ids[:end], "stop", len(ids), stopped_by=stopped_by)

    def stream(self, prompt: Sequence[int], **options: Any) -> Iterator[Growing]:
        (ids,) = self.generate([prompt], **options)
        end = next((place for place, token in enumerate(ids) if token in options["stop"]), len(ids))
        yield Growing(ids[: end // 2])
        yield Growing(ids[:end], ids[end] if end < len(ids) else None)


class Typist(Script):
    """A script that is streamed token by token; a text may also be given as ids, in which characters may be broken."""

    def __init__(self, tokenizer: Tokenizer, *texts: str | Sequence[int], limit: int = 10_000) -> None:
        super().__init__(tokenizer)
        self.given, self.limit = list(texts), limit

    def stream(self, prompt: Sequence[int], **options: Any) -> Iterator[Growing]:
        self.calls.append([list(prompt)])
        text = self.given.pop(0)
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        for size in range(1, min(len(ids), self.limit) + 1):
            yield Growing(ids[:size])


def chat_of(script: Script, **options: Any) -> ChainChat:
    engine: Any = script
    return ChainChat(engine, script.tokenizer, MARKERS, max_new_tokens=30, **options)


def asked(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]
