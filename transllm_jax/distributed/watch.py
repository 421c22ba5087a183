"""The processes of a run, connected: who is there, who was lost, and what one of them has to say to all.

Each process holds one TCP connection to the hub, a thread of the primary. The kernel closes it when the process dies,
and its keepalive probes end it within 20 seconds when the host vanishes, whatever Python is doing meanwhile. What
passes are lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transllm_jax.errors import LOST, PREEMPTED, PeerLost, UserError

# Of what is said between the processes. Another number: another version of this file.
PROTOCOL = 1
# Seconds. A silent host is probed after IDLE, every INTERVAL, PROBES times: it is lost after 20.
IDLE, INTERVAL, PROBES = 5, 5, 3
# A send that the other side does not take; how long the hub waits for the others to end; when it says who is absent.
STUCK, LEAVING, SILENT = 20, 5, 10
CLOSE = "close"
AGAIN = "run the same command on all hosts again to go on"


def watched(connection: socket.socket) -> socket.socket:
    """Keepalive, so that a host that vanished is noticed after IDLE + INTERVAL * PROBES seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    seconds = IDLE + INTERVAL * PROBES
    options = {"TCP_KEEPIDLE": IDLE, "TCP_KEEPALIVE": IDLE, "TCP_KEEPINTVL": INTERVAL, "TCP_KEEPCNT": PROBES}
    for name, value in (options | {"TCP_USER_TIMEOUT": seconds * 1000}).items():
        # Which of them there are depends on the system.
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def listen(host: str, port: int, patience: float = 10) -> socket.socket:
    """A socket where the others come: on the loopback for a loopback address, else on all of this host's."""
    give_up = time.monotonic() + patience
    while True:
        try:
            if is_loopback(host):
                family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
                return socket.create_server(address[:2], family=family, backlog=1024)
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            # The run before may still be ending.
            if time.monotonic() > give_up:
                raise UserError(f"--coordinator: cannot listen on port {port} here: {error}; give another") from None
            time.sleep(0.2)


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can meet there."""
    return host in ("localhost", "::1") or host.startswith("127.")


def reach(host: str, port: int, patience: float) -> socket.socket:
    """A connection to the hub, as soon as the primary is there, for `patience` seconds."""
    give_up = time.monotonic() + patience
    while True:
        try:
            found = socket.create_connection((host, port), timeout=5)
            # With nobody there, a connection within this machine can meet itself.
            if found.getsockname() != found.getpeername():
                return watched(found)
            found.close()
            error: OSError = ConnectionRefusedError("nobody listens")
        except OSError as raised:
            error = raised
        if time.monotonic() > give_up:
            raise PeerLost(
                f"process 0 is absent: no answer at {host}:{port} in {patience:.0f} s ({error}); "
                "is the command running on that host, and is the port open?"
            )
        time.sleep(0.1)


def lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """What the other side says, until it is gone, is silent for too long, or says what is none of ours."""
    kept = b""
    while True:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            return
        if not data:
            return
        *whole, kept = (kept + data).split(b"\n")
        for line in whole:
            try:
                message = json.loads(line)
            except ValueError:
                return
            if not isinstance(message, dict):
                return
            yield message


def say(connection: socket.socket, message: dict[str, Any]) -> bool:
    """Whether the message is on its way."""
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return False
    return True


@dataclass(eq=False)
class Caller:
    """One connection to the hub. `number` is None until it says who it is; `left`: it has said that it goes."""

    connection: socket.socket
    kept: bytes = b""
    number: int | None = None
    host: str = ""
    left: bool = False


class Hub:
    """A thread that knows all processes of a run. It ends when the others have gone."""

    def __init__(self, listener: socket.socket, count: int, patience: float, choose: Callable[[], int]) -> None:
        """`patience`: seconds until all have come. `choose` gives a number that all are welcomed with, then."""
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self.count, self._listener, self._choose = count, listener, choose
        self._patience, self._start = patience, time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._callers: dict[int, Caller] = {}
        self._begun, self._told = False, False
        # Once all have to end: until when they may take, and what they are told.
        self._ending, self._end_of_all = 0.0, dict[str, Any]()
        self._primary_knows = False
        # Who is at the meeting that is open now: its name, what is given, and until when the others may come.
        self._at: dict[int, tuple[str, Any]] = {}
        self._until = float("inf")

    def name_of(self, number: int) -> str:
        """How a process is called in a message."""
        caller = self._callers.get(number)
        return f"process {number} of {self.count}" + (f" (host {caller.host})" if caller else "")

    def start(self) -> None:
        """Listen from now on."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until the others have gone."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while not self._finished():
                for key, _ in self._selector.select(0.2):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fd in self._selector.get_map():
                        self._hear(key.data)
                self._look_at_the_clock()
        finally:
            # Whatever happened here: the others notice.
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()

    def _accept(self) -> None:
        # It may be gone already.
        with contextlib.suppress(OSError):
            connection = watched(self._listener.accept()[0])
            connection.settimeout(STUCK)
            self._selector.register(connection, selectors.EVENT_READ, Caller(connection))

    def _finished(self) -> bool:
        if self._ending:
            # The primary's own end waits for this one, once it knows.
            return (self._primary_knows and not self._callers.keys() - {0}) or time.monotonic() > self._ending
        return self._begun and not self._callers

    def _hear(self, caller: Caller) -> None:
        try:
            data = caller.connection.recv(1 << 16)
        except OSError:
            data = b""
        *whole, caller.kept = (caller.kept + data).split(b"\n")
        for line in whole:
            try:
                message = json.loads(line)
                assert isinstance(message, dict)
            except (ValueError, AssertionError):
                data = b""
                break
            if caller.number is not None:
                self._answer(caller, caller.number, message)
            elif message.get("transllm") != PROTOCOL or not self._welcome(caller, message):
                data = b""
                break
        # Who does not say who it is, is none of us.
        if not data or (caller.number is None and len(caller.kept) > 1 << 12):
            self._gone(caller)

    def _gone(self, caller: Caller) -> None:
        self._selector.unregister(caller.connection)
        caller.connection.close()
        number = caller.number
        if number is None:
            return
        if self._begun and not caller.left:
            self.end(LOST, f"{self.name_of(number)} was lost", lost=True)
        del self._callers[number]

    def _welcome(self, caller: Caller, message: dict[str, Any]) -> bool:
        """Whether this is one of us. When all have come, they are told so."""
        number, count = int(message["number"]), int(message["count"])
        if self._ending:
            say(caller.connection, self._end_of_all)
            self._primary_knows |= number == 0
            return False
        caller.host = str(message["host"])
        if count != self.count:
            wrong = f"process {number} (host {caller.host}) is started with --processes {count}"
            self.end(2, f"{wrong}, process 0 with --processes {self.count}", besides=caller)
            return False
        if number in self._callers:
            hosts = f"on host {self._callers[number].host} and on host {caller.host}"
            self.end(2, f"two processes are started with --process {number}, {hosts}", besides=caller)
            return False
        caller.number = number
        self._callers[number] = caller
        if len(self._callers) == self.count:
            self._begun = True
            # Whoever comes now is told by the closed port to try later: it belongs to the next attempt.
            self._selector.unregister(self._listener)
            self._listener.close()
            hosts_of = [self._callers[n].host for n in range(self.count)]
            self._to_all({"welcome": hosts_of, "chosen": self._choose()})
        return True

    def _to_all(self, message: dict[str, Any]) -> None:
        for caller in list(self._callers.values()):
            if not caller.left:
                say(caller.connection, message)

    def _answer(self, caller: Caller, number: int, message: dict[str, Any]) -> None:
        if "bye" in message:
            caller.left = True
        elif "end" in message:
            caller.left = True
            self.end(message["end"], str(message["line"]).replace("{me}", self.name_of(number)))
        elif "at" in message and not self._ending:
            self._at[number] = (message["at"], message["give"])
            if message["patience"] is not None:
                self._until = min(self._until, time.monotonic() + message["patience"])
            self._meet()

    def _meet(self) -> None:
        names = {name for name, _ in self._at.values()}
        if len(names) > 1:
            leaving = [number for number, (name, code) in self._at.items() if name == CLOSE and code == PREEMPTED]
            if leaving:
                self._stop(leaving)
                return
            by_name = sorted(self._at.items(), key=lambda item: item[1][0])
            (one, (here, _)), (two, (there, _)) = by_name[0], by_name[-1]
            self.end(LOST, f"{self.name_of(one)} is at '{here}' and {self.name_of(two)} at '{there}': this is a defect")
        elif len(self._at) == self.count:
            given = [self._at[number][1] for number in range(self.count)]
            self._at, self._until = {}, float("inf")
            self._to_all({"all": given})

    def _stop(self, leaving: list[int]) -> None:
        """Some have stopped on request, and the others have not."""
        for number in leaving:
            say(self._callers[number].connection, {"all": None})
            self._callers[number].left = True
        self.end(PREEMPTED, f"{self.name_of(leaving[0])} was stopped; {AGAIN}")

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self._ending:
            return
        if not self._begun:
            waited = now - self._start
            absent = ", ".join(str(number) for number in range(self.count) if number not in self._callers)
            if waited > SILENT and not self._told:
                self._told = True
                print(f"waiting for process {absent} of {self.count}", file=sys.stderr, flush=True)
            if waited > self._patience:
                here = ", ".join(f"{number} (host {self._callers[number].host})" for number in sorted(self._callers))
                self.end(
                    LOST,
                    f"absent after {self._patience:.0f} s: process {absent} of {self.count}; here: process {here}; "
                    "is the command running on all hosts, with the same --coordinator?",
                )
        elif now > self._until:
            name, code = next(iter(self._at.values()))
            absent = ", ".join(self.name_of(n) for n in range(self.count) if n not in self._at)
            if name == CLOSE and code == PREEMPTED:
                self._stop(list(self._at))
            else:
                self.end(LOST, f"{absent} did not come to '{name}'", lost=True)

    def end(self, code: int, line: str, *, lost: bool = False, besides: Caller | None = None) -> None:
        """All end: exit code `code`, with this line. `besides` is one who is told although it is not counted."""
        if not self._ending:
            self._ending = time.monotonic() + LEAVING
            self._primary_knows = 0 in self._callers
            self._end_of_all = {"end": code, "line": line, "lost": lost}
            if besides:
                say(besides.connection, self._end_of_all)
            self._to_all(self._end_of_all)


