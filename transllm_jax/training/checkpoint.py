"""Checkpoints of the training state: adapters, new rows, optimizer state and step, but never the frozen base.

A step directory appears by an atomic rename when it is complete, so a kill at any moment leaves the previous checkpoint
intact. Checksums of each array are computed on the device before it is written and after it is read, and are the same
on every layout of devices. If they differ, the checkpoint is damaged and the one before it is used.

With several processes, each writes and reads the shards of its own devices. All use one place, which all can see: a
directory, or a path on an object store.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from transllm_jax.disk import sha256_of_json
from transllm_jax.errors import UserError
from transllm_jax.hosts.runtime import Peers
from transllm_jax.training.step import TrainState

# The items of a step: the arrays, and a record of their shapes, dtypes and checksums and of the step's score.
_STATE, _RECORD = "state", "record"


class _Damaged(Exception):
    """A checkpoint that cannot be read, or differs from what was written."""


class Checkpoints:
    """Step-numbered checkpoints in one directory: the newest `keep`, and the one with the best (lowest) score.

    If there are several processes, all make the same calls in the same order.
    """

    def __init__(
        self,
        directory: Any,
        *,
        keep: int = 2,
        say: Callable[[str], None] = lambda message: None,
        peers: Peers | None = None,
    ) -> None:
        """directory: a Path that all processes see, or an epath.Path on a store."""
        _ignore_abandoned_saves()
        self._directory: Any = directory if "://" in str(directory) else Path(directory).absolute()
        self._say, self._peers = say, peers or Peers()
        self._scores: dict[int, float] = {}
        # The newest step whose save was started, and the newest that is known to be complete on disk.
        self._newest: int | None = None
        self._complete: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(keep, self._scores),
            create=True,
            enable_async_checkpointing=True,
            # Otherwise, if a directory cannot be made, threads wait for it for minutes before the process can end.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            # Removes what a killed process left half-written.
            cleanup_tmp_directories=True,
        )
        handlers = {_STATE: ocp.StandardCheckpointHandler(), _RECORD: ocp.JsonCheckpointHandler()}
        with _disk_full(self._directory):
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)
        self._reader = ocp.StandardCheckpointHandler()
        for step in self.steps():
            self._newest = self._complete = step
            try:
                score = self._record(step)["score"]
            except _Damaged:
                continue  # reported when the step is restored
            if score is not None:
                self._scores[step] = score

    def steps(self) -> list[int]:
        """The complete steps, in order."""
        steps: list[int] = self._peers.share(sorted(self._manager.all_steps()))
        return steps

    @property
    def newest_complete(self) -> int | None:
        """The newest step that is complete on disk; a step that is still being written does not count."""
        if self._complete != self._newest and not self._manager.is_saving_in_progress():
            self._complete = self._newest
        return self._complete

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest score (the last of equal ones), or None if no step has a score."""
        return min(self._scores, key=lambda step: (self._scores[step], -step), default=None)

    def compare_only(self, steps: Iterable[int]) -> None:
        """Forget the scores of all other steps: they measure something else. Scores of later saves count."""
        for step in self._scores.keys() - set(steps):
            del self._scores[step]

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Write the state in the background; the next save, or `close`, waits for it. A lower score is better.

        Raises OSError if the disk is full; the last complete checkpoint is kept.
        """
        step = int(state.step)
        if step == self.latest():
            return
        plain = _plain(state)
        arrays = {
            path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sums": sums}
            for (path, leaf), sums in zip(_paths(plain), _sums(plain), strict=True)
        }
        if score is not None:
            self._scores[step] = score
        record: dict[str, Any] = {"arrays": arrays, "score": score}
        record["sha256"] = sha256_of_json(record)
        items = {_STATE: ocp.args.StandardSave(plain), _RECORD: ocp.args.JsonSave(record)}
        with _disk_full(self._directory):
            self._manager.save(step, args=ocp.args.Composite(**items))
        # This save has waited for the one before, which is complete now.
        self._complete, self._newest = self._newest, step

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest intact state, in the structure, shapes and placement of `like`; None if there is no checkpoint.

        A damaged checkpoint is reported and put aside, and the one before it is used. Raises UserError if a checkpoint
        has other shapes (another rank or vocabulary), and if all are damaged.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                state = self.read(step, like)
            except _Damaged as error:
                damaged[step] = f"{self._directory}/{step} is damaged ({error})"
                continue
            for other, message in damaged.items():
                self._put_aside(other)
                self._say(f"{message}; it was put aside, step {step} is used")
            self._newest = self._complete = step
            return state
        if damaged:
            # None is put aside: otherwise the next run would find no checkpoint and silently train from step 0.
            said = "; ".join(damaged.values())
            raise UserError(f"{said}; no other is left: run the stage with --force to redo it")
        return None

    def read(self, step: int, like: TrainState) -> TrainState:
        """The state of a step. Raises as `restore` does, and an error if it is damaged."""
        record = self._record(step)["arrays"]
        wanted = _plain(like)
        self._check_shapes(step, record, wanted)
        plain = self._read_arrays(step, wanted)
        sums = dict(zip((path for path, _ in _paths(plain)), _sums(plain), strict=True))
        wrong = sorted(path for path, array in record.items() if sums[path] != array["sums"])
        if wrong:
            raise _Damaged(f"{wrong[0]}{f' and {len(wrong) - 1} more' if wrong[1:] else ''} differ from what was saved")
        optimizer = jax.tree.unflatten(jax.tree.structure(like.optimizer), jax.tree.leaves(plain["optimizer"]))
        state = TrainState(**{**plain, "optimizer": optimizer})
        if int(state.step) != step:
            raise _Damaged(f"it holds step {int(state.step)}")
        return state

    def _check_shapes(self, step: int, record: Mapping[str, Any], wanted: Any) -> None:
        """Raises UserError if the arrays in a step's record are not those of `wanted`."""
        shapes = {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in _paths(wanted)}
        found = {path: [array["shape"], array["dtype"]] for path, array in record.items()}
        if shapes != found:
            other = sorted(path for path in shapes.keys() | found.keys() if shapes.get(path) != found.get(path))
            path = next((path for path in other if path.startswith("trainable")), other[0])
            raise UserError(
                f"{self._directory}/{step}: not a checkpoint of this configuration ({path} is "
                f"{_shape(found.get(path))}, not {_shape(shapes.get(path))}); run the stage with --force to redo it"
            )

    def _read_arrays(self, step: int, wanted: Any) -> Any:
        """The arrays of a step, placed as those of `wanted`. Raises _Damaged in all processes if one cannot read."""
        targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        plain: Any = None
        failed: Exception | None = None
        try:
            # Not by the manager: it would wait for a process that has met the damage and given up.
            plain = self._reader.restore(self._place(step, _STATE), args=ocp.args.StandardRestore(targets))
        # For missing, truncated or changed files orbax and tensorstore raise many types, even plain Exception.
        except Exception as error:
            failed = error
        # A process may read only intact shards while another meets the damage.
        if reason := next(filter(None, self._peers.gather(None if failed is None else _reason(failed))), None):
            raise _Damaged(reason) from failed
        return plain

    def wait(self) -> None:
        """Wait for the save in progress. Raises OSError if the disk is full."""
        with _disk_full(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the save in progress, and close. Raises OSError if the disk is full."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _place(self, step: int, item: str) -> Any:
        return self._manager.directory / str(step) / item

    def _record(self, step: int) -> dict[str, Any]:
        """The record of a step, read by the primary and shared with all processes. Raises _Damaged."""
        found = self._peers.share(self._read_record(step) if self._peers.primary else None)
        if isinstance(found, str):
            raise _Damaged(found)
        record: dict[str, Any] = found
        return record

    def _read_record(self, step: int) -> dict[str, Any] | str:
        """The record, or what is wrong with it."""
        try:
            record = dict(ocp.JsonCheckpointHandler().restore(self._place(step, _RECORD)))
            written = record.pop("sha256")
        except Exception as error:
            return _reason(error)
        # Checked before any use, so that a damaged shape or score is not taken for another configuration or a better
        # step.
        return record if written == sha256_of_json(record) else "its record differs from what was saved"

    def _put_aside(self, step: int) -> None:
        if self._peers.primary:
            place = self._directory.parent / "damaged"
            place.mkdir(exist_ok=True)
            # On a store an empty directory does not exist.
            number = sum(1 for _ in place.iterdir()) if place.exists() else 0
            _move(self._directory / str(step), place / f"{step}-{number}")
        self._peers.barrier("a damaged checkpoint")
        self._scores.pop(step, None)
        self._manager.reload()


def _move(directory: Any, to: Any) -> None:
    """Rename a directory; on a store, which has no directories, move file by file."""
    if isinstance(directory, Path) and "://" not in str(directory):
        os.replace(directory, to)
        return
    to.mkdir(exist_ok=True)
    for path in directory.iterdir():
        if path.is_dir():
            _move(path, to / path.name)
        else:
            path.copy(to / path.name, overwrite=True)
    with suppress(FileNotFoundError):
        directory.rmtree()


class _NewestAndBest(PreservationPolicy):
    """Keeps the newest few checkpoints, and the one with the lowest score."""

    def __init__(self, newest: int, scores: dict[int, float]) -> None:
        self._newest, self._scores = newest, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether to keep each checkpoint, oldest first."""
        steps = sorted(info.step for info in checkpoints)
        kept = set(steps[-self._newest :])
        scored = [step for step in steps if step in self._scores]
        if scored:
            kept.add(min(scored, key=lambda step: (self._scores[step], -step)))
        return [info.step in kept for info in checkpoints]


def _plain(state: TrainState) -> dict[str, Any]:
    # optax's states are named tuples of its own types. Leaves by number keep a checkpoint independent of these types.
    leaves = jax.tree.leaves(state.optimizer)
    return {**state._asdict(), "optimizer": {f"{place:04d}": leaf for place, leaf in enumerate(leaves)}}


def _paths(plain: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(plain)
    return [("/".join(str(key.key) for key in path), leaf) for path, leaf in flat]


def _sums(plain: Any) -> list[list[int]]:
    """Two checksums of each array's bits, in the order of the leaves; equal on every layout of devices.

    Each value is weighted by an odd number that depends on its position. In sums modulo 2^32, a single changed bit
    always changes the sum, and the order of addition does not matter.
    """
    leaves = jax.tree.leaves(plain)
    shardings = [leaf.sharding for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    summed = _sum_leaves(NamedSharding(shardings[0].mesh, PartitionSpec()) if shardings else None)(leaves)
    return [[int(part) for part in pair] for pair in jax.device_get(summed)]


@lru_cache
def _sum_leaves(replicated: NamedSharding | None) -> Callable[[list[jax.Array]], list[jax.Array]]:
    # On a mesh the sums are replicated, so that each process can read them.
    return jax.jit(lambda leaves: [_sum(leaf) for leaf in leaves], out_shardings=replicated)


def _sum(leaf: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    # Not by reshaping to one dimension: that would gather a sharded array.
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    first = (place * np.uint32(2654435761)) | np.uint32(1)
    second = ((place ^ (place >> 15)) * np.uint32(2246822519) + np.uint32(0x9E3779B9)) | np.uint32(1)
    return jnp.stack([jnp.sum(bits * first, dtype=jnp.uint32), jnp.sum(bits * second, dtype=jnp.uint32)])


def _shape(found: list[Any] | None) -> str:
    return "absent" if found is None else f"{found[1]} {found[0]}"


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _ignore_abandoned_saves() -> None:
    """Suppress what is said of a save or read that orbax gave up, on a full disk for example: its error is raised.

    That is an unraisable error of tensorstore, which finishes it, and a warning of Python, which never began a part.
    """
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    others = sys.unraisablehook
    if getattr(others, "__name__", "") == _ignore_abandoned_saves.__name__:
        return

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)):
            others(unraisable)

    hook.__name__ = _ignore_abandoned_saves.__name__
    sys.unraisablehook = hook


@contextmanager
def _disk_full(directory: Path) -> Iterator[None]:
    """Raise OSError(ENOSPC) in place of whatever error a library raises for a full disk."""
    try:
        yield
    except Exception as error:
        seen: BaseException | None = error
        while seen is not None:
            full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or os.strerror(errno.ENOSPC) in str(seen) or os.strerror(errno.EDQUOT) in str(seen):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from error
            seen = seen.__cause__ or seen.__context__
        raise
