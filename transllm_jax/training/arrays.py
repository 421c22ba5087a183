"""What a stage leaves: its adapters and new rows as a flat dictionary of arrays on disk, each with its SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from transllm_jax.errors import UserError

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
