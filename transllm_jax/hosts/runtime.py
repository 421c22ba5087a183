"""Several processes as one run: they connect, wait for each other, and end together.

Each host has one process, and all run the same command. Process 0, the primary, does what only one process may do. A
run of one process makes the same calls; they return at once, and no service is started.
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
from transllm_jax.hosts.names import format_address
from transllm_jax.hosts.watch import AGAIN, CLOSE, LEAVING, Hub, Member
from transllm_jax.hosts.wire import free_port, listen

T = TypeVar("T")
INPUT_WRONG = 2
# Seconds. jax's own check for lost processes aborts with a page of log, so it has to be slower than the one here.
HEARTBEAT = 60
# Seconds: how long a process that was asked to stop waits for the others to stop too; how long an error that a lost
# process may have caused waits for that loss to be noticed; how long a process that failed may take to end.
STOPPING, VERDICT, ENDING = 20, 30, 20
# The variable that gRPC reads first for the hosts that are reached without a proxy.
NO_PROXY = "no_grpc_proxy"
# Parts of jax's messages when a collective fails because a process was lost.
LOSS_MESSAGES = ("Gloo", "Connection closed by peer", "Connection reset by peer", "UNAVAILABLE", "coordination service")
# Errors of the primary's work that all processes raise.
SHARED = {"UserError": UserError, "Preempted": Preempted, "Diverged": Diverged}


def join(given: Connection | None, *, patience: float = PATIENCE) -> Peers:
    """Connect this process to the others of its run. The caller connects jax afterwards, with `Peers.start_jax`.

    `patience`: seconds within which all have to connect. Raises PeerLost with the absent ones' numbers.
    """
    if given is None or given.count == 1:
        return Peers()
    hub, host = None, given.host
    if given.number == 0:
        hub = Hub(listen(given.host, given.port), given.count, patience, lambda: free_port(given.host), given.key)
        host = hub.bound or "127.0.0.1"
        if hub.bound is None:
            coordinator = format_address(given.host, given.port)
            line = f"--coordinator {coordinator} is no address of this machine: process 0 listens on all of them"
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
    """The processes of a run, as one of them sees them. As a context manager it makes all of them end together.

    All processes have to make the same calls in the same order, from their main threads.
    """

    def __init__(self, given: Connection | None = None, member: Member | None = None, hub: Hub | None = None) -> None:
        self.count = given.count if given else 1
        self.number = given.number if given else 0
        self.hosts = member.hosts if member else [socket.gethostname()]
        # Printed when a process is lost: where the next attempt starts from.
        self.last_saved = "what was saved is kept"
        self._given, self._member, self._hub = given, member, hub
        self._relay: subprocess.Popen[bytes] | None = None
        self._jax = False
        # Held by the thread that ends this process: the main thread or the one that listens to the hub.
        self._end = threading.Lock()
        self._on_peer_loss: list[Callable[[], object]] = []
        self._shared: BaseException | None = None
        if member:
            member.watch(self._ended)

    @property
    def primary(self) -> bool:
        """Whether this is process 0, which does what only one process may do."""
        return self.number == 0

    @property
    def name(self) -> str:
        """What messages call this process."""
        return f"process {self.number} of {self.count} (host {self.hosts[self.number]})"

    def barrier(self, name: str, timeout: float | None = None) -> None:
        """Wait until all processes are here. All end if one is not `timeout` seconds after the first."""
        self._meet(name, None, timeout)

    def share(self, value: Any = None) -> Any:
        """The primary's value in all processes; JSON has to be able to hold it. Other processes' values are ignored."""
        return self._meet("share", value if self.primary else None)[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process. All wait for each other; in a training loop use `Agreement`."""
        return any(self._meet("any", bool(flag)))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their numbers; JSON has to be able to hold them."""
        return self._meet("gather", value)

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Run `work()` in all processes; each gets its own result. A UserError in any is raised in all afterwards."""
        value, error = [], None
        try:
            value.append(work())
        except UserError as raised:
            if self._member is None:
                raise
            error = raised
        errors = self.gather(None if error is None else str(error))
        number = next((number for number, line in enumerate(errors) if line is not None), None)
        if number is None:
            return value[0]
        # If the error is the same in all processes, the message names none of them.
        shared = all(line == errors[number] for line in errors)
        who = "" if shared else f"process {number} (host {self.hosts[number]}): "
        self._shared = UserError(f"{who}{errors[number]}")
        raise self._shared from error

    def run_primary_first(self, name: str, work: Callable[[], T]) -> T:
        """Run `work()` in the primary, then in the others, which find what it made. UserError as in `run_on_all`."""
        value: list[T] = []
        self.run_on_primary(name, lambda: value.append(work()))
        if self._member is not None:
            self.run_on_all(lambda: None if self.primary else value.append(work()))
        return value[0]

    def run_on_primary(self, name: str, work: Callable[[], T]) -> T | None:
        """Run `work()` in the primary, however long it takes, while the others wait.

        Returns its result in all processes (as JSON gives it back), or None in the others if JSON cannot hold it.
        UserError, Preempted and Diverged are raised in all; after any other error, or if the primary dies, the others
        end with one line.
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
        """Raise UserError in all processes if they differ in one of these values; it names process and value."""
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

    def on_peer_loss(self, call: Callable[[], object]) -> None:
        """Register `call` to run before this process ends because another ended. It has 5 seconds, in a thread."""
        self._on_peer_loss.append(call)

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
        # All processes stop at the same step and see the same losses; a KeyboardInterrupt is one process's own.
        stopped = code == PREEMPTED and not isinstance(error, KeyboardInterrupt)
        if error is None or code == 0 or stopped or isinstance(error, Diverged) or shared:
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
        """Start jax.distributed, with the primary's service reached through the relay. Does nothing for one process."""
        if self._member is None:
            return
        import jax

        assert self._given
        host, port = self._given.host, self._member.chosen
        bind = None
        if self._hub:
            address, bind = format_address(host, port), format_address(self._hub.bound or "::", port)
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
        # gRPC would reach the other hosts through the environment's proxy, which may not know them.
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
        """Wait for all processes and end with them, jax included. Without them, after a stop, end as if alone."""
        if self._member is None:
            return
        codes = self._member.meet(CLOSE, code, STOPPING if code else None)
        if codes is None:
            self._claim_end()
            self._member.leave()
            self._leave_without_jax(code)
            return
        if self._jax:
            import jax

            jax.distributed.shutdown()
        self._claim_end()
        self._member.leave()
        if self._hub:
            self._hub.join(LEAVING)
        if self._relay and self._relay.stdin:
            self._relay.stdin.close()
            self._relay.wait(LEAVING)
        self._member = None

    def _fail(self, code: int, error: BaseException) -> None:
        """End this process, which has an error of its own, and the others with it."""
        assert self._member
        if any(words in str(error) for words in LOSS_MESSAGES) and not isinstance(error, UserError):
            time.sleep(VERDICT)  # If a lost process was the cause, the listening thread ends this one meanwhile.
        self._claim_end()
        if code == INPUT_WRONG and isinstance(error, UserError):
            line = f"{{me}}: {error}"
        elif code == PREEMPTED:
            line = f"{{me}} was stopped; {AGAIN}"
        else:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            line = f"{{me}} failed, its log says more: {text[:300]}"
        self._member.leave(code, line)
        self._leave_without_jax(code)

    def _claim_end(self) -> None:
        """Take the right to end this process; never returns if the listening thread has it."""
        if not self._end.acquire(blocking=False):
            threading.Event().wait()

    def _leave_without_jax(self, code: int) -> None:
        """Make the interpreter end before jax's own shutdown, which would wait for processes that no longer answer."""
        if self._hub:
            self._hub.join(LEAVING + 1)
        self._member = None
        atexit.register(_exit, code)
        # A library's thread may keep the interpreter from ending.
        last = threading.Timer(ENDING, _exit, (code,))
        last.daemon = True
        last.start()

    def _ended(self, code: int, line: str, lost: bool) -> None:
        """End this process, whatever its main thread is doing. Called in the listening thread."""
        if not self._end.acquire(blocking=False):
            return

        def last_calls() -> None:
            for call in self._on_peer_loss:
                with contextlib.suppress(Exception):
                    call()

        thread = threading.Thread(target=last_calls, daemon=True)
        thread.start()
        thread.join(5)
        if lost:
            line = f"{line}; {self.last_saved}; {AGAIN}"
        # Not print: the main thread may hold the stream.
        os.write(2, f"{'' if code == PREEMPTED else 'error: '}{line}\n".encode())
        if self._hub:
            self._hub.join(LEAVING)
        _exit(code)


def _exit(code: int) -> NoReturn:
    """Flush the output and end this process without Python's cleanup."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    thread = threading.Thread(target=flush, daemon=True)
    # While the interpreter ends, it starts no new threads.
    try:
        thread.start()
        thread.join(1)
    except RuntimeError:
        flush()
    os._exit(code)


def _exit_code(error: BaseException | None) -> int:
    """The exit code of a command that ends with this error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return INPUT_WRONG
    if isinstance(error, (Preempted, KeyboardInterrupt)):
        return PREEMPTED
    return 0 if error is None else LOST
