"""A small server with OpenAI's chat completions API, which answers from a table and fails when it is told to."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fault:
    """What happens to a request in place of an answer. hang: nothing, for these seconds. drop: no response at all."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    drop: bool = False


@dataclass
class Server:
    """The server, and what it was asked.

    answer: the reply to a request's body, (text, finish reason). tokens: the prompt tokens of its messages; None leaves
    `usage` out. faults: happen to the next requests, in order. fail: a fault for a request's body, or None.
    """

    url: str = ""
    answer: Callable[[dict[str, Any]], tuple[str | None, str]] = lambda body: (
        f"to {body['messages'][-1]['content']}",
        "stop",
    )
    tokens: Callable[[list[dict[str, str]]], int | None] = lambda messages: len(messages[-1]["content"])
    faults: list[Fault] = field(default_factory=list)
    fail: Callable[[dict[str, Any]], Fault | None] = lambda body: None
    delay: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def asked(self) -> list[str]:
        """The last message of each request that has come."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def forget(self) -> None:
        """Begin to record anew."""
        self.bodies, self.headers, self.paths, self.times, self.most_at_once = [], [], [], [], 0

    def take(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Fault:
        """Records a request; gives its response."""
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.paths.append(path)
            self.times.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            fault = self.faults.pop(0) if self.faults else self.fail(body)
        if fault is None:
            time.sleep(self.delay)
            fault = Fault(200, completion(*self.answer(body), self.tokens(body["messages"])))
        time.sleep(fault.hang)
        with self._lock:
            self._now -= 1
        return fault


def completion(text: str | None, reason: str | None = "stop", tokens: int | None = 1) -> dict[str, Any]:
    """The body of a chat completion."""
    usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": 1 + (tokens or 0)}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {"object": "chat.completion", "choices": [choice], **({} if tokens is None else {"usage": usage})}


@contextlib.contextmanager
def openai_server() -> Iterator[Server]:
    """A server on a port of this machine, until the context ends."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            response = state.take(self.path, {key.lower(): value for key, value in self.headers.items()}, body)
            if response.drop:
                self.close_connection = True
                return
            text = response.body if isinstance(response.body, str) else json.dumps(response.body)
            with contextlib.suppress(OSError):  # the client has given up
                self.send_response(response.status)
                for name, value in response.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *given: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed resets its connections: nothing is printed."""
            if not isinstance(sys.exception(), OSError):
                super().handle_error(request, client_address)

    server = Quiet(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
