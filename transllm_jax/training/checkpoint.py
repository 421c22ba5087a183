"""Checkpoints of what trains: adapters, new rows, optimizer state and step. The frozen base is never in one.

A step directory appears by an atomic rename when it is complete, so a kill at any moment leaves the previous checkpoint
standing. Each array's sums are worked out on the device before it is written and after it was read: what was damaged
on the way is found whatever the layout of devices, and the checkpoint before it is used.

Of several processes each writes and reads the parts that its devices hold, in one place that all see: a directory, or a
path on an object store.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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

# The items of a step: the arrays, and what is known of them.
_STATE, _RECORD = "state", "record"


class _Damaged(Exception):
    """A checkpoint that cannot be read, or reads as something else than was written."""


class Checkpoints:
    """Step-numbered checkpoints in one directory: the newest `keep`, and the one with the best (lowest) score.

    Of several processes all make the same calls, in the same order.
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
        _hush()
        self._directory: Any = directory if "://" in str(directory) else Path(directory).absolute()
        self._say, self._peers = say, peers or Peers()
        self._scores: dict[int, float] = {}
        # The newest that was begun, and the newest that is whole for certain.
        self._newest: int | None = None
        self._whole: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(keep, self._scores),
            create=True,
            enable_async_checkpointing=True,
            # Otherwise, where a directory cannot be made, threads wait minutes for it before the process can end.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            # What a killed process left half-written.
            cleanup_tmp_directories=True,
        )
        handlers = {_STATE: ocp.StandardCheckpointHandler(), _RECORD: ocp.JsonCheckpointHandler()}
        with _disk_full(self._directory):
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)
        self._reader = ocp.StandardCheckpointHandler()
        for step in self.steps():
            self._newest = self._whole = step
            try:
                score = self._record(step)["score"]
            except _Damaged:
                continue  # found and said when it is to be restored
            if score is not None:
                self._scores[step] = score

    def steps(self) -> list[int]:
        """The complete steps, in order."""
        found: list[int] = self._peers.share(sorted(self._manager.all_steps()))
        return found

    @property
    def whole(self) -> int | None:
        """The newest step that is complete on disk; one that is being written is not."""
        if self._whole != self._newest and not self._manager.is_saving_in_progress():
            self._whole = self._newest
        return self._whole

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest score (of equal ones the last), or None where none has a score."""
        return min(self._scores, key=lambda step: (self._scores[step], -step), default=None)

    def compare(self, steps: Iterable[int]) -> None:
        """Only the scores of these steps, and of those to come, are compared: the others are of something else."""
        alike = set(steps)
        for step in self._scores.keys() - alike:
            del self._scores[step]

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Write the state in the background; the next save, or `close`, waits for it. A score is better when lower.

        Raises OSError for a full disk; the last complete checkpoint stands.
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
        # Saving waits for the one before.
        self._whole, self._newest = self._newest, step

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state that is whole, in the structure, shapes and placement of `like`; None where there is none.

        A damaged one is named, put aside, and the one before it is used. Raises UserError when a checkpoint is of
        another shape (another rank or vocabulary), and when all are damaged.
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
            self._newest = self._whole = step
            return state
        if damaged:
            # All stay where they are: the next run must not take the stage for one that has none.
            said = "; ".join(damaged.values())
            raise UserError(f"{said}; no other is left: run the stage with --force to begin it anew")
        return None

    def read(self, step: int, like: TrainState) -> TrainState:
        """The state of a step. Raises as `restore` does, and an error where it is damaged."""
        record = self._record(step)["arrays"]
        wanted = _plain(like)
        shapes = {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in _paths(wanted)}
        found = {path: [array["shape"], array["dtype"]] for path, array in record.items()}
        if shapes != found:
            other = sorted(path for path in shapes.keys() | found.keys() if shapes.get(path) != found.get(path))
            path = next((path for path in other if path.startswith("trainable")), other[0])
            raise UserError(
                f"{self._directory}/{step}: not a checkpoint of this configuration ({path} is "
                f"{_shape(found.get(path))}, not {_shape(shapes.get(path))}); run the stage with --force to begin anew"
            )
        targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        plain: Any = None
        failed: Exception | None = None
        try:
            # Not by the manager: it would wait for a process that met the damage, and has given up.
            plain = self._reader.restore(self._place(step, _STATE), args=ocp.args.StandardRestore(targets))
        # Orbax and tensorstore raise many kinds for files that are missing, cut short or changed, plain Exception too.
        except Exception as error:
            failed = error
        # One process may find what another does not read.
        if reason := next(filter(None, self._peers.gather(None if failed is None else _reason(failed))), None):
            raise _Damaged(reason) from failed
        sums = dict(zip((path for path, _ in _paths(plain)), _sums(plain), strict=True))
        wrong = sorted(path for path, array in record.items() if sums[path] != array["sums"])
        if wrong:
            raise _Damaged(f"{wrong[0]}{f' and {len(wrong) - 1} more' if wrong[1:] else ''} differ from what was saved")
        optimizer = jax.tree.unflatten(jax.tree.structure(like.optimizer), jax.tree.leaves(plain["optimizer"]))
        state = TrainState(**{**plain, "optimizer": optimizer})
        if int(state.step) != step:
            raise _Damaged(f"it holds step {int(state.step)}")
        return state

    def wait(self) -> None:
        """Wait for what is being written. Raises OSError for a full disk."""
        with _disk_full(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for what is being written, and end. Raises OSError for a full disk."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _place(self, step: int, item: str) -> Any:
        return self._manager.directory / str(step) / item

    def _record(self, step: int) -> dict[str, Any]:
        """What is known of a step's arrays, as the primary reads it."""
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
        # Before anything is made of it: a shape that was changed is not another configuration, nor a score a better.
        return record if written == sha256_of_json(record) else "its record differs from what was saved"

    def _put_aside(self, step: int) -> None:
        if self._peers.primary:
            place = self._directory.parent / "damaged"
            place.mkdir(exist_ok=True)
            # A store has no empty directory.
            number = sum(1 for _ in place.iterdir()) if place.exists() else 0
            _move(self._directory / str(step), place / f"{step}-{number}")
        self._peers.barrier("a damaged checkpoint")
        self._scores.pop(step, None)
        self._manager.reload()


