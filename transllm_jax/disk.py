"""Files that are there whole or not at all; their hashes and sizes, and the lock of a directory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transllm_jax.errors import UserError


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: what the system gives that is not holds halves of surrogate pairs."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one, whole, whatever stops: the process or the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        # A name may reach the disk before what it names does: after a loss of power the file would be empty.
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON that a step wrote. Raises UserError when it is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that writes it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); run its stage again with --force") from None


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileHashes:
    """The hashes of files, kept from run to run: a corpus is not read anew to know that it stayed the same.

    A file is known by its path, size, inode and time of change. path: where they are kept; without `keep` they are
    only read from there.
    """

    def __init__(self, path: Path, *, keep: bool = True) -> None:
        self._path, self._keep = path, keep
        self._known = _known(path)
        self._new, self._written = False, time.monotonic()

    def __call__(self, file: Path) -> str:
        """sha256 of a file's bytes, as hexadecimal."""
        stat = file.stat()
        name, mark = str(file.absolute()), [stat.st_size, stat.st_ino, stat.st_mtime_ns]
        known = self._known.get(name)
        if known is not None and known[:-1] == mark:
            return str(known[-1])
        found = file_hash(file)
        # What was written a moment ago may be written again within the clock's grain.
        if time.time_ns() - stat.st_mtime_ns > _GRAIN and file.stat().st_mtime_ns == stat.st_mtime_ns:
            self._known[name] = [*mark, found]
            self._new = True
            # Now and then, so that a run that is stopped among many files begins in their midst.
            if time.monotonic() - self._written > _WRITE_EVERY:
                self.write()
        return found

    def write(self) -> None:
        """Keep what is known."""
        if self._new and self._keep and self._path.parent.is_dir():
            write_json(self._path, self._known)
            self._new, self._written = False, time.monotonic()


_GRAIN = 2 * 10**9  # nanoseconds
_WRITE_EVERY = 10.0  # seconds


def _known(path: Path) -> dict[str, list[Any]]:
    """What is kept; nothing where it is damaged, as files can be read anew."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold the work directory for this process. The kernel frees the lock of a process that died.

    Raises UserError when another process runs on it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{workdir} is a file, not a directory; choose another --workdir") from None
    except OSError as error:
        raise UserError(f"{workdir} cannot be written to ({error.strerror}); choose another --workdir") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{workdir}: another run is at work here; wait for it or stop it") from None
        yield


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `500MB` or `2GiB`. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if not match or (size := int(float(match[1]) * _UNITS[match[2] or ""])) < 1:
        raise UserError(f"the size {text!r} is not of the form 5GB, 500MB or 2GiB; correct it")
    return size
