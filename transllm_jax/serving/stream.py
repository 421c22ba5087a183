"""Responses that end when the client goes away: a stream of server-sent events, and a whole JSON document."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# A comment is sent when this many seconds went by without an event: proxies and clients drop silent connections.
KEEP_ALIVE = 5.0
# A client that takes nothing for so many seconds is given up.
SLOWEST = 120.0

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed the connection."""


def event(data: Any) -> bytes:
    """An event with a JSON document, or with a text as it is."""
    return b"data: " + (data if isinstance(data, str) else to_json(data)).encode() + b"\n\n"


def to_json(document: Any) -> str:
    """JSON as clients get it. Half a character, which UTF-8 cannot hold, becomes the replacement character."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(errors="replace").decode()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is given up if the client goes away. Raises ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _given_up(gone)
        await _given_up(task)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _given_up(task: asyncio.Future[Any]) -> None:
    """Cancel a task, and wait until it has let go of what it holds."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


class EventStream(Response):
    """Server-sent events. The stream is closed as soon as the client goes away, or takes nothing any more.

    on_end: called when the stream has ended, however.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], *, on_end: Callable[[], None], keep_alive: float = KEEP_ALIVE
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end, self._keep_alive = events, on_end, keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                raise ClientGone
            pump.result()
        finally:
            self._on_end()
            await _given_up(gone)
            await _given_up(pump)

    async def _pump(self, send: Send) -> None:
        async def sent(message: dict[str, Any]) -> None:
            try:
                await asyncio.wait_for(send(message), SLOWEST)
            except (TimeoutError, OSError):
                raise ClientGone from None

        await sent({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            following = asyncio.ensure_future(anext(events))
            try:
                while True:
                    done, _ = await asyncio.wait({following}, timeout=self._keep_alive)
                    if not done:
                        await sent({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
                        continue
                    try:
                        body = following.result()
                    except StopAsyncIteration:
                        break
                    following = asyncio.ensure_future(anext(events))
                    await sent({"type": "http.response.body", "body": body, "more_body": True})
            finally:
                await _given_up(following)
        await sent({"type": "http.response.body", "body": b"", "more_body": False})