def _move(directory: Any, to: Any) -> None:
    """Give a directory another name; on a store, which has no directories, file by file."""
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


class _Kept(PreservationPolicy):
    """The newest few, and the best."""

    def __init__(self, newest: int, scores: dict[int, float]) -> None:
        self._newest, self._scores = newest, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """For each checkpoint, oldest first."""
        steps = sorted(info.step for info in checkpoints)
        kept = set(steps[-self._newest :])
        scored = [step for step in steps if step in self._scores]
        if scored:
            kept.add(min(scored, key=lambda step: (self._scores[step], -step)))
        return [info.step in kept for info in checkpoints]


def _plain(state: TrainState) -> dict[str, Any]:
    # optax's states are named tuples of its own types: stored as a numbered list, a checkpoint does not depend on them.
    leaves = jax.tree.leaves(state.optimizer)
    return {**state._asdict(), "optimizer": {f"{place:04d}": leaf for place, leaf in enumerate(leaves)}}


def _paths(plain: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(plain)
    return [("/".join(str(key.key) for key in path), leaf) for path, leaf in flat]


def _sums(plain: Any) -> list[list[int]]:
    """Two sums of each array's bits, in the order of its leaves; equal on every layout of devices.

    Each value is weighted by an odd number that its place gives. Modulo 2^32 a changed bit always changes a sum, and
    the order of adding changes nothing.
    """
    leaves = jax.tree.leaves(plain)
    shardings = [leaf.sharding for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    summed = _sum_leaves(NamedSharding(shardings[0].mesh, PartitionSpec()) if shardings else None)(leaves)
    return [[int(part) for part in pair] for pair in jax.device_get(summed)]


@lru_cache
def _sum_leaves(everywhere: NamedSharding | None) -> Callable[[list[jax.Array]], list[jax.Array]]:
    # On a mesh, where each process can read them.
    return jax.jit(lambda leaves: [_sum(leaf) for leaf in leaves], out_shardings=everywhere)


def _sum(leaf: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    # Not by reshaping to one dimension: that would gather an array that is cut over devices.
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


def _hush() -> None:
    """Pass over what tensorstore tells of a save or a read that orbax gave up: that nobody waits for its answer."""
    others = sys.unraisablehook
    if getattr(others, "__name__", "") == _hush.__name__:
        return

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)):
            others(unraisable)

    hook.__name__ = _hush.__name__
    sys.unraisablehook = hook


@contextmanager
def _disk_full(directory: Path) -> Iterator[None]:
    """Make of whatever a library says of a full disk the system's own error."""
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
