"""How a command that writes one thing reports progress, and stops at once with nothing half-written."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer

from transllm_jax.errors import PREEMPTED

if TYPE_CHECKING:
    from transllm_jax.progress import Progress


@contextmanager
def working() -> Iterator[Progress]:
    """Progress for a command that SIGINT or SIGTERM stops at once; nothing half-written is left."""
    from transllm_jax.progress import Progress

    progress = Progress()

    def stop(number: int, frame: FrameType | None) -> None:
        # Recorded as well as raised: a library's callback may be running that swallows exceptions.
        progress.stopped = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with progress:
            yield progress
    except KeyboardInterrupt:
        # Caught here because typer would exit with its own code.
        print("stopped, nothing was written", file=sys.stderr)
        raise typer.Exit(PREEMPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
