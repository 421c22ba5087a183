"""Checkpoints of what trains: adapters, new rows, optimizer state and step. The frozen base is never in one.

The only module that knows orbax. A step directory appears by an atomic rename when it is complete, so a kill at any
moment leaves the previous checkpoint standing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from transllm_jax.errors import UserError
from transllm_jax.training.step import TrainState


class Checkpoints:
    """Step-numbered checkpoints in one directory; the newest `keep` are retained."""

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, state: TrainState) -> None:
        """Write the state in the background; the next save, or `close`, waits for it."""
        step = int(state.step)
        if step != self.latest():
            self._manager.save(step, args=ocp.args.StandardSave(_plain(state)))

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, in the structure, shapes and placement of `like`.

        Raises UserError when the checkpoint is of another shape (another rank or vocabulary).
        """
        step = self.latest()
        wanted = _plain(like)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        try:
            plain = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
        except ValueError as error:
            raise UserError(
                f"{self._manager.directory}/{step}: not a checkpoint of this configuration "
                f"({str(error).splitlines()[0]}); run with --force for the stage to begin it anew"
            ) from error
        leaves = jax.tree.leaves(plain["optimizer"])
        optimizer = jax.tree.unflatten(jax.tree.structure(like.optimizer), leaves)
        return TrainState(plain["trainable"], optimizer, jnp.int32(plain["step"]))

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _plain(state: TrainState) -> dict[str, Any]:
    # optax's states are named tuples of its own types: stored as a numbered list, a checkpoint does not depend on them.
    leaves = jax.tree.leaves(state.optimizer)
    return {
        "trainable": state.trainable,
        "optimizer": {f"{place:04d}": leaf for place, leaf in enumerate(leaves)},
        "step": state.step,
    }


# In a directory of arrays: the SHA-256 of each. Written last, so that what lacks it is not complete.
DIGESTS = "sha256.json"


def save_arrays(directory: Path, arrays: dict[str, Any]) -> None:
    """Write a flat dictionary of arrays: a stage's output, its adapters and new rows."""
    plain = {path: np.asarray(value) for path, value in arrays.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), plain, force=True)
    digests = {path: _digest(value) for path, value in plain.items()}
    (directory / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def load_arrays(directory: Path) -> dict[str, np.ndarray]:
    """Read what `save_arrays` wrote, as numpy arrays on the host.

    Raises UserError if it is not there, not complete, or not what was written.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such adapters; run the stage that writes them first")
    mend = "run the stage that wrote it again with --force, or copy or convert it again"
    try:
        digests = json.loads((directory / DIGESTS).read_text(encoding="utf-8"))
        with ocp.PyTreeCheckpointer() as checkpointer:
            restore = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in digests}
            arrays: dict[str, np.ndarray] = checkpointer.restore(directory.absolute(), restore_args=restore)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # orbax's for files that end early
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{directory} is not complete or damaged ({reason}); {mend}") from error
    wrong = sorted(path for path in digests if path not in arrays or _digest(arrays[path]) != digests[path])
    if wrong or arrays.keys() != digests.keys():
        raise UserError(f"{directory}: {', '.join(wrong) or 'its arrays'} differ from what was written; {mend}")
    return arrays
