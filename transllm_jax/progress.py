"""Progress of long work: a live bar in a terminal, an occasional line in a log.

All output goes through the console made here, which prints every string literally.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

# Seconds between a bar's lines in a log.
LOG_EVERY = 15.0


def plain_console(**options: Any) -> Console:
    """A console that prints strings literally, in tables too: `[ab]` is no style, and `:tiger:` no emoji.

    Paths, titles and a model's output contain such text. Pass a style separately: `print(text, style="bold")` or
    `Text(text, "bold")`. options: those of rich's Console.
    """
    return _PipeConsole(markup=False, emoji=False, highlight=False, **options)


class _PipeConsole(Console):
    """A console whose reader may close the pipe (`| head`, a `tee` that was killed) without stopping the work.

    rich itself would end the process with exit code 1, without a message or a checkpoint.
    """

    def on_broken_pipe(self) -> None:
        """Discard all further output, and say so on stderr."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        with contextlib.suppress(OSError):
            os.write(2, b"nobody reads this output any more; the work goes on without it\n")


class Bar:
    """One piece of work with a known total."""

    def __init__(self, owner: Progress, name: str, total: int, done: int, unit: str) -> None:
        self._owner, self._name, self._total, self._unit = owner, name, total, unit
        self._done, self._tokens, self._bytes = done, 0, 0
        self._first, self._started = done, time.monotonic()
        self._logged = self._started
        self._task: TaskID | None = None
        if owner.live is not None:
            self._task = owner.live.add_task(name, total=total, completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        """Show how much is done, with a short note (a loss, a speed)."""
        was_complete, self._done = self._done == self._total, done
        if self._task is not None and self._owner.live is not None:
            self._owner.live.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY or (done == self._total and not was_complete):
            self._logged = now
            left = (now - self._started) / max(done - self._first, 1) * (self._total - done)
            self._owner.say(f"  {self._name} {done}/{self._total} {self._unit}  {note}  {_clock(left)} left")

    def tokens(self, count: int) -> None:
        """Count `count` more generated tokens; the bar shows tokens a second."""
        self._tokens += count
        elapsed = max(time.monotonic() - self._started, 1e-3)
        self.update(self._done, f"{self._tokens / elapsed:,.0f} tokens/s")

    def add(self, size: int) -> None:
        """Count `size` more bytes as done; the bar shows megabytes a second (see `Progress.bytes`)."""
        self._bytes += size
        elapsed = max(time.monotonic() - self._started, 1e-3)
        self.update(min(self._bytes // 10**6, self._total), f"{self._bytes / elapsed / 1e6:,.0f} MB/s")

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._task is not None and self._owner.live is not None:
            self._owner.live.remove_task(self._task)
            self._task = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Progress:
    """All of a run's output to the console: messages and bars."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or plain_console(quiet=quiet)
        self.live: RichProgress | None = None
        self.stopped = False
        if self.console.is_terminal and not quiet:
            self.live = RichProgress(
                TextColumn("  {task.description}", markup=False),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[note]}", style="dim", markup=False),
                console=self.console,
                transient=True,
            )

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def check(self) -> None:
        """Raise KeyboardInterrupt if `stopped` is set, for places where a raised one may have been swallowed."""
        if self.stopped:
            raise KeyboardInterrupt

    def say(self, message: RenderableType, *, style: str | None = None) -> None:
        """Print a line literally (or any rich renderable); style: such as `yellow` for a warning."""
        self.console.print(message, style=style, soft_wrap=isinstance(message, (str, Text)))

    def task(self, name: str, *, total: int, done: int = 0, unit: str = "item") -> Bar:
        """A bar for a new piece of work."""
        return Bar(self, name, total, done, f"{unit}s")

    def bytes(self, name: str, total: int) -> Bar:
        """A bar for a new piece of work of `total` bytes, shown in megabytes."""
        return Bar(self, name, max(total // 10**6, 1), 0, "MB")


class Phases:
    """Work in phases, each with the share that is done: one bar after another in a terminal, nothing in a log."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar: Bar | None = None
        self._phase = ""

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, phase: str, share: float) -> None:
        """Show that this share of a phase is done, from 0 to 1."""
        if self._progress.live is None:
            return
        if phase != self._phase or self._bar is None:
            self.__exit__()
            self._phase, self._bar = phase, self._progress.task(phase, total=100, unit="percent")
        self._bar.update(min(round(100 * share), 100))


def counted(number: int, noun: str) -> str:
    """A number of things in words: `1 line`, `2,000 lines`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
