"""Processes that share one piece of work with this one: started, watched, and ended with it, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from transllm_jax.errors import UserError

T = TypeVar("T")

_POLL = 0.2  # seconds between two looks at how far the processes are


def share_out(
    work: Callable[..., None],
    items: Sequence[T],
    processes: int,
    *,
    given: tuple[Any, ...] = (),
    environment: dict[str, str] | None = None,
    tell: Callable[[list[T], int], None] = lambda done, count: None,
    lost: str,
) -> None:
    """Call `work(item, *given)` for every item, each in some process; the first items begin first.

    work: a function of a module; given: sent to each process once; environment: what is set in it before. tell: is told
    now and then the items that are done since, and the sum of what was given to `count`; it may raise to stop the work.
    Raises what `work` raises, and UserError with `lost`, what is to be done, where a process was killed.
    """
    # Spawned: a process with threads (of jax, of tokenizers) must not be forked.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(
        processes,
        mp_context=context,
        initializer=_begin_process,
        initargs=(counter, stop, environment or {}, given),
    )
    try:
        waiting = {pool.submit(_work, work, item): item for item in items}
        while waiting:
            ready, _ = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
            for future in ready:
                future.result()
            tell([waiting.pop(future) for future in ready], counter.value)
    except BrokenProcessPool as error:
        tell([], counter.value)  # a signal that asks to stop may have ended processes that were just beginning
        raise UserError(f"a process was killed, most likely as memory ran out: {lost}") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def count(more: int) -> None:
    """Of `work`: add to what is told of all processes; ends the work where nobody waits for it any more."""
    if _shared["stop"].is_set():
        raise _Stopped
    with _shared["counter"].get_lock():
        _shared["counter"].value += more


class _Stopped(Exception):
    """The process that asked for the work has ended its own."""


_shared: dict[str, Any] = {}  # of a process of the pool


def _begin_process(counter: Any, stop: Any, environment: dict[str, str], given: tuple[Any, ...]) -> None:
    # Ctrl-C reaches all processes of a terminal; the first one tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    _shared.update(counter=counter, stop=stop, given=given)


def _end_with_parent() -> None:
    """Without it a process whose parent was killed would work on, and then wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _work(work: Callable[..., None], item: Any) -> None:
    work(item, *_shared["given"])
