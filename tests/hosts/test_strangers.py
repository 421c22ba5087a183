"""Who connects while the processes of a run come together, and belongs to none: passed over, whatever it says."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from multi_process import free_port, run_processes
from test_runtime import all_said, program

from transllm_jax.errors import PeerLost, UserError
from transllm_jax.hosts import watch
from transllm_jax.hosts.connection import Connection
from transllm_jax.hosts.watch import OTHER_KEY, PROTOCOL, Hub, Member
from transllm_jax.hosts.wire import lines, listen, listens_everywhere, say, sign

KEY, COUNT = b"the key of this run", 3
Call = Callable[[], socket.socket]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """One that waits for three processes."""
    found = Hub(listen("127.0.0.1", 0), COUNT, 30, lambda: 7, KEY)
    found.port = found._listener.getsockname()[1]  # type: ignore[attr-defined]
    found.start()
    yield found
    found._patience = 0
    found.join(10)
    assert not found._thread.is_alive()


@pytest.fixture
def call(hub: Hub) -> Iterator[Call]:
    """Connects to it."""
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            found = socket.create_connection(("127.0.0.1", hub.port), timeout=20)  # type: ignore[attr-defined]
            return stack.enter_context(found)

        yield connect


def member(hub: Hub, number: int, key: bytes = KEY, count: int = COUNT) -> Member:
    given = Connection("127.0.0.1", hub.port, count, number, key=key)  # type: ignore[attr-defined]
    return Member.at("127.0.0.1", given, 20)


def gather(hub: Hub) -> None:
    """All three come, and go again; the hub ends without having lost one."""
    with ThreadPoolExecutor(COUNT) as pool:
        members = list(pool.map(lambda number: member(hub, number), range(COUNT)))
        ended: list[Any] = []
        for one in members:
            one.watch(lambda *how: ended.append(how))
        met = list(pool.map(lambda one: one.meet("here", members.index(one)), members))
    assert met == [[0, 1, 2]] * COUNT
    assert all(one.hosts == [socket.gethostname()] * COUNT and one.chosen == 7 for one in members)
    for one in members:
        one.leave()
    hub.join(10)
    assert not hub._thread.is_alive() and not ended


def hello(heard: str = "n", key: bytes = KEY, **changes: Any) -> bytes:
    said = {"number": 1, "count": COUNT, "host": "elsewhere", "nonce": "mine", **changes}
    return json.dumps({"transllm": PROTOCOL, **said, "signed": sign(key, "member", heard, *said.values())}).encode()


def bare(**said: Any) -> bytes:
    """As that, and not signed, or with a signature of another kind."""
    return json.dumps({"transllm": PROTOCOL, **said}).encode()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x00\xff\x00\xfe\n",
        b"\xff" * 100 + b"\n",
        b"\n\n\n",
        b"[1]\n",
        b"null\n",
        b"{}\n",
        b"[" * 3000 + b"\n",
        b'{"transllm":' * 300 + b"\n",
        b'{"transllm": ' + b"9" * 4000 + b"}\n",
        bare() + b"\n",
        bare(number=1, count=COUNT, host="h", nonce="n") + b"\n",
        bare(number=1, count=COUNT, host="h", nonce="n", signed=7) + b"\n",
        bare(number=1, count=COUNT, host="h", nonce="n", signed="é\ud800") + b"\n",
        bare(number="1", count=COUNT, host="h", nonce="n", signed="") + b"\n",
        bare(number=True, count=COUNT, host=["h"], nonce={}, signed="") + b"\n",
        # What another run says, or one who knows this version.
        hello(key=b"another") + b"\n",
        # What was heard on another connection.
        hello() + b"\n",
        hello(number=0) + b"\n",
        # The version before.
        b'{"transllm": 1, "number": 1, "count": 3, "host": "h"}\n',
        # Two at once, and what a member may say when all are there.
        hello(number=0) + b"\n" + hello(number=2) + b'\n{"end": 2, "line": "stop"}\n',
    ],
)
def test_who_says_something_else(hub: Hub, call: Call, said: bytes) -> None:
    strangers = [call() for _ in range(2)]
    for one in strangers:
        one.sendall(said)
    # Each is sent away, and before that told no more than a number and that it is refused.
    for one in strangers:
        answers = list(lines(one)) if said.endswith(b"\n") and said.strip() else []
        assert all(answer.keys() <= {"transllm", "nonce"} or answer["line"] == OTHER_KEY for answer in answers)
    gather(hub)


def test_who_says_nothing_hangs_up_or_does_not_stop(hub: Hub, call: Call) -> None:
    call()
    call().close()
    reset = call()
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()
    half = call()
    half.sendall(b'{"transllm": 2, ')
    endless = call()
    with contextlib.suppress(OSError):
        for _ in range(64):
            endless.sendall(b"x" * (1 << 16))
    # It read little of it and hung up.
    with contextlib.suppress(ConnectionError):
        while endless.recv(1 << 16):
            pass
    gather(hub)


def test_one_that_knows_the_key_and_says_what_cannot_be(hub: Hub, call: Call) -> None:
    for number in (-1, COUNT, 1 << 70):
        one = call()
        (first, *_) = [next(lines(one))]
        one.sendall(hello(first["nonce"], number=number) + b"\n")
        assert list(lines(one)) == []
    gather(hub)


def test_many_who_say_nothing(hub: Hub, call: Call) -> None:
    crowd = [call() for _ in range(watch.STRANGERS + COUNT + 30)]
    gather(hub)
    # The first were sent away when there was no room.
    assert [list(lines(one))[1:] for one in crowd[:30]] == [[]] * 30


def test_the_time_to_speak(hub: Hub, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SPEAK", 0.3)
    silent = call()
    assert [message.keys() for message in lines(silent)] == [{"transllm", "nonce"}]
    monkeypatch.undo()
    gather(hub)


def test_a_process_with_another_secret_is_told_so(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1, 1, 2, 1):
        with pytest.raises(UserError, match="another --coordinator, TRANSLLM_SECRET or job; give all hosts the same"):
            member(hub, number, b"another")
    gather(hub)
    refused = capfd.readouterr().err.splitlines()
    assert len(refused) == watch.TOLD and all(line.startswith("refused a process at 127.0.0.1:") for line in refused)


def test_a_process_whose_first_connection_broke_comes_again(hub: Hub) -> None:
    # The hub has not noticed yet.
    first = socket.create_connection(("127.0.0.1", hub.port))  # type: ignore[attr-defined]
    said = lines(first)
    first.sendall(hello(next(said)["nonce"], nonce="who") + b"\n")
    deadline = time.monotonic() + 10
    while 1 not in hub._callers and time.monotonic() < deadline:
        time.sleep(0.01)
    again = socket.create_connection(("127.0.0.1", hub.port))  # type: ignore[attr-defined]
    again.sendall(hello(next(lines(again))["nonce"], nonce="who") + b"\n")
    assert next(said, None) is None
    again.close()
    gather(hub)


def test_a_member_that_had_no_place_comes_again() -> None:
    with listen("127.0.0.1", 0) as listener:
        given = Connection("127.0.0.1", listener.getsockname()[1], 1, 0, key=KEY)
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(Member.at, "127.0.0.1", given, 20)
            listener.accept()[0].close()
            hub = Hub(listener, 1, 20, lambda: 7, KEY)
            hub.start()
            found = coming.result()
        found.leave()
        hub.join(10)
        assert found.hosts == [socket.gethostname()]


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", bare(nonce="n") + b"\n"])
def test_who_answers_is_not_process_0(answer: bytes) -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(Member.at, "127.0.0.1", Connection("127.0.0.1", port, 2, 1, key=KEY), 20)
            other, _ = listener.accept()
            with other:
                other.sendall(answer)
                say(other, {"welcome": ["a", "b"], "chosen": 1, "signed": sign(b"another", "hub", "n")})
                with pytest.raises(PeerLost, match=r"is not process 0 of this run|or runs another version"):
                    coming.result()


def test_a_run_among_strangers_ends_clean() -> None:
    port = free_port()
    over = threading.Event()
    reached = [0]

    def scan() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as one:
                one.sendall([b"GET / HTTP/1.0\r\n\r\n", b"x" * 9000, b'{"number": 1}\n', b""][reached[0] % 4])
                reached[0] += 1
            time.sleep(0.01)

    scanner = threading.Thread(target=scan)
    scanner.start()
    try:
        # Process 1 comes late.
        ended = run_processes(
            2,
            lambda number: ("import time; time.sleep(2)\n" if number else "") + program("assert reduced() == 2"),
            env={"TRANSLLM_COORDINATOR": f"127.0.0.1:{port}", "TRANSLLM_SECRET": "s"},
        )
    finally:
        over.set()
        scanner.join()
    assert [(one.code, one.lines()) for one in ended] == [(0, [])] * 2, all_said(ended)
    assert reached[0] > 10


def own_address() -> str:
    """One of this machine's that is no loopback."""
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family == socket.AF_INET and not one.address.startswith("127."):
                return str(one.address)
    pytest.skip("this machine has no address but its loopback")


def test_the_hub_listens_where_the_others_are_told_to_come() -> None:
    address = own_address()
    with listen(address, 0) as listener:
        assert not listens_everywhere(listener)
        assert listener.getsockname()[0] == address
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
    with listen("::1", 0) as listener:
        assert listener.getsockname()[0] == "::1"


@pytest.mark.parametrize("found", ["192.0.2.1", "127.0.1.1", None])
def test_an_address_that_this_machine_does_not_know(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    """A port that is forwarded to it, or its own name as only it knows it: it has to listen on all."""

    def look(host: str, port: int, **options: Any) -> list[Any]:
        if found is None:
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look)
    with listen("node1", 0) as listener:
        assert listens_everywhere(listener)