class Member:
    """This process at the hub. `ended(code, line, lost)` is called, in a thread, when it has to end."""

    def __init__(self, connection: socket.socket, number: int, count: int, patience: float) -> None:
        """Says who this is and waits until all have come. UserError, PeerLost: the line says why they do not."""
        self._connection = connection
        hello = {"transllm": PROTOCOL, "number": number, "count": count, "host": socket.gethostname()}
        say(connection, hello)
        self._lines = lines(connection)
        # The hub ends the waiting; a little later, if there is no hub, this does.
        connection.settimeout(patience + STUCK)
        first = next(self._lines, {})
        if "end" in first:
            raise (UserError if first["end"] == 2 else PeerLost)(first["line"])
        if "welcome" not in first:
            raise PeerLost("process 0 was lost, or is none of this version, while the processes were coming together")
        connection.settimeout(None)
        self.hosts: list[str] = first["welcome"]
        self.chosen: int = first["chosen"]
        self._answers: queue.Queue[list[Any] | None] = queue.Queue()
        self._left = False

    def watch(self, ended: Callable[[int, str, bool], None]) -> None:
        """From now on somebody listens."""
        threading.Thread(target=self._listen, args=(ended,), name="watch", daemon=True).start()

    def _listen(self, ended: Callable[[int, str, bool], None]) -> None:
        for message in self._lines:
            if "all" in message:
                self._answers.put(message["all"])
            elif "end" in message:
                ended(message["end"], message["line"], message["lost"])
                return
        if not self._left:
            ended(LOST, f"process 0 of {len(self.hosts)} (host {self.hosts[0]}) was lost", True)

    def meet(self, name: str, value: Any, patience: float | None = None) -> list[Any] | None:
        """What each process gives, by its number; all of them come, for `patience` seconds.

        None if this is the end and the others do not come.
        """
        say(self._connection, {"at": name, "give": value, "patience": patience})
        return self._answers.get()

    def leave(self, code: int | None = None, line: str = "") -> None:
        """Goodbye. With a code: the others have to end too, with this line; {me} in it is this process's name."""
        self._left = True
        say(self._connection, {"bye": True} if code is None else {"end": code, "line": line})
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
