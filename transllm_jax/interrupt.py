"""SIGINT and SIGTERM, taken between two steps: what was begun is finished and saved, then the run stops."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from transllm_jax.errors import Preempted


class Interrupt:
    """A context that turns the first signal into a request, and a second SIGINT into KeyboardInterrupt.

    A second SIGTERM means nothing new: a cluster sends it to the job, and then to each of its processes.
    """

    def __init__(self) -> None:
        self.requested = False
        self._by_hand = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
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
        told, self.requested = self.requested, True
        self._by_hand = self._by_hand or number == signal.SIGINT
        if not told:
            # Not print: the handler may run within another print.
            more = b"once more" if self._by_hand else b"Ctrl-C twice"
            os.write(2, b"\nstopping after the piece of work at hand, which is saved; " + more + b" to stop at once\n")

    def check(self, where: str) -> None:
        """Raise Preempted if a stop was asked for; called where everything so far is on disk."""
        if self.requested:
            raise Preempted(f"{where}: stopped, what is done is saved")
