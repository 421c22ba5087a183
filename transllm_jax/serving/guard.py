"""Around every request: it is counted and logged, without a word of its text, and a defect ends it and nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transllm_jax.serving.engine_thread import report
from transllm_jax.serving.metrics import Metrics
from transllm_jax.serving.stream import ClientGone, to_json

# The status in the log and the counters where the client went away before its answer was whole; no client gets it.
GONE = 499


class Guard:
    """ASGI middleware. paths: those that are logged; others may be anything, also a text."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except* ClientGone:
            status = GONE
        except* Exception as errors:
            for error in errors.exceptions:
                report(error)
            if not status:
                await _send_defect(send)
            status = 500
        self._told(scope, status, time.monotonic() - began)

    def _told(self, scope: Mapping[str, Any], status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        model = scope.get("transllm", "")
        labels = {"path": path, "model": model, "status": str(status)}
        self._metrics.count("transllm_requests_total", "Requests.", **labels)
        if model and status == 200:
            self._metrics.observe("transllm_request_seconds", "From asking to the end.", seconds, model=model)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        # Whoever read the log may have gone; that is no reason to stop.
        with suppress(OSError):
            print(f"{now} {scope['method']} {path} {status} {seconds:.2f} s{f' {model}' if model else ''}", flush=True)


async def _send_defect(send: Send) -> None:
    error = {"message": "a defect of the server; its log says where", "type": "server_error", "param": None}
    body = to_json({"error": {**error, "code": "internal_error"}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
