"""How a command works that writes one thing: with a voice, and stopped at once without a trace."""

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
    """A voice for a command that is stopped by SIGINT or SIGTERM at once, and leaves nothing half-written."""
    from transllm_jax.progress import Progress

    progress = Progress()

    def stop(number: int, frame: FrameType | None) -> None:
        # Noted as well as raised: a library's callback may be running, which swallows what is raised in it.
        progress.stopped = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with progress:
            yield progress
    except KeyboardInterrupt:
        # Caught here: typer would make its own exit code of it.
        print("stopped, nothing was written", file=sys.stderr)
        raise typer.Exit(PREEMPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
