"""Named arrays in one .npz file, which is whole or not there; its bytes depend on the arrays alone.

A writer has a name of its own until the file is whole, so several may write the same file at once: the last one wins,
and what it writes is the same.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from transllm_jax.disk import whole
from transllm_jax.errors import UserError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes errors of the disk, also those that ArrayRecord raises, a UserError that names the directory of `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).partition(";")[0]
        raise UserError(
            f"{path.parent} cannot be written to ({reason}): free space or permit it, or set another token_cache, and "
            "run again: whole files stay"
        ) from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray | Sequence[np.ndarray]]) -> None:
    """Write arrays, each whole or as at least one part, to be joined along the first axis, in memory only one by one.

    Raises UserError where the directory cannot be written to.
    """
    with whole(path, shared=True, errors=writing) as partial, writing(path), zipfile.ZipFile(partial, "w") as file:
        for name, given in arrays.items():
            parts = [given] if isinstance(given, np.ndarray) else given
            shape = given.shape if isinstance(given, np.ndarray) else (sum(map(len, parts)), *parts[0].shape[1:])
            header = {"descr": parts[0].dtype.str, "fortran_order": False, "shape": shape}
            # A ZipInfo of our own: its date is always the same.
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(np.ascontiguousarray(part).data)


def read_arrays(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The arrays of these names. Raises ValueError for a file that is damaged: a checksum covers each array."""
    try:
        with zipfile.ZipFile(path) as file:
            return [_read(file, name) for name in names]
    except Exception as error:  # bytes that are no file of theirs let zipfile and numpy raise nearly anything
        raise ValueError((str(error) or type(error).__name__).splitlines()[0][:150]) from error


def _read(file: zipfile.ZipFile, name: str) -> np.ndarray:
    with file.open(f"{name}.npy") as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        # The checksum is looked at when the end is reached.
        if member.read(1):
            raise ValueError(f"{name} is longer than it says")
    return np.asarray(array)
