"""Tokenises all shards of a source on all cores; each is written once and found again by its content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transllm_jax.choices import Controls, OnBadRows
from transllm_jax.data.pool import add_progress, cores, run_in_processes
from transllm_jax.data.read.shards import Shard
from transllm_jax.data.rows.token_cache import ShardTokens, shard_path, write_shard
from transllm_jax.data.rows.transform import Transform
from transllm_jax.disk import sweep
from transllm_jax.tokenizer.tokenizer import Tokenizer

_WORTH = 32 << 20  # bytes of shards below which starting processes takes longer than tokenising

# Called with (bytes of the shards that are done, items so far); may raise to stop the work.
OnProgress = Callable[[int, int], None]


def tokenise(
    shards: Sequence[Shard],
    transform: Transform,
    tokenizer: Tokenizer,
    controls: Controls,
    directory: Path,
    *,
    on_progress: OnProgress = lambda done, items: None,
    processes: int | None = None,
    on_bad_rows: OnBadRows = "refuse",
) -> list[ShardTokens]:
    """The tokens of every shard, in order; shards that `directory` has already are not tokenised again.

    Several shards are divided among `processes`, by default one per core; a single shard is encoded on all cores.
    on_progress may raise to stop the work: finished shards stay. controls, on_bad_rows: as in the shards' `Reading`.
    Raises UserError for whatever a shard's reader refuses.
    """
    paths = {shard: shard_path(directory, shard, transform, tokenizer.fingerprint) for shard in shards}
    # Files of the same name and content are tokenised once.
    todo = list({path: shard for shard, path in paths.items() if not path.is_file()}.values())
    done = sum(shard.size for shard in shards) - sum(shard.size for shard in todo)
    available = cores()
    if todo:
        sweep(directory)
    if processes is None:
        # A size of 0 means that it is unknown.
        large = any(shard.size == 0 for shard in todo) or sum(shard.size for shard in todo) >= _WORTH
        processes = available if large else 1
    processes = min(processes, len(todo))
    items = 0

    def on_items(more: int) -> None:
        nonlocal items
        items += more
        on_progress(done, items)

    if processes <= 1:
        for shard in todo:
            write_shard(paths[shard], shard, transform, tokenizer, controls, on_items, on_bad_rows)
            done += shard.size
            on_progress(done, items)
    else:
        _in_processes(
            todo, paths, (transform, tokenizer, controls, on_bad_rows), done, on_progress, processes, available
        )
    return [ShardTokens(paths[shard], shard.name) for shard in shards]


def _in_processes(
    todo: Sequence[Shard],
    paths: dict[Shard, Path],
    settings: tuple[Transform, Tokenizer, Controls, OnBadRows],
    done: int,
    on_progress: OnProgress,
    processes: int,
    available: int,
) -> None:
    def advance(finished: list[Shard], items: int) -> None:
        nonlocal done
        done += sum(shard.size for shard in finished)
        on_progress(done, items)

    run_in_processes(
        _write_in_process,
        # The largest first, so that no core is left working alone on a large one at the end.
        sorted(todo, key=lambda shard: -shard.size),
        processes,
        arguments=(paths, *settings),
        environment={"RAYON_NUM_THREADS": str(max(available // processes, 1))},
        on_progress=advance,
        if_killed="whole shards stay; run again, with more memory, or with smaller files",
    )


def _write_in_process(
    shard: Shard,
    paths: dict[Shard, Path],
    transform: Transform,
    tokenizer: Tokenizer,
    controls: Controls,
    on_bad_rows: OnBadRows,
) -> None:
    write_shard(paths[shard], shard, transform, tokenizer, controls, add_progress, on_bad_rows)
