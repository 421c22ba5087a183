"""A server with OpenAI's protocol that answers from a script, with the page on `/`: what the page is tested against."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from transllm_jax.serving.page import page


@dataclass
class Reply:
    """What a request gets: an answer with its English steps, or an error.

    hold: after this many deltas, wait until the client goes away, or until `Server.release`. drop: after this many
    deltas, the connection ends as if the server had died. fail: after this many, the stream says `error`. piece:
    characters of a delta.
    """

    answer: str = ""
    question_en: str = ""
    answer_en: str = ""
    finish: str = "stop"
    status: int = 200
    error: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    hold: int | None = None
    drop: int | None = None
    fail: int | None = None
    piece: int = 4

    def deltas(self) -> Iterator[dict[str, str]]:
        reasoning = f"Question: {self.question_en}\n\nAnswer: {self.answer_en}" if self.answer_en else ""
        for start in range(0, len(reasoning), self.piece):
            piece = reasoning[start : start + self.piece]
            yield {"reasoning_content": piece, "reasoning": piece}
        for start in range(0, len(self.answer), self.piece):
            yield {"content": self.answer[start : start + self.piece]}


@dataclass
class Server:
    """The running server. reply: what a request's body gets. bodies, keys: what was asked, with which key."""

    url: str = ""
    reply: Callable[[dict[str, Any]], Reply] = lambda body: Reply(f"to {body['messages'][-1]['content']}")
    models: list[dict[str, Any]] = field(default_factory=list)
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    gone: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def asked(self, model: str) -> list[list[dict[str, str]]]:
        """The messages of each request to a model."""
        return [body["messages"] for body in self.bodies if body["model"] == model]

    def release(self) -> None:
        """Let go on what holds."""
        self.released.set()


def _refused(status: int, error: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": error}, status, headers)


def _app(server: Server) -> Starlette:
    def refusal(request: Request) -> Response | None:
        if server.key is None or request.headers.get("authorization") == f"Bearer {server.key}":
            return None
        return _refused(
            401, {"message": "This server wants an API key.", "type": "invalid_request_error", "code": None}
        )

    async def home(request: Request) -> Response:
        return Response(page().html, headers=page().headers)

    async def models(request: Request) -> Response:
        return refusal(request) or JSONResponse({"object": "list", "data": server.models})

    async def chat(request: Request) -> Response:
        if refused := refusal(request):
            return refused
        body = await request.json()
        server.bodies.append(body)
        reply = server.reply(body)
        if reply.status != 200:
            return _refused(reply.status, reply.error or {}, reply.headers)
        return StreamingResponse(_stream(server, body, reply, request), media_type="text/event-stream")

    return Starlette(
        routes=[
            Route("/", home),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ]
    )


async def _stream(server: Server, body: dict[str, Any], reply: Reply, request: Request) -> AsyncIterator[str]:
    def event(data: dict[str, Any]) -> str:
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    def chunk(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return event({"object": "chat.completion.chunk", "model": body["model"], "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    yield ": keep-alive\n\n"
    sent = 0
    for sent, delta in enumerate(reply.deltas()):
        if sent == reply.hold:
            try:
                while not server.released.is_set():
                    if await request.is_disconnected():
                        server.gone += 1
                        return
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:  # starlette was told first
                server.gone += 1
                raise
        if sent == reply.drop:
            raise ConnectionResetError("the server is gone")
        if sent == reply.fail:
            yield event({"error": reply.error})
            return
        yield chunk(delta)
        await asyncio.sleep(0)
    yield chunk({}, reply.finish)
    if body.get("stream_options", {}).get("include_usage"):
        usage = {"prompt_tokens": 10, "completion_tokens": sent + 1, "total_tokens": sent + 11}
        yield event({"object": "chat.completion.chunk", "model": body["model"], "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of the loopback address."""
    server = Server()
    config = uvicorn.Config(_app(server), host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=1)
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        thread.join(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}/"
    try:
        yield server
    finally:
        runner.should_exit = True
        thread.join()
