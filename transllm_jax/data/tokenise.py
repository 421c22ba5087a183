"""All shards of a source through the tokenizer, on all cores: each is written once and found again by its content."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from transllm_jax.data.array_file import sweep
from transllm_jax.data.files import Controls, OnBadRows
from transllm_jax.data.shards import Shard
from transllm_jax.data.token_cache import ShardTokens, shard_path, write_shard
from transllm_jax.data.transform import Transform
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.tokenizer import Tokenizer

_WORTH = 32 << 20  # bytes of shards below which starting processes takes longer than tokenising
_POLL = 0.2  # seconds between two looks at how far the processes are

# Is told (bytes of the shards that are done, items of all), and may raise to stop.
OnProgress = Callable[[int, int], None]


def tokenise(
    shards: Sequence[Shard],
    transform: Transform,
    tokenizer: Tokenizer,
    controls: Controls,
    directory: Path,
    *,
    tell: OnProgress = lambda done, items: None,
    processes: int | None = None,
    on_bad_rows: OnBadRows = "refuse",
) -> list[ShardTokens]:
    """The tokens of every shard, in their order; what `directory` holds already is not made again.

    Several shards go to several processes, by default to as many as there are cores; one shard is encoded on all cores.
    `tell` may raise to stop the work: whole shards stay. controls, on_bad_rows: as the shards' reading has them. Raises
    UserError for what a shard's reader refuses.
    """
    paths = {shard: shard_path(directory, shard, transform, tokenizer.fingerprint) for shard in shards}
    # Of files that are equal in name and content, one.
    todo = list({path: shard for shard, path in paths.items() if not path.is_file()}.values())
    done = sum(shard.size for shard in shards) - sum(shard.size for shard in todo)
    cores = os.cpu_count() or 1
    if todo:
        sweep(directory)
    if processes is None:
        # A size of 0 is not known.
        large = any(shard.size == 0 for shard in todo) or sum(shard.size for shard in todo) >= _WORTH
        processes = cores if large else 1
    processes = min(processes, len(todo))
    items = 0

    def more(count: int) -> None:
        nonlocal items
        items += count
        tell(done, items)

    if processes <= 1:
        for shard in todo:
            write_shard(paths[shard], shard, transform, tokenizer, controls, more, on_bad_rows)
            done += shard.size
            tell(done, items)
    else:
        _in_processes(todo, paths, (transform, tokenizer, controls, on_bad_rows), done, tell, processes, cores)
    return [ShardTokens(paths[shard], shard.name) for shard in shards]


def _in_processes(
    todo: Sequence[Shard],
    paths: dict[Shard, Path],
    given: tuple[Transform, Tokenizer, Controls, OnBadRows],
    done: int,
    tell: OnProgress,
    processes: int,
    cores: int,
) -> None:
    # Spawned: a process with threads (of jax, of tokenizers) must not be forked.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    threads = max(cores // processes, 1)
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_begin_process, initargs=(counter, stop, threads, *given)
    )
    try:
        # The largest first, so that the last one does not keep one core busy alone.
        ordered = sorted(todo, key=lambda shard: -shard.size)
        waiting = {pool.submit(_write_in_process, shard, paths[shard]): shard for shard in ordered}
        while waiting:
            ready, _ = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
            for future in ready:
                future.result()
                done += waiting.pop(future).size
            tell(done, counter.value)
    except BrokenProcessPool as error:
        tell(done, counter.value)  # a signal that asks to stop may have ended processes that were just beginning
        raise UserError(
            "a process that tokenised was killed, most likely as memory ran out: whole shards stay; run again, with "
            "more memory, or with smaller files"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """The process that asked for the tokens has ended its work."""


_shared: dict[str, Any] = {}  # of a process of the pool


def _begin_process(
    counter: Any,
    stop: Any,
    threads: int,
    transform: Transform,
    tokenizer: Tokenizer,
    controls: Controls,
    on_bad_rows: OnBadRows,
) -> None:
    # Ctrl-C reaches all processes of a terminal; the first one tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    _shared.update(counter=counter, stop=stop, transform=transform, tokenizer=tokenizer)
    _shared.update(controls=controls, on_bad_rows=on_bad_rows)


def _end_with_parent() -> None:
    """Without it a process whose parent was killed would work on, and then wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _write_in_process(shard: Shard, path: Path) -> None:
    def more(count: int) -> None:
        if _shared["stop"].is_set():
            raise _Stopped
        with _shared["counter"].get_lock():
            _shared["counter"].value += count

    transform, tokenizer = _shared["transform"], _shared["tokenizer"]
    write_shard(path, shard, transform, tokenizer, _shared["controls"], more, _shared["on_bad_rows"])
