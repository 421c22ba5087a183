"""SIGINT, SIGTERM and SIGHUP: the run finishes the work at hand, saves it and stops."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Any

from transllm_jax.errors import Preempted


class Interrupt:
    """A context that turns the first signal into a request, and a second SIGINT into KeyboardInterrupt.

    A second SIGTERM changes nothing: a cluster sends it to the job, and then to each of its processes. SIGHUP comes
    when the terminal is closed or its connection breaks; under `nohup`, which ignores it, it stays ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._by_hand = False
        self._previous: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> Interrupt:
        # After a terminal has closed, isatty no longer tells that it was one.
        self._terminals = [output for output in (1, 2) if os.isatty(output)]
        wanted = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        for number in wanted:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._by_hand:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            self._leave_terminals()
        told, self.requested = self.requested, True
        self._by_hand = self._by_hand or number == signal.SIGINT
        if not told:
            # Not print: the handler may run within another print.
            more = b"once more" if self._by_hand else b"Ctrl-C twice"
            line = b"\nstopping after the piece of work at hand, which is saved; " + more + b" to stop at once\n"
            with contextlib.suppress(OSError):
                os.write(2, line)

    def _leave_terminals(self) -> None:
        """Send the output to /dev/null: writing to a closed terminal would raise and end the work at hand."""
        null = os.open(os.devnull, os.O_WRONLY)
        for output in self._terminals:
            os.dup2(null, output)
        os.close(null)

    def check(self, where: str) -> None:
        """Raise Preempted if a stop was requested. Call it where everything so far is on disk."""
        if self.requested:
            raise Preempted(f"{where}: stopped, what is done is saved")
