"""What a stage leaves: its adapters and new rows as a flat dictionary of arrays on disk, each with its SHA-256.

They are written and read by one process, whatever the others do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from transllm_jax.errors import UserError

# In a directory of arrays: the SHA-256 of each. Written last, so that what lacks it is not complete.
DIGESTS = "sha256.json"


def on_host(array: Any) -> np.ndarray:
    """An array's values. One that is cut over the devices of several processes is gathered, by all of them."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        sharding = array.sharding
        assert isinstance(sharding, NamedSharding)
        array = _gather(NamedSharding(sharding.mesh, PartitionSpec()))(array)
    return np.asarray(array)


@lru_cache
def _gather(everywhere: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=everywhere)


def all_on_host(arrays: Mapping[str, Any], *, keep: bool = True) -> dict[str, np.ndarray]:
    """Arrays' values, gathered one after the other. keep: whether this process wants them, or only has a part in it."""
    found = {}
    for path, array in arrays.items():
        values = on_host(array)
        if keep:
            found[path] = values
    return found


def _alone() -> dict[str, Any]:
    """Options with which orbax does not wait for other processes."""
    if jax.process_count() == 1:
        return {}
    me = jax.process_index()
    return {"multiprocessing_options": ocp.options.MultiprocessingOptions(me, {me}, f"alone-{me}")}


def check_place(directory: Path | str) -> None:
    """Whether arrays can be written below a directory. Raises UserError where they would not be found again.

    Orbax looks for the parts that it wrote by a pattern that begins with the path, and takes a bracket or a backslash
    in that for a part of the pattern: it then finds none, tells nobody, and leaves a checkpoint that cannot be read.
    """
    path = str(directory) if "://" in str(directory) else os.path.abspath(directory)
    found = next((letter for letter in path if letter in "[\\"), None)
    if found:
        raise UserError(f"{path} has a {found} in it, where checkpoints could not be read again; choose another name")


def save_arrays(directory: Path, arrays: Mapping[str, Any]) -> None:
    """Write a flat dictionary of arrays: a stage's output, its adapters and new rows. UserError as `check_place`."""
    check_place(directory)
    plain = {path: np.asarray(value) for path, value in arrays.items()}
    with ocp.StandardCheckpointer(**_alone()) as checkpointer:
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
        restore = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in digests}
        # Not by a checkpointer: it waits for other processes.
        args = ocp.args.PyTreeRestore(restore_args=restore)
        arrays: dict[str, np.ndarray] = ocp.PyTreeCheckpointHandler().restore(directory.absolute(), args=args)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # orbax's for files that end early
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{directory} is not complete or damaged ({reason}); {mend}") from error
    wrong = sorted(path for path in digests if path not in arrays or _digest(arrays[path]) != digests[path])
    if wrong or arrays.keys() != digests.keys():
        raise UserError(f"{directory}: {', '.join(wrong) or 'its arrays'} differ from what was written; {mend}")
    return arrays
