"""A load test of `transllm serve` on loopback: many clients, and clients that misbehave.

    python bench/serving.py http://127.0.0.1:8000 [--pid PID] [--clients 1 8 32] [--seconds 60] [--model NAME]

--pid: of the server, whose memory and computing time are then looked at. First, for each number of clients, each asks
again and again for so many seconds; every answer has to come, whole and well-formed. Then clients hang up, read slowly,
send 10 MB, broken JSON and 100 malformed requests: each gets its status, and the server answers as before. Prints a
table in Markdown and exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

QUESTIONS = (
    "เมืองหลวงของประเทศเกาหลีเหนือคือเมืองอะไร",
    "มอนเตวิเดโอเป็นเมืองในประเทศใด",
    "ประเทศอาร์เจนตินาเป็นส่วนหนึ่งของทวีปอะไร",
    "What is the capital of Austria?",
    "แปดบวกเก้าเท่ากับเท่าไร",
)


@dataclass
class Load:
    """What came of the requests of some clients. first, whole: seconds to the first text and to the end."""

    clients: int
    seconds: float
    answers: int = 0
    refused: int = 0
    tokens: int = 0
    lost: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def row(self, before: Process | None, after: Process | None) -> str:
        """A row of the table; with the process of the server before and after."""
        kept, work = "–", "–"
        if before is not None and after is not None:
            kept = f"{before.memory:.0f} → {after.memory:.0f} MiB"
            work = f"{(after.seconds - before.seconds) / max(self.tokens, 1):.3f} s"
        first, whole = (statistics.median(times) if times else float("nan") for times in (self.first, self.whole))
        slowest = max(self.whole, default=float("nan"))
        return (
            f"| {self.clients} | {self.answers} | {len(self.lost)} | {self.refused} | {self.tokens / self.seconds:.1f} "
            f"| {work} | {first:.2f} s | {whole:.2f} s | {slowest:.2f} s | {kept} |"
        )


class Target:
    """A server, and one request after another to it."""

    def __init__(self, address: str, model: str | None, max_tokens: int) -> None:
        parts = urlsplit(address)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.model, self.max_tokens = model, max_tokens

    def connect(self, timeout: float = 300) -> http.client.HTTPConnection:
        """A new connection."""
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def body(self, **more: Any) -> dict[str, Any]:
        """A question, streamed."""
        asked: dict[str, Any] = {
            "messages": [{"role": "user", "content": random.choice(QUESTIONS)}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": self.max_tokens,
        }
        return {**asked, **({} if self.model is None else {"model": self.model}), **more}

    def post(self, connection: http.client.HTTPConnection, body: bytes | dict[str, Any]) -> http.client.HTTPResponse:
        """The response to a chat."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        return connection.getresponse()

    def status(self, path: str) -> int:
        """The status of a GET."""
        connection = self.connect()
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.status


def ask(target: Target, load: Load, end: float) -> None:
    """One client: it asks until the time is over."""
    connection = target.connect()
    while time.monotonic() < end:
        began, first, tokens, finished, done = time.monotonic(), None, 0, False, False
        try:
            response = target.post(connection, target.body())
            if response.status == 429:
                response.read()
                with load.lock:
                    load.refused += 1
                time.sleep(min(float(response.headers["Retry-After"]), max(end - time.monotonic(), 0)))
                continue
            for line in response:
                text = line.decode().strip()
                if text == "data: [DONE]":
                    done = True
                elif text.startswith("data: "):
                    chunk = json.loads(text[6:])
                    for choice in chunk["choices"]:
                        if first is None and len(choice["delta"]) and "role" not in choice["delta"]:
                            first = time.monotonic() - began
                        finished = finished or choice["finish_reason"] is not None
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            problem = "" if done and finished and tokens else f"status {response.status}, {tokens} tokens, no end"
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            problem = repr(error)
            connection.close()
            connection = target.connect()
        with load.lock:
            if problem:
                load.lost.append(problem)
            else:
                load.answers += 1
                load.tokens += tokens
                load.whole.append(time.monotonic() - began)
                load.first += [] if first is None else [first]
    connection.close()


