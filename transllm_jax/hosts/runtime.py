"""Several processes as one run: how they find each other, wait for each other, and end together.

One process a host. Each runs the same command; what only one may do is done by the primary, process 0. A run of one
process goes through the same calls, which then are immediate, and starts no service.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from transllm_jax.errors import LOST, PREEMPTED, Diverged, PeerLost, Preempted, UserError
from transllm_jax.hosts.connection import PATIENCE, Connection
from transllm_jax.hosts.names import joined
from transllm_jax.hosts.watch import AGAIN, CLOSE, LEAVING, Hub, Member
from transllm_jax.hosts.wire import free_port, listen

T = TypeVar("T")
INPUT_WRONG = 2
# jax's own watch over the processes aborts with a page of log; it stands behind the one here and is slower.
HEARTBEAT = 60
# Seconds: a stop of one process alone is given this long to become one of all; an error that may come of a lost process
# waits this long for its loss to be noticed; the end of a process that failed.
STOPPING, VERDICT, ENDING = 20, 30, 20
# Where gRPC reads which hosts are reached without a proxy; before the others.
NO_PROXY = "no_grpc_proxy"
# What jax says when a collective fails because a process is gone.
OF_A_LOSS = ("Gloo", "Connection closed by peer", "Connection reset by peer", "UNAVAILABLE", "coordination service")
# Errors that one process has and all raise.
SHARED = {"UserError": UserError, "Preempted": Preempted, "Diverged": Diverged}


def join(given: Connection | None, *, patience: float = PATIENCE) -> Peers:
    """This process among the others of its run; jax is not connected yet: that is for `Peers.start_jax`.

    `patience`: seconds for all to come. PeerLost: they did not, and the line says which.
    """
    if given is None or given.count == 1:
        return Peers()
    hub, host = None, given.host
    if given.number == 0:
        hub = Hub(listen(given.host, given.port), given.count, patience, lambda: free_port(given.host), given.key)
        host = hub.bound or "127.0.0.1"
        if hub.bound is None:
            line = f"--coordinator {joined(given.host, given.port)} is no address of this machine: it listens on all"
            print(line, file=sys.stderr, flush=True)
        hub.start()
    try:
        member = Member.at(host, given, patience)
    except (UserError, PeerLost):
        if hub:
            hub.join(LEAVING + 1)
        raise
    return Peers(given, member, hub)


class Peers:
    """The processes of a run, to one of them. As a context it ends with the others, however it ends.

    All processes have to make the same calls in the same order, from their main thread.
    """

    def __init__(self, given: Connection | None = None, member: Member | None = None, hub: Hub | None = None) -> None:
        self.count = given.count if given else 1
        self.number = given.number if given else 0
        self.hosts = member.hosts if member else [socket.gethostname()]
        # Said when a process is lost: what the next attempt begins with.
        self.stands = "what was saved stands"
        self._given, self._member, self._hub = given, member, hub
        self._relay: subprocess.Popen[bytes] | None = None
        self._jax = False
        # Taken by what ends this process first: its own main thread, or the watching one.
        self._end = threading.Lock()
        self._at_loss: list[Callable[[], object]] = []
        self._shared: BaseException | None = None
        if member:
            member.watch(self._ended)

    @property
    def primary(self) -> bool:
        """Whether this is the process that does what only one may do."""
        return self.number == 0

    @property
    def name(self) -> str:
        """How this process is called in a message."""
        return f"process {self.number} of {self.count} (host {self.hosts[self.number]})"

    def barrier(self, name: str, timeout: float | None = None) -> None:
        """All wait for all; for `timeout` seconds after the first came, then all end."""
        self._meet(name, None, timeout)

    def share(self, value: Any = None) -> Any:
        """The primary's value, which JSON can hold, in all; the others' are not looked at."""
        return self._meet("share", value if self.primary else None)[0]

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of them. They wait for each other: within a training loop, see `Agreement`."""
        return any(self._meet("any", bool(flag)))

    def gather(self, value: Any) -> list[Any]:
        """What each of them gives, which JSON can hold, by its number; in all."""
        return self._meet("gather", value)

    def together(self, work: Callable[[], T]) -> T:
        """All do `work()`, each with its own result. A UserError in one of them is raised in all, after their work."""
        value, error = [], None
        try:
            value.append(work())
        except UserError as raised:
            if self._member is None:
                raise
            error = raised
        said = self.gather(None if error is None else str(error))
        number = next((number for number, line in enumerate(said) if line is not None), None)
        if number is None:
            return value[0]
        # What all say is nothing of this one's.
        who = "" if all(line == said[number] for line in said) else f"process {number} (host {self.hosts[number]}): "
        self._shared = UserError(f"{who}{said[number]}")
        raise self._shared from error

    def in_turn(self, name: str, work: Callable[[], T]) -> T:
        """The primary does `work()`, then the others do, who find what it left. UserError as in `together`."""
        value: list[T] = []
        self.lead(name, lambda: value.append(work()))
        if self._member is not None:
            self.together(lambda: None if self.primary else value.append(work()))
        return value[0]

    def lead(self, name: str, work: Callable[[], T]) -> T | None:
        """The primary does `work()`, however long it takes, and the others wait.

        Its result in all (as JSON gives it back), or None in the others if JSON cannot hold it. UserError, Preempted
        and Diverged are raised in all; after another error, or if the primary dies, the others end with one line.
        """
        if self._member is None:
            return work()
        if not self.primary:
            answer = self._meet(name, None)[0]
            if "error" in answer:
                self._shared = SHARED[answer["error"]](answer["message"])
                raise self._shared
            return answer.get("value")
        try:
            value = work()
        except tuple(SHARED.values()) as error:
            kind = next(name for name, kind in SHARED.items() if isinstance(error, kind))
            self._meet(name, {"error": kind, "message": str(error)})
            self._shared = error
            raise
        try:
            answer = {"value": json.loads(json.dumps(value))}
        except (TypeError, ValueError):
            answer = {}
        self._meet(name, answer)
        return answer.get("value", value)

    def require_equal(self, what: Mapping[str, str]) -> None:
        """UserError in all if they differ in one of these; it says which process differs in what."""
        if self._member is None:
            return
        given = self._meet("require_equal", dict(what))
        differences = []
        for key in dict.fromkeys(key for one in given for key in one):
            values = [one.get(key, "nothing") for one in given]
            common, times = Counter(values).most_common(1)[0]
            if times == self.count:
                continue
            by_value: dict[str, list[int]] = {}
            for number, value in enumerate(values):
                if value != common:
                    by_value.setdefault(value, []).append(number)
            for value, numbers in by_value.items():
                who = ", ".join(f"{number} (host {self.hosts[number]})" for number in numbers)
                differences.append(f"{key} is {value} in process {who} and {common} in process {values.index(common)}")
        if differences:
            self._shared = UserError(f"the processes of this run differ: {'; '.join(differences)}; make them equal")
            raise self._shared

    def at_loss(self, call: Callable[[], object]) -> None:
        """`call` is made before this process ends because another one did. It has 5 seconds, and runs in a thread."""
        self._at_loss.append(call)

    def close(self) -> None:
        """The end of the run. All wait for all."""
        self._close(0)

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._member is None:
            return
        code = _exit_code(error)
        cause: BaseException | None = error
        while cause is not None and cause is not self._shared:
            cause = cause.__cause__ or cause.__context__
        shared = cause is not None
        # Stopped between two steps, all of them do it. Stopped by force, this one did. Losses are the same in all.
        stopped = code == PREEMPTED and not isinstance(error, KeyboardInterrupt)
        together = code == 0 or stopped or isinstance(error, Diverged)
        if error is None or together or shared:
            self._close(code)
        else:
            self._fail(code, error)

    def _meet(self, name: str, value: Any, timeout: float | None = None) -> list[Any]:
        if self._member is None:
            return [value]
        found = self._member.meet(name, value, timeout)
        assert found is not None
        return found

    def start_jax(self, patience: float = PATIENCE) -> None:
        """jax.distributed, with the primary's service reached through the relay. Nothing for one process."""
        if self._member is None:
            return
        import jax

        assert self._given
        host, port = self._given.host, self._member.chosen
        bind = None
        if self._hub:
            address, bind = joined(host, port), joined(self._hub.bound or "::", port)
        else:
            with socket.create_server(("127.0.0.1", 0), backlog=64) as near:
                command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("relay.py"))]
                self._relay = subprocess.Popen(
                    [*command, str(near.fileno()), host, str(port)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[near.fileno()],
                    # Ctrl-C in a terminal is for this process alone.
                    start_new_session=True,
                )
                address = f"127.0.0.1:{near.getsockname()[1]}"
        if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # A proxy of the environment knows the way out and not the way to the other hosts; gRPC would ask it.
        direct = next((os.environ[name] for name in (NO_PROXY, "no_proxy", "NO_PROXY") if os.environ.get(name)), None)
        os.environ[NO_PROXY] = ",".join(filter(None, [direct, host, "127.0.0.1"]))
        jax.config.update("jax_check_proxy_envs", False)
        jax.distributed.initialize(
            address,
            self.count,
            self.number,
            local_device_ids=self._given.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(patience),
            coordinator_bind_address=bind,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
        self._jax = True

    def _close(self, code: int) -> None:
        if self._member is None:
            return
        together = self._member.meet(CLOSE, code, STOPPING if code else None)
        if together is None:
            self._take_the_end()
            self._member.leave()
            self._leave_without_jax(code)
            return
        if self._jax:
            import jax

            jax.distributed.shutdown()
        self._take_the_end()
        self._member.leave()
        if self._hub:
            self._hub.join(LEAVING)
        if self._relay and self._relay.stdin:
            self._relay.stdin.close()
            self._relay.wait(LEAVING)
        self._member = None

    def _fail(self, code: int, error: BaseException) -> None:
        """This process has an error of its own: the others end with it."""
        assert self._member
        if any(words in str(error) for words in OF_A_LOSS) and not isinstance(error, UserError):
            time.sleep(VERDICT)  # The watching thread ends this process meanwhile, if it was that.
        self._take_the_end()
        if code == INPUT_WRONG and isinstance(error, UserError):
            line = f"{{me}}: {error}"
        elif code == PREEMPTED:
            line = f"{{me}} was stopped; {AGAIN}"
        else:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            line = f"{{me}} failed, its log says more: {text[:300]}"
        self._member.leave(code, line)
        self._leave_without_jax(code)

    def _take_the_end(self) -> None:
        if not self._end.acquire(blocking=False):
            threading.Event().wait()  # The watching thread is ending this process.

    def _leave_without_jax(self, code: int) -> None:
        """At its end jax would wait for processes that no longer answer: the interpreter ends before that."""
        if self._hub:
            self._hub.join(LEAVING + 1)
        self._member = None
        atexit.register(_exit, code)
        # A thread of a library may keep the interpreter from its end.
        last = threading.Timer(ENDING, _exit, (code,))
        last.daemon = True
        last.start()

    def _ended(self, code: int, line: str, lost: bool) -> None:
        """In the watching thread: this process ends, wherever its main thread is."""
        if not self._end.acquire(blocking=False):
            return

        def last_calls() -> None:
            for call in self._at_loss:
                with contextlib.suppress(Exception):
                    call()

        thread = threading.Thread(target=last_calls, daemon=True)
        thread.start()
        thread.join(5)
        if lost:
            line = f"{line}; {self.stands}; {AGAIN}"
        # Not print: the main thread may hold the stream.
        os.write(2, f"{'' if code == PREEMPTED else 'error: '}{line}\n".encode())
        if self._hub:
            self._hub.join(LEAVING)
        _exit(code)


def _exit(code: int) -> NoReturn:
    """The end of this process, with what was printed and without the cleaning up."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    thread = threading.Thread(target=flush, daemon=True)
    # At the interpreter's end there are no new threads.
    try:
        thread.start()
        thread.join(1)
    except RuntimeError:
        flush()
    os._exit(code)


def _exit_code(error: BaseException | None) -> int:
    """Of the command that ends with this error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return INPUT_WRONG
    if isinstance(error, (Preempted, KeyboardInterrupt)):
        return PREEMPTED
    return 0 if error is None else LOST
