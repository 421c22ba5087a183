"""Runs a function on many items in worker processes, which end when this process ends, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from transllm_jax.errors import UserError

T = TypeVar("T")

_POLL = 0.2  # seconds between two progress updates


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """How many cores this process may use: a job or a container often gets fewer than the machine has.

    cgroup: where the kernel shows a container's CPU quota.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # cgroup v2 has "QUOTA PERIOD" or "max PERIOD" in one file; v1 has a file for each, and -1 for no quota.
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, " ".join((cgroup / name).read_text() for name in names).split())
            if quota > 0 and period > 0:
                return min(allowed, -(-quota // period))
    return allowed


def run_in_processes(
    work: Callable[..., None],
    items: Sequence[T],
    processes: int,
    *,
    arguments: tuple[Any, ...] = (),
    environment: dict[str, str] | None = None,
    on_progress: Callable[[list[T], int], None] = lambda finished, progress: None,
    if_killed: str,
) -> None:
    """Call `work(item, *arguments)` for every item in worker processes; items start in their order.

    work: a module-level function. arguments: sent to each process once. environment: variables set in each process
    first. on_progress: called now and then with the items finished since the last call, and the sum of all values given
    to `add_progress`; it may raise to stop the work. if_killed: what to do if a process was killed, for the message.
    Raises whatever `work` raises, and UserError if a process was killed.
    """
    # Spawned: a process with threads (of jax, of tokenizers) must not be forked.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(
        processes,
        mp_context=context,
        initializer=_begin_process,
        initargs=(counter, stop, environment or {}, arguments),
    )
    try:
        waiting = {pool.submit(_work, work, item): item for item in items}
        while waiting:
            ready, _ = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
            for future in ready:
                future.result()
            on_progress([waiting.pop(future) for future in ready], counter.value)
    except BrokenProcessPool as error:
        on_progress([], counter.value)  # a signal that asks to stop may have ended processes that were just beginning
        raise UserError(f"a process was killed, most likely because memory ran out: {if_killed}") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def add_progress(more: int) -> None:
    """Called by `work`: add to the sum that `on_progress` gets. Ends the work if the parent has stopped it."""
    if _shared["stop"].is_set():
        raise _Stopped
    with _shared["counter"].get_lock():
        _shared["counter"].value += more


class _Stopped(Exception):
    """The parent process has stopped the work."""


_shared: dict[str, Any] = {}  # set in each worker process


def _begin_process(counter: Any, stop: Any, environment: dict[str, str], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C and a closing terminal signal all processes of the terminal; the parent alone stops its workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    _shared.update(counter=counter, stop=stop, arguments=arguments)


def _end_with_parent() -> None:
    """End this process when its parent ends: else it would finish its work and then wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _work(work: Callable[..., None], item: Any) -> None:
    work(item, *_shared["arguments"])