def run(target: Target, clients: int, seconds: float) -> Load:
    """Ask with so many clients for so long; an answer that was begun is waited for."""
    load, began = Load(clients, seconds), time.monotonic()
    threads = [threading.Thread(target=ask, args=(target, load, began + seconds)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.monotonic() - began
    return load


@dataclass(frozen=True)
class Process:
    """A process at one moment: its memory in MiB, and the seconds that it has computed."""

    memory: float
    seconds: float

    @classmethod
    def now(cls, pid: int | None) -> Process | None:
        """The process with this number; None without one."""
        if pid is None:
            return None
        status = Path(f"/proc/{pid}/status").read_text()
        memory = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return cls(memory, sum(map(int, times)) / os.sysconf("SC_CLK_TCK"))


# --- clients that misbehave -----------------------------------------------------------------------------------------


def malformed(count: int) -> list[tuple[bytes, int]]:
    """Bodies, and the statuses that they are to get."""
    user = {"role": "user", "content": "x"}
    wrong: list[Any] = [
        {},
        {"messages": []},
        {"messages": "x"},
        {"messages": [5]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [user, {"role": "assistant", "content": "x"}]},
        *({"messages": [user], name: value} for name, value in [
            ("n", 2), ("temperature", -1), ("temperature", "hot"), ("top_p", 7), ("max_tokens", 0),
            ("max_tokens", 10**9), ("max_tokens", "x"), ("stop", [1]), ("stop", ""), ("seed", {}), ("stream", 1),
            ("tools", [{}]), ("logprobs", True), ("response_format", {"type": "json_object"}), ("stream_options", []),
            ("truncation", "x"), ("model", 7),
        ]),
    ]  # fmt: skip
    bodies = [(json.dumps(one).encode(), 400) for one in wrong]
    bodies += [
        (body, 400) for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"messages": [', b"[" * 50_000, b"nul", b'"x"')
    ]
    bodies.append((json.dumps({"messages": [user], "model": "gpt"}).encode(), 404))
    return [bodies[number % len(bodies)] for number in range(count)]


def misbehave(target: Target) -> list[str]:
    """What went otherwise than it should."""
    problems = []

    def expect(name: str, found: object, wanted: object) -> None:
        if found != wanted:
            problems.append(f"{name}: {found}, not {wanted}")

    connection = target.connect()
    for body, wanted in malformed(100):
        response = target.post(connection, body)
        error = json.loads(response.read())["error"]
        expect(f"{body[:60]!r}", (response.status, set(error)), (wanted, {"message", "type", "param", "code"}))
    response = target.post(connection, b"x" * 10_000_000)
    expect("10 MB", (response.status, json.loads(response.read())["error"]["code"]), (413, "body_too_large"))
    connection.close()
    # Hang up: before the body is whole, while an answer is awaited, and in the middle of a stream.
    for number in range(20):
        raw = socket.create_connection((target.host, target.port))
        body = json.dumps(target.body(stream=number % 2 == 0)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        raw.sendall(head + (body if number % 4 else body[:5]))
        if number % 4 == 2:
            raw.recv(200)
        raw.close()
    # Read slowly: a few bytes at a time.
    raw = socket.create_connection((target.host, target.port))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    body = json.dumps(target.body()).encode()
    raw.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    data = b""
    while b"[DONE]" not in data and (more := raw.recv(64)):
        data += more
        time.sleep(0.01)
    expect("a slow reader", b"[DONE]" in data, True)
    raw.close()
    # No HTTP at all.
    raw = socket.create_connection((target.host, target.port))
    raw.sendall(b"\x16\x03\x01 hello\r\n\r\n")
    expect("no HTTP", raw.recv(20)[:12], b"HTTP/1.1 400")
    raw.close()
    expect("another address", target.status("/nothing"), 404)
    expect("health", target.status("/health"), 200)
    connection = target.connect()
    response = target.post(connection, target.body(stream=False))
    expect("a question after all that", response.status, 200)
    response.read()
    # All slots are free again.
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    busy = [line for line in text.splitlines() if line.startswith(("transllm_running", "transllm_waiting"))]
    expect("slots that are taken", {line.rpartition(" ")[2] for line in busy}, {"0"})
    return problems


def main() -> None:
    """Run the load test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--model")
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args()
    target = Target(given.address, given.model, given.max_tokens)
    run(target, 2, 1)  # first pages of memory are touched
    print(
        "| clients | answers | lost | refused | tokens/s | CPU a token | first text | whole answer | slowest | memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    lost: list[str] = []
    for clients in given.clients:
        before = Process.now(given.pid)
        load = run(target, clients, given.seconds)
        print(load.row(before, Process.now(given.pid)), flush=True)
        lost += load.lost
    problems = misbehave(target)
    print(f"\nmisbehaving clients: {'; '.join(problems) or 'each got its status, and all slots are free'}")
    for one in lost[:10]:
        print("lost:", one)
    if (end := Process.now(given.pid)) is not None:
        print(f"memory at the end: {end.memory:.0f} MiB")
    sys.exit(1 if lost or problems else 0)


if __name__ == "__main__":
    main()
