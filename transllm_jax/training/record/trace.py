"""A trace of some training steps, which TensorBoard's profile plugin and xprof open."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax

# Steps of a session before the trace: the first compiles, the second may still allocate.
BEFORE = 2


class Trace:
    """Traces `steps` steps of a session, after the second. Without steps it does nothing.

    directory: where the trace lies in the end, below plugins/profile. say: is told so.
    """

    def __init__(self, directory: Path, steps: int, say: Callable[[str], None]) -> None:
        self._directory, self._steps, self._say = directory, steps, say
        self._done, self._running = 0, False

    def step(self, number: int) -> AbstractContextManager[Any]:
        """Around the dispatch of step `number`; its name in the trace."""
        if self._steps and self._done == BEFORE and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if self._running else nullcontext()

    def dispatched(self, result: Any) -> None:
        """A step was dispatched, with this result. Ends the trace after the last."""
        self._done += 1
        if self._running and self._done == BEFORE + self._steps:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End a trace that is not complete, too."""
        if self._running:
            self._running, self._steps = False, 0
            jax.profiler.stop_trace()
            self._say(
                f"a trace of {self._done - BEFORE} steps lies in {self._directory}: tensorboard --logdir opens it"
            )
