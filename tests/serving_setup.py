"""A server on loopback, with a scripted engine or a real one, for the tests of serving."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx2
import uvicorn
from scripted import MARKERS

from transllm_jax.serving.app import Server, Settings
from transllm_jax.serving.engine_thread import Job, Told
from transllm_jax.serving.served import Served
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.tokenizer import Tokenizer


class ScriptedThread:
    """In place of an engine's thread: it says what a test has written down, three tokens at a time.

    texts: the answers in order; None for an answer that does not come until `cancel`. The last one is given again. A
    stop token in a text ends it.
    """

    def __init__(self, tokenizer: Tokenizer, *texts: str | None) -> None:
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.alive, self.failures = True, 0
        self.asked: list[Job] = []
        self.cancelled = threading.Event()
        self.failing = False
        self.telling: list[asyncio.Task[None]] = []

    @property
    def prompts(self) -> list[str]:
        """The prompts that were asked, as texts."""
        return [self.tokenizer.decode(job.request.prompt) for job in self.asked]

    def submit(self, lane: Any, job: Job, *, ahead: bool = False) -> None:
        self.asked.append(job)
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        ids, limit = self.tokenizer.encode("A" if text is None else text), job.request.max_new_tokens
        end = next((place for place, token in enumerate(ids[:limit]) if token in job.request.stop), None)
        stopped_by, ids = (None, ids) if end is None else (ids[end], ids[:end])
        told = [Told(ids[at : min(at + 3, limit)]) for at in range(0, min(len(ids), limit), 3)]
        if text is not None:
            told.append(Told([], "length" if len(ids) >= limit else "stop", self.failing, stopped_by))
        self.telling.append(asyncio.ensure_future(self._tell(job, told)))

    async def _tell(self, job: Job, told: Sequence[Told]) -> None:
        """One after the other, so that what is told is not taken together."""
        for one in told:
            job.tell(one)
            await asyncio.sleep(0.001)

    def cancel(self, job: Job) -> None:
        job.cancelled = True
        self.cancelled.set()


def scripted(
    thread: ScriptedThread, name: str = "demo", *, markers: Markers | None = MARKERS, longest: int = 600
) -> Served:
    """A model that says what is written down."""
    lane: Any = SimpleNamespace(size=2, longest=longest, waiting=0, running=0)
    return Served(name, thread, lane, thread.tokenizer, markers)  # type: ignore[arg-type]


@contextlib.contextmanager
def listening(models: Sequence[Served], settings: Settings | None = None) -> Iterator[str]:
    """A server for these models, on a port of this machine; its address."""
    config = uvicorn.Config(
        Server(models, settings or Settings()).app(), log_level="error", access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        worker = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        worker.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            worker.join(10)


def chat(address: str, content: Any = "ใคร", **body: Any) -> httpx2.Response:
    """The response to one question; `content` may also be a list of whole messages."""
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return httpx2.post(f"{address}/v1/chat/completions", json={"messages": messages, **body}, timeout=60)


def events(text: str) -> list[Any]:
    """The documents of a stream of events; `[DONE]` as it is."""
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def streamed(chunks: Sequence[Any], name: str) -> str:
    """The text of one field of all deltas of a stream."""
    return "".join(
        choice["delta"].get(name) or ""
        for chunk in chunks
        if chunk != "[DONE]" and "choices" in chunk
        for choice in chunk["choices"]
    )
