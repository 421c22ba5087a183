"""SIGINT and SIGTERM, taken between two steps: what was begun is finished and saved, then the run stops."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from transllm_jax.errors import Preempted


class Interrupt:
    """A context that turns the first signal into a request, and a second one into KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
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
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the handler may run within another print.
        os.write(2, b"\nstopping after the piece of work at hand, which is saved; once more to stop at once\n")

    def check(self, where: str) -> None:
        """Raise Preempted if a stop was asked for; called where everything so far is on disk."""
        if self.requested:
            raise Preempted(f"{where}: stopped, what is done is saved")
