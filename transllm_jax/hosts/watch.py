"""The processes of a run, connected: who is there, who was lost, and what one of them has to say to all.

Each process holds one TCP connection to the hub, a thread of the primary. The kernel closes it when the process dies,
and its keepalive probes end it within 20 seconds when the host vanishes, whatever Python is doing meanwhile. What
passes are lines of JSON.

Anybody may connect while they come together. The hub gives each a number that it gives to nobody else, and who belongs
to the run signs it with the key of the run, and is answered with the hub's own signature. Others are passed over: what
they may say is short, and soon.
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
from transllm_jax.hosts.names import joined
from transllm_jax.hosts.wire import (
    LONGEST,
    STUCK,
    everywhere,
    lines,
    message_of,
    reach,
    say,
    sign,
    signed,
    watched,
)

# Of what is said between the processes. Another number: another version of this file.
PROTOCOL = 2
# Seconds: how long the hub waits for the others to end; when it says who is absent.
LEAVING, SILENT = 5, 10
# What is not known to be one of the run: how many at once, how many bytes and seconds it has to say who it is, and how
# often the hub says that there was one.
STRANGERS, SHORT, SPEAK, TOLD = 64, 1 << 12, 20, 3
CLOSE = "close"
OTHER_KEY = (
    "process 0 refuses this process, which has another --coordinator, TRANSLLM_SECRET or job; give all hosts the same"
)
NO_HUB = "process 0 was lost, or is none of this version, while the processes were coming together"
AGAIN = "run the same command on all hosts again to go on"


@dataclass(eq=False)
class Caller:
    """One connection to the hub. `number` is None until it says who it is; `left`: it has said that it goes.

    `nonce`: what it has to sign. `since`: when it came. `answer`: the hub's own signature, for it. `who`: its own
    name for itself.
    """

    connection: socket.socket
    where: str
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    since: float = field(default_factory=time.monotonic)
    answer: str = ""
    who: str = ""
    kept: bytes = b""
    number: int | None = None
    host: str = ""
    left: bool = False


class Hub:
    """A thread that knows all processes of a run. It ends when the others have gone."""

    def __init__(
        self, listener: socket.socket, count: int, patience: float, choose: Callable[[], int], key: bytes = b""
    ) -> None:
        """`patience`: seconds until all have come. `choose` gives a number that all are welcomed with, then.

        `key`: what all processes of this run know.
        """
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self.count, self._listener, self._choose, self._key = count, listener, choose, key
        # Those who have not said who they are, in the order in which they came; how many belonged to another run.
        self._strangers: dict[Caller, None] = {}
        self._refused = 0
        # The address at which it listens; None for all of this machine's.
        self.bound = None if everywhere(listener) else str(listener.getsockname()[0])
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
                    elif (now := self._selector.get_map().get(key.fd)) and now.data is key.data:
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
            connection, address = self._listener.accept()
            if len(self._strangers) >= STRANGERS + self.count:
                # One of the run speaks at once, and comes again where it had no time to.
                self._gone(next(iter(self._strangers)))
            caller = Caller(watched(connection), joined(*address[:2]))
            connection.settimeout(STUCK)
            self._selector.register(connection, selectors.EVENT_READ, caller)
            self._strangers[caller] = None
            say(connection, {"transllm": PROTOCOL, "nonce": caller.nonce})

    def _finished(self) -> bool:
        if self._ending:
            # The primary's own end waits for this one, once it knows.
            return (self._primary_knows and not self._callers.keys() - {0}) or time.monotonic() > self._ending
        return self._begun and not self._callers

    def _hear(self, caller: Caller) -> None:
        try:
            data = caller.connection.recv(SHORT if caller.number is None else 1 << 16)
        except OSError:
            data = b""
        *whole, caller.kept = (caller.kept + data).split(b"\n")
        for line in whole:
            message = None if caller.number is None and len(line) > SHORT else message_of(line)
            if message is None:
                data = b""
                break
            if caller.number is not None:
                self._answer(caller, caller.number, message)
            elif not self._welcome(caller, message):
                data = b""
                break
        if not data or len(caller.kept) > (SHORT if caller.number is None else LONGEST):
            self._gone(caller)

    def _gone(self, caller: Caller) -> None:
        self._strangers.pop(caller, None)
        self._selector.unregister(caller.connection)
        caller.connection.close()
        number = caller.number
        if number is None:
            return
        if self._begun and not caller.left:
            self.end(LOST, f"{self.name_of(number)} was lost", lost=True)
        del self._callers[number]

    def _knows(self, caller: Caller, message: dict[str, Any]) -> bool:
        """Whether who says this has the key of this run, and says all that one of it does."""
        if message.get("transllm") != PROTOCOL:
            return False
        kinds = {"number": int, "count": int, "host": str, "nonce": str}
        said = [message.get(name) for name in kinds]
        if any(type(value) is not kind for value, kind in zip(said, kinds.values(), strict=True)):
            return False
        if not signed(message.get("signed"), self._key, "member", caller.nonce, *said):
            self._refused += 1
            if self._refused <= TOLD:
                text = "it has another --coordinator, TRANSLLM_SECRET or job than this run"
                print(f"refused a process at {caller.where}: {text}", file=sys.stderr, flush=True)
            say(caller.connection, {"end": 2, "line": OTHER_KEY, "lost": False})
            return False
        caller.who = message["nonce"]
        caller.answer = sign(self._key, "hub", caller.nonce, *said)
        return True

    def _welcome(self, caller: Caller, message: dict[str, Any]) -> bool:
        """Whether this is one of us. When all have come, they are told so."""
        if not self._knows(caller, message):
            return False
        number, count = message["number"], message["count"]
        if self._ending:
            say(caller.connection, self._end_of_all)
            self._primary_knows |= number == 0
            return False
        caller.host = message["host"]
        if count != self.count:
            wrong = f"process {number} (host {caller.host}) is started with --processes {count}"
            self.end(2, f"{wrong}, process 0 with --processes {self.count}", besides=caller)
            return False
        known = self._callers.get(number)
        if known and known.who == caller.who and not self._begun:
            # Its first connection is gone, which it knows before the hub does.
            self._gone(known)
        elif known:
            hosts = f"on host {known.host} and on host {caller.host}"
            self.end(2, f"two processes are started with --process {number}, {hosts}", besides=caller)
            return False
        if not 0 <= number < count:
            return False
        caller.number = number
        del self._strangers[caller]
        self._callers[number] = caller
        if len(self._callers) == self.count:
            self._begun = True
            # Whoever comes now is told by the closed port to try later: it belongs to the next attempt.
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
        for caller in [one for one in self._strangers if now - one.since > SPEAK]:
            self._gone(caller)
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


class Crowded(PeerLost):
    """The hub had no place for this process just now, or is gone."""


class Member:
    """This process at the hub. `ended(code, line, lost)` is called, in a thread, when it has to end."""

    @classmethod
    def at(cls, host: str, given: Connection, patience: float) -> Member:
        """As soon as the hub is there and all have come, in so many seconds. Errors as below."""
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
        """Says who this is and waits until all have come. UserError, PeerLost: the line says why they do not.

        `who`: a name that no other process has, nor this one in another attempt. Crowded: it is to come again.
        """
        self._connection = connection
        self._lines = lines(connection)
        # The hub ends the waiting; a little later, if there is no hub, this does.
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
        if not signed(first.get("signed"), given.key, "hub", *both):
            raise PeerLost(f"who answers at {joined(given.host, given.port)} is not process 0 of this run")
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
