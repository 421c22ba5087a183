"""All shards of a source through the tokenizer, on all cores: each is written once and found again by its content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transllm_jax.choices import Controls, OnBadRows
from transllm_jax.data.pool import cores, count, share_out
from transllm_jax.data.read.shards import Shard
from transllm_jax.data.rows.token_cache import ShardTokens, shard_path, write_shard
from transllm_jax.data.rows.transform import Transform
from transllm_jax.disk import sweep
from transllm_jax.tokenizer.tokenizer import Tokenizer

_WORTH = 32 << 20  # bytes of shards below which starting processes takes longer than tokenising

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
    available = cores()
    if todo:
        sweep(directory)
    if processes is None:
        # A size of 0 is not known.
        large = any(shard.size == 0 for shard in todo) or sum(shard.size for shard in todo) >= _WORTH
        processes = available if large else 1
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
        _in_processes(todo, paths, (transform, tokenizer, controls, on_bad_rows), done, tell, processes, available)
    return [ShardTokens(paths[shard], shard.name) for shard in shards]


def _in_processes(
    todo: Sequence[Shard],
    paths: dict[Shard, Path],
    given: tuple[Transform, Tokenizer, Controls, OnBadRows],
    done: int,
    tell: OnProgress,
    processes: int,
    available: int,
) -> None:
    def told(finished: list[Shard], items: int) -> None:
        nonlocal done
        done += sum(shard.size for shard in finished)
        tell(done, items)

    share_out(
        _write_in_process,
        # The largest first, so that the last one does not keep one core busy alone.
        sorted(todo, key=lambda shard: -shard.size),
        processes,
        given=(paths, *given),
        environment={"RAYON_NUM_THREADS": str(max(available // processes, 1))},
        tell=told,
        lost="whole shards stay; run again, with more memory, or with smaller files",
    )


def _write_in_process(
    shard: Shard,
    paths: dict[Shard, Path],
    transform: Transform,
    tokenizer: Tokenizer,
    controls: Controls,
    on_bad_rows: OnBadRows,
) -> None:
    write_shard(paths[shard], shard, transform, tokenizer, controls, count, on_bad_rows)
