"""Named arrays in one .npz file, which is whole or not there; its bytes depend on the arrays alone.

A writer has a name of its own until the file is whole, so several may write the same file at once: the last one wins,
and what it writes is the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from transllm_jax.errors import UserError

_STALE = 86400  # seconds after which nobody writes a file any more that was not touched
_PARTIAL = re.compile(r"\..*\.([^.]*)-(\d+)-[0-9a-f]+\.partial")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file to; at the end it takes the place of `path`, or on an error is removed.

    Raises UserError where the directory cannot be written to.
    """
    host = re.sub(r"[^\w-]", "_", socket.gethostname(), flags=re.ASCII)[:40]
    # Short, as names are limited to 255 bytes; not told apart by the process alone, as hosts may share the directory.
    partial = path.with_name(f".{path.stem[-40:]}.{host}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        with writing(path):
            # A machine that dies must not leave the name without the bytes.
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


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


def sweep(directory: Path) -> None:
    """Remove what writers that were killed have left in a directory; not what another one may still be writing."""
    host = re.sub(r"[^\w-]", "_", socket.gethostname(), flags=re.ASCII)[:40]
    for partial in directory.glob(".*.partial"):
        found = _PARTIAL.fullmatch(partial.name)
        if found is None:
            continue
        with contextlib.suppress(OSError):
            here = found[1] == host and not _alive(int(found[2]))
            if here or time.time() - partial.stat().st_mtime > _STALE:
                partial.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray | Sequence[np.ndarray]]) -> None:
    """Write arrays, each whole or as at least one part, to be joined along the first axis, in memory only one by one.

    Raises UserError where the directory cannot be written to.
    """
    with whole(path) as partial, writing(path), zipfile.ZipFile(partial, "w") as file:
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
