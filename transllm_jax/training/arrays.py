"""A stage's result on disk: its adapters and new rows as a flat dictionary of arrays, each with its SHA-256.

One process alone writes and reads them, without waiting for the others.
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

# A file in a directory of arrays: the SHA-256 of each. It is written last: a directory without it is not complete.
DIGESTS = "sha256.json"


def on_host(array: Any) -> np.ndarray:
    """An array's values. One that is sharded over several processes is gathered; all of them must call this."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        sharding = array.sharding
        assert isinstance(sharding, NamedSharding)
        array = _gather_to(NamedSharding(sharding.mesh, PartitionSpec()))(array)
    return np.asarray(array)


@lru_cache
def _gather_to(replicated: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=replicated)


def all_on_host(arrays: Mapping[str, Any], *, keep: bool = True) -> dict[str, np.ndarray]:
    """Arrays' values, gathered one at a time. keep: False if this process only takes part and needs no values."""
    found = {}
    for path, array in arrays.items():
        values = on_host(array)
        if keep:
            found[path] = values
    return found


def _this_process_only() -> dict[str, Any]:
    """Options with which orbax does not wait for other processes."""
    if jax.process_count() == 1:
        return {}
    me = jax.process_index()
    return {"multiprocessing_options": ocp.options.MultiprocessingOptions(me, {me}, f"alone-{me}")}


def check_checkpoint_path(directory: Path | str) -> None:
    """Refuse a path below which orbax cannot find again what it wrote. Raises UserError.

    Orbax looks for its files by a glob pattern that begins with the path. If the path has a bracket or a backslash, the
    pattern matches no file, and orbax silently leaves a checkpoint that cannot be read.
    """
    path = str(directory) if "://" in str(directory) else os.path.abspath(directory)
    bad = next((letter for letter in path if letter in "[\\"), None)
    if bad:
        raise UserError(f"{path} has a {bad} in it, where checkpoints could not be read again; choose another name")


def save_arrays(directory: Path, arrays: Mapping[str, Any]) -> None:
    """Write a flat dictionary of arrays: for example a stage's result. Raises UserError as `check_checkpoint_path`."""
    check_checkpoint_path(directory)
    plain = {path: np.asarray(value) for path, value in arrays.items()}
    with ocp.StandardCheckpointer(**_this_process_only()) as checkpointer:
        checkpointer.save(directory.absolute(), plain, force=True)
    digests = {path: _digest(value) for path, value in plain.items()}
    (directory / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def load_arrays(directory: Path) -> dict[str, np.ndarray]:
    """Read the arrays that `save_arrays` wrote, to the host.

    Raises UserError if they are missing, incomplete, or differ from what was written.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such adapters; run the stage that writes them first")
    remedy = "run the stage that wrote it again with --force, or copy or convert it again"
    try:
        digests = json.loads((directory / DIGESTS).read_text(encoding="utf-8"))
        restore = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in digests}
        # Not by a checkpointer, which waits for other processes.
        args = ocp.args.PyTreeRestore(restore_args=restore)
        arrays: dict[str, np.ndarray] = ocp.PyTreeCheckpointHandler().restore(directory.absolute(), args=args)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # orbax, for truncated files
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{directory} is not complete or damaged ({reason}); {remedy}") from error
    wrong = sorted(path for path in digests if path not in arrays or _digest(arrays[path]) != digests[path])
    if wrong or arrays.keys() != digests.keys():
        raise UserError(f"{directory}: {', '.join(wrong) or 'its arrays'} differ from what was written; {remedy}")
    return arrays
