"""Several real processes of one run on this machine, for tests: started together, some killed, all waited for."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
from processes import virtual_devices

ROOT = Path(__file__).parents[1]
# The part of a core below which a process counts as one that waits. What waits in gloo, with the threads of jax and of
# the hub, uses 0.003 of a core; what computes on a machine that is busy with twenty others has ten times this.
WAITS = 0.02


class Ended(NamedTuple):
    """How a process ended. `seconds`: when, after the start of all; `after`: after the last kill, or None."""

    code: int
    out: str
    err: str
    seconds: float
    after: float | None

    def lines(self) -> list[str]:
        """What it wrote on stderr, without gloo's greeting and the warnings of jax's own log; its errors are in it."""
        return [line for line in self.err.splitlines() if line and not re.match(r"\[Gloo\] Rank|[WI]\d{4} ", line)]


@dataclass(frozen=True)
class Kill:
    """A signal to process `number`, `when` seconds after the start, or as soon as its stdout holds a text."""

    number: int
    when: float | str
    signal: int = signal.SIGKILL


def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def run_processes(
    count: int,
    command: str | Sequence[str] | Callable[[int], str | Sequence[str]],
    *,
    devices: int = 1,
    env: Mapping[str, str] | Callable[[int], Mapping[str, str]] | None = None,
    kills: Sequence[Kill] = (),
    still: float = 90,
    total: float = 1800,
    cwd: Path = ROOT,
    start: Sequence[int] | None = None,
) -> list[Ended]:
    """Starts `count` processes on the CPU that are one run, by the environment, and waits for them.

    `command`: Python code, or arguments of the interpreter, such as ["-m", "transllm_jax.cli.main", "run", ...]; of
    each process its own, if it is a function of the number. `devices`: virtual devices of each. `env`: added to this
    process's environment. `start`: the numbers of those that are started (all). When for `still` seconds none of them
    computed, wrote or ended, they hang: that fails the test, with what all have written. On a slow machine they take
    longer, and go on. `total` is for what hangs while it computes.
    """
    numbers = list(range(count)) if start is None else list(start)
    port = free_port()
    with tempfile.TemporaryDirectory() as place:
        files = {n: (Path(place) / f"{n}.out", Path(place) / f"{n}.err") for n in numbers}
        running: dict[int, subprocess.Popen[bytes]] = {}
        ended: dict[int, tuple[int, float]] = {}
        waiting, killed = list(kills), None
        begin = time.monotonic()
        progress = Progress(still)
        try:
            for number in numbers:
                given = command(number) if callable(command) else command
                added = (env(number) if callable(env) else env) or {}
                out, err = files[number]
                with out.open("wb") as to_out, err.open("wb") as to_err:
                    running[number] = subprocess.Popen(
                        [sys.executable, *(["-u", "-c", given] if isinstance(given, str) else given)],
                        stdin=subprocess.DEVNULL,
                        stdout=to_out,
                        stderr=to_err,
                        cwd=cwd,
                        env={**os.environ, **place_of(number, count, port, devices), **added},
                    )
            while running:
                now = time.monotonic() - begin
                for kill in list(waiting):
                    seen = files[kill.number][0].read_text(errors="replace") if isinstance(kill.when, str) else ""
                    if kill.when in seen if isinstance(kill.when, str) else now >= kill.when:
                        waiting.remove(kill)
                        if kill.number in running:
                            running[kill.number].send_signal(kill.signal)
                            killed = time.monotonic() - begin
                for number, process in list(running.items()):
                    if (code := process.poll()) is not None:
                        ended[number] = code, time.monotonic() - begin
                        del running[number]
                stands = progress.stands({n: process.pid for n, process in running.items()}, files)
                if running and (stands or now > total):
                    said = {n: [file.read_text(errors="replace")[-2000:] for file in files[n]] for n in numbers}
                    how = f"did nothing for {still} s" if stands else f"still run after {total} s"
                    raise AssertionError(f"processes {sorted(running)} {how}: {said}")
                time.sleep(0.01)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
        texts = {n: [file.read_text(errors="replace") for file in files[n]] for n in numbers}
    return [
        Ended(ended[n][0], texts[n][0], texts[n][1], ended[n][1], None if killed is None else ended[n][1] - killed)
        for n in numbers
    ]


class Progress:
    """Whether processes go on: one of them used the CPU, wrote something, or ended. The clock alone says nothing."""

    def __init__(self, still: float) -> None:
        """`still`: seconds without any of it that are too many."""
        self._still = still
        self._looked = self._since = time.monotonic()
        self._used: dict[int, float] = {}
        self._left: tuple[set[int], int] = set(), 0

    def stands(self, running: Mapping[int, int], files: Mapping[int, Sequence[Path]]) -> bool:
        """Whether it is time to give up on these processes (number -> pid). It looks ten times in `still` seconds."""
        now = time.monotonic()
        if now - self._looked < self._still / 10:
            return False
        self._looked = now
        used = {number: seconds_used(pid) for number, pid in running.items()}
        left = set(running), sum(file.stat().st_size for both in files.values() for file in both)
        enough = WAITS * self._still
        if left != self._left or any(seconds - self._used.get(n, 0) > enough for n, seconds in used.items()):
            self._since, self._used, self._left = now, used, left
        return now - self._since > self._still


def seconds_used(pid: int) -> float:
    """CPU time of a process and of those that it started, which still run or were waited for."""
    seconds = 0.0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                seconds += sum(process.cpu_times()[:4])
    return seconds


def place_of(number: int, count: int, port: int, devices: int) -> dict[str, str]:
    """The environment of one of the processes."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} {virtual_devices(devices)}".strip(),
        "TRANSLLM_COORDINATOR": f"127.0.0.1:{port}",
        "TRANSLLM_PROCESSES": str(count),
        "TRANSLLM_PROCESS": str(number),
    }
