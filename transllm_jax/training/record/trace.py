"""A profiler trace of some training steps, for TensorBoard's profile plugin or xprof."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax

# Steps of a session before the trace: the first compiles, the second may still allocate memory.
BEFORE = 2


class Trace:
    """Traces `steps` steps of a session, from the third. With 0 steps it does nothing.

    directory: gets the trace, under plugins/profile. say: prints where the trace is.
    """

    def __init__(self, directory: Path, steps: int, say: Callable[[str], None]) -> None:
        self._directory, self._steps, self._say = directory, steps, say
        self._done, self._running = 0, False

    def step(self, number: int) -> AbstractContextManager[Any]:
        """A context for the dispatch of step `number`, which names it in the trace."""
        if self._steps and self._done == BEFORE and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if self._running else nullcontext()

    def dispatched(self, result: Any) -> None:
        """Call this after each dispatch, with the step's result. It ends the trace after the last traced step."""
        self._done += 1
        if self._running and self._done == BEFORE + self._steps:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End the trace, even if it is not complete."""
        if self._running:
            self._running, self._steps = False, 0
            jax.profiler.stop_trace()
            self._say(
                f"a trace of {self._done - BEFORE} steps is in {self._directory}; open it with tensorboard --logdir"
            )
