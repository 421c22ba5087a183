"""Connections between the processes of a run: who is there, who was lost, and messages from one process to all.

Each process holds one TCP connection to the hub, a thread of the primary. The kernel closes the connection when the
process dies; keepalive probes close it within 20 seconds when the host vanishes, whatever Python is doing then. The
messages are lines of JSON.

Any program can connect while the processes assemble. The hub sends each connection a nonce of its own. A process of the
run signs the nonce with the run's key, and the hub answers with its own signature. Other connections are dropped; until
then they may send only a few bytes, for a few seconds.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transllm_jax.errors import LOST, PREEMPTED, PeerLost, UserError
from transllm_jax.hosts.connection import Connection
from transllm_jax.hosts.names import format_address
from transllm_jax.hosts.wire import (
    LONGEST,
    STUCK,
    is_signed,
    lines,
    listens_everywhere,
    message_of,
    reach,
    say,
    sign,
    with_keepalive,
)

# Version of the messages; raise it when they change.
PROTOCOL = 2
# Seconds: how long the hub waits for the other processes to end; after how long it prints which are absent.
LEAVING, SILENT = 5, 10
# Limits on connections that have not proved that they belong to the run: their number, the bytes and the seconds that
# each has to identify itself, and how many refusals the hub prints.
STRANGERS, SHORT, SPEAK, TOLD = 64, 1 << 12, 20, 3
CLOSE = "close"
OTHER_KEY = (
    "process 0 refuses this process, which has another --coordinator, TRANSLLM_SECRET or job; give all hosts the same"
)
NO_HUB = "process 0 was lost while the processes were connecting, or runs another version"
AGAIN = "run the same command on all hosts again to go on"


@dataclass(eq=False)
class Caller:
    """One connection to the hub.

    `where`: its address. `nonce`: what it has to sign. `since`: when it connected. `answer`: the hub's signature for
    it. `who`: the nonce of the process, the same for each of its connections. `buffer`: bytes of a line that is not
    complete. `number`: of the process; None until it has identified itself. `left`: whether it has said goodbye.
    """

    connection: socket.socket
    where: str
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    since: float = field(default_factory=time.monotonic)
    answer: str = ""
    who: str = ""
    buffer: bytes = b""
    number: int | None = None
    host: str = ""
    left: bool = False


class Hub:
    """A thread that holds a connection to each process of a run. It ends when all have disconnected."""

    def __init__(
        self, listener: socket.socket, count: int, patience: float, choose: Callable[[], int], key: bytes = b""
    ) -> None:
        """`patience`: seconds within which all processes have to connect. `key`: the run's key, see `sign`.

        `choose`: called once all are here; all get its result (the port of jax's service) as `Member.chosen`.
        """
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self.count, self._listener, self._choose, self._key = count, listener, choose, key
        # Connections that have not identified themselves, oldest first; how many were refused.
        self._strangers: dict[Caller, None] = {}
        self._refused = 0
        # The address on which it listens; None for all addresses of this machine.
        self.bound = None if listens_everywhere(listener) else str(listener.getsockname()[0])
        self._patience, self._started = patience, time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._callers: dict[int, Caller] = {}
        self._all_here, self._absent_named, self._primary_knows = False, False, False
        # Once the run has to end: when the hub stops waiting (0 before that), and the message to all.
        self._end_deadline, self._end_message = 0.0, dict[str, Any]()
        # The open meeting: for each process that has arrived, the meeting's name and its value; when the wait ends.
        self._arrived: dict[int, tuple[str, Any]] = {}
        self._deadline = float("inf")

    def name_of(self, number: int) -> str:
        """How a process is called in a message."""
        caller = self._callers.get(number)
        return f"process {number} of {self.count}" + (f" (host {caller.host})" if caller else "")

    def start(self) -> None:
        """Start to listen."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for at most `seconds` until all processes have disconnected."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while not self._finished():
                for key, _ in self._selector.select(0.2):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif (now := self._selector.get_map().get(key.fd)) and now.data is key.data:
                        self._receive(key.data)
                self._check_timeouts()
        finally:
            # Also after an error here, so that the other processes notice it.
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()

    def _accept(self) -> None:
        # The other side may have hung up already.
        with contextlib.suppress(OSError):
            connection, address = self._listener.accept()
            if len(self._strangers) >= STRANGERS + self.count:
                # A process of the run identifies itself at once, and connects again if it was dropped before it could.
                self._drop(next(iter(self._strangers)))
            caller = Caller(with_keepalive(connection), format_address(*address[:2]))
            connection.settimeout(STUCK)
            self._selector.register(connection, selectors.EVENT_READ, caller)
            self._strangers[caller] = None
            say(connection, {"transllm": PROTOCOL, "nonce": caller.nonce})

    def _finished(self) -> bool:
        if self._end_deadline:
            # The primary waits for this thread before it ends, once it has the message.
            return (self._primary_knows and not self._callers.keys() - {0}) or time.monotonic() > self._end_deadline
        return self._all_here and not self._callers

    def _receive(self, caller: Caller) -> None:
        try:
            data = caller.connection.recv(SHORT if caller.number is None else 1 << 16)
        except OSError:
            data = b""
        *whole, caller.buffer = (caller.buffer + data).split(b"\n")
        for line in whole:
            message = None if caller.number is None and len(line) > SHORT else message_of(line)
            if message is None:
                data = b""
                break
            if caller.number is not None:
                self._handle(caller, caller.number, message)
            elif not self._admit(caller, message):
                data = b""
                break
        if not data or len(caller.buffer) > (SHORT if caller.number is None else LONGEST):
            self._drop(caller)

    def _drop(self, caller: Caller) -> None:
        self._strangers.pop(caller, None)
        self._selector.unregister(caller.connection)
        caller.connection.close()
        if (number := caller.number) is None:
            return
        if self._all_here and not caller.left:
            self.end(LOST, f"{self.name_of(number)} was lost", lost=True)
        del self._callers[number]

    def _authenticate(self, caller: Caller, message: dict[str, Any]) -> bool:
        """Whether this message has all fields of a process's first message, signed with the run's key."""
        if message.get("transllm") != PROTOCOL:
            return False
        kinds = {"number": int, "count": int, "host": str, "nonce": str}
        said = [message.get(name) for name in kinds]
        if any(type(value) is not kind for value, kind in zip(said, kinds.values(), strict=True)):
            return False
        if not is_signed(message.get("signed"), self._key, "member", caller.nonce, *said):
            self._refused += 1
            if self._refused <= TOLD:
                text = "it has another --coordinator, TRANSLLM_SECRET or job than this run"
                print(f"refused a process at {caller.where}: {text}", file=sys.stderr, flush=True)
            say(caller.connection, {"end": 2, "line": OTHER_KEY, "lost": False})
            return False
        caller.who = message["nonce"]
        caller.answer = sign(self._key, "hub", caller.nonce, *said)
        return True

    def _admit(self, caller: Caller, message: dict[str, Any]) -> bool:
        """Whether this is a process of the run. After the last one, all are told that the run is complete."""
        if not self._authenticate(caller, message):
            return False
        number, count = message["number"], message["count"]
        if self._end_deadline:
            say(caller.connection, self._end_message)
            self._primary_knows |= number == 0
            return False
        caller.host = message["host"]
        if count != self.count:
            wrong = f"process {number} (host {caller.host}) is started with --processes {count}"
            self.end(2, f"{wrong}, process 0 with --processes {self.count}", also_tell=caller)
            return False
        known = self._callers.get(number)
        if known and known.who == caller.who and not self._all_here:
            # Its first connection broke, and the hub has not noticed yet.
            self._drop(known)
        elif known:
            hosts = f"on host {known.host} and on host {caller.host}"
            self.end(2, f"two processes are started with --process {number}, {hosts}", also_tell=caller)
            return False
        if not 0 <= number < count:
            return False
        caller.number = number
        del self._strangers[caller]
        self._callers[number] = caller
        if len(self._callers) == self.count:
            self._all_here = True
            # A process that connects now belongs to the next attempt: the closed port makes it try again later.
            self._selector.unregister(self._listener)
            self._listener.close()
            hosts_of = [self._callers[n].host for n in range(self.count)]
            chosen = self._choose()
            for one in list(self._callers.values()):
                say(one.connection, {"welcome": hosts_of, "chosen": chosen, "signed": one.answer})
        return True

    def _to_all(self, message: dict[str, Any]) -> None:
        for caller in list(self._callers.values()):
            if not caller.left:
                say(caller.connection, message)

    def _handle(self, caller: Caller, number: int, message: dict[str, Any]) -> None:
        if "bye" in message:
            caller.left = True
        elif "end" in message:
            caller.left = True
            self.end(message["end"], str(message["line"]).replace("{me}", self.name_of(number)))
        elif "at" in message and not self._end_deadline:
            self._arrived[number] = (message["at"], message["give"])
            if message["patience"] is not None:
                self._deadline = min(self._deadline, time.monotonic() + message["patience"])
            self._finish_meeting()

    def _finish_meeting(self) -> None:
        names = {name for name, _ in self._arrived.values()}
        if len(names) > 1:
            leaving = [number for number, (name, code) in self._arrived.items() if name == CLOSE and code == PREEMPTED]
            if leaving:
                self._end_on_request(leaving)
                return
            by_name = sorted(self._arrived.items(), key=lambda item: item[1][0])
            (one, (here, _)), (two, (there, _)) = by_name[0], by_name[-1]
            self.end(LOST, f"{self.name_of(one)} is at '{here}' and {self.name_of(two)} at '{there}': this is a defect")
        elif len(self._arrived) == self.count:
            given = [self._arrived[number][1] for number in range(self.count)]
            self._arrived, self._deadline = {}, float("inf")
            self._to_all({"all": given})

    def _end_on_request(self, leaving: list[int]) -> None:
        """These processes were asked to stop (by a signal) and the others were not: all end."""
        for number in leaving:
            say(self._callers[number].connection, {"all": None})
            self._callers[number].left = True
        self.end(PREEMPTED, f"{self.name_of(leaving[0])} was stopped; {AGAIN}")

    def _check_timeouts(self) -> None:
        now = time.monotonic()
        for caller in [one for one in self._strangers if now - one.since > SPEAK]:
            self._drop(caller)
        if self._end_deadline:
            return
        if not self._all_here:
            waited = now - self._started
            absent = ", ".join(str(number) for number in range(self.count) if number not in self._callers)
            if waited > SILENT and not self._absent_named:
                self._absent_named = True
                print(f"waiting for process {absent} of {self.count}", file=sys.stderr, flush=True)
            if waited > self._patience:
                here = ", ".join(f"{number} (host {self._callers[number].host})" for number in sorted(self._callers))
                self.end(
                    LOST,
                    f"absent after {self._patience:.0f} s: process {absent} of {self.count}; here: process {here}; "
                    "is the command running on all hosts, with the same --coordinator?",
                )
        elif now > self._deadline:
            name, code = next(iter(self._arrived.values()))
            absent = ", ".join(self.name_of(n) for n in range(self.count) if n not in self._arrived)
            if name == CLOSE and code == PREEMPTED:
                self._end_on_request(list(self._arrived))
            else:
                self.end(LOST, f"{absent} did not come to '{name}'", lost=True)

    def end(self, code: int, line: str, *, lost: bool = False, also_tell: Caller | None = None) -> None:
        """End the run: tell all processes, and `also_tell`, to end with exit code `code` and this line."""
        if not self._end_deadline:
            self._end_deadline = time.monotonic() + LEAVING
            self._primary_knows = 0 in self._callers
            self._end_message = {"end": code, "line": line, "lost": lost}
            if also_tell:
                say(also_tell.connection, self._end_message)
            self._to_all(self._end_message)


class Crowded(PeerLost):
    """The hub dropped this connection, for want of room or because it has ended; try again."""


class Member:
    """This process's connection to the hub."""

    @classmethod
    def at(cls, host: str, given: Connection, patience: float) -> Member:
        """Connect to the hub, for at most `patience` seconds; returns once all are here. Errors as in `__init__`."""
        who, give_up = secrets.token_hex(16), time.monotonic() + patience
        while True:
            left = max(give_up - time.monotonic(), 0)
            connection = reach(host, given.port, left)
            try:
                return cls(connection, given, left, who)
            except Crowded:
                connection.close()
                if not left:
                    raise
                time.sleep(0.1)

    def __init__(self, connection: socket.socket, given: Connection, patience: float, who: str) -> None:
        """Identify this process and wait until all are here.

        `who`: a nonce of this process and attempt. Raises UserError or PeerLost if the run cannot begin, with the
        reason, and Crowded if this process should connect again.
        """
        self._connection = connection
        self._lines = lines(connection)
        # The hub ends the wait; this timeout is for the case that there is no hub.
        connection.settimeout(patience + STUCK)
        first = next(self._lines, None)
        if first is None:
            raise Crowded(NO_HUB)
        if first.get("transllm") != PROTOCOL or not isinstance(first.get("nonce"), str):
            raise PeerLost(NO_HUB)
        said = {"number": given.number, "count": given.count, "host": socket.gethostname()}
        said["nonce"] = who
        both = first["nonce"], *said.values()
        say(connection, {"transllm": PROTOCOL, **said, "signed": sign(given.key, "member", *both)})
        first = next(self._lines, None)
        if first is None:
            raise Crowded(NO_HUB)
        if "end" in first:
            raise (UserError if first["end"] == 2 else PeerLost)(first["line"])
        if "welcome" not in first:
            raise PeerLost(NO_HUB)
        if not is_signed(first.get("signed"), given.key, "hub", *both):
            raise PeerLost(f"the process at {format_address(given.host, given.port)} is not process 0 of this run")
        connection.settimeout(None)
        self.hosts: list[str] = first["welcome"]
        self.chosen: int = first["chosen"]
        self._answers: queue.Queue[list[Any] | None] = queue.Queue()
        self._left = False

    def watch(self, ended: Callable[[int, str, bool], None]) -> None:
        """Listen from now on. `ended(code, line, lost)` is called in a thread when this process has to end."""
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
        """The value that each process gives, in the order of their numbers, once all have called this.

        `patience`: seconds to wait after the first. None at `CLOSE`, if the other processes do not come to it.
        """
        say(self._connection, {"at": name, "give": value, "patience": patience})
        return self._answers.get()

    def leave(self, code: int | None = None, line: str = "") -> None:
        """Say goodbye. With a code the others have to end too, with this line; {me} in it is this process's name."""
        self._left = True
        say(self._connection, {"bye": True} if code is None else {"end": code, "line": line})
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
