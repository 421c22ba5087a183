"""Files that are complete or absent, never partial; hashes and sizes; a work directory's lock; cache directories."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from transllm_jax.errors import UserError


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8. Text from the system that was not UTF-8 holds lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


@contextmanager
def whole(
    path: Path, *, shared: bool = False, errors: Callable[[Path], AbstractContextManager[object]] = nullcontext
) -> Iterator[Path]:
    """Yield a temporary name next to `path`. The file written there replaces `path` when the block ends without error.

    So `path` is always the old file or the new one, even if the process is killed or the machine loses power. On an
    exception the new file is removed. shared: several processes may write `path` at the same time; each gets its own
    temporary name, and `sweep` removes the files of killed ones. Otherwise the name is `NAME.part`, which the next
    writer overwrites. errors: makes a context, from `path`, that reports errors of the disk; the block is outside it.
    """
    if shared:
        # Short, because names are limited to 255 bytes. With the host's name, because hosts may share the directory.
        owner = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
        partial = path.with_name(f".{path.stem[-40:]}.{owner}.partial")
    else:
        partial = path.with_name(path.name + ".part")
    with errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        with errors(path):
            # Else the new name may reach the disk before the content: after a loss of power the file would be empty.
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


_STALE = 86400  # seconds without a change after which a temporary file is taken for abandoned
_PARTIAL = re.compile(r"\..*\.([^.]*)-(\d+)-[0-9a-f]+\.partial")


def sweep(directory: Path) -> None:
    """Remove the temporary files of killed writers in a directory, but none that may still be written."""
    for partial in directory.glob(".*.partial"):
        found = _PARTIAL.fullmatch(partial.name)
        if found is None:
            continue
        with suppress(OSError):
            left = found[1] == _host() and not is_alive(int(found[2]))
            if left or time.time() - partial.stat().st_mtime > _STALE:
                partial.unlink()


def _host() -> str:
    """This machine's name, made safe for a file's name."""
    return re.sub(r"[^\w-]", "_", socket.gethostname(), flags=re.ASCII)[:40]


def is_alive(pid: int) -> bool:
    """Whether a process with this id runs on this machine, under any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # another user's process, or an id that cannot be checked
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file completely or not at all; see `whole`."""
    with whole(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes` does."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `write_text` does: indented, with a newline at the end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a stage wrote. Raises UserError if it is missing, unreadable or damaged."""
    return _read_json(
        path, missing="does not exist; run the stage that writes it", fix="run its stage again with --force"
    )


def read_model_json(path: Path, *, missing: str | None = None) -> dict[str, Any]:
    """The JSON object in a file of a model's or tokenizer's directory. Raises UserError as `read_json` does.

    missing: what to say if the file is missing, after its path.
    """
    missing = missing or f"is missing; is {path.parent} a complete model directory?"
    return _read_json(path, missing=missing, fix="fetch the file again", damaged="is not valid JSON")


def _read_json(path: Path, *, missing: str, fix: str, damaged: str = "is damaged") -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} {missing}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct its permissions") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} {damaged} ({error}); {fix}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} where an object belongs; {fix}")
    return value


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that is appended to; none if there is no file.

    What is behind the last line break is left out: it is empty, or a line that a killed process did not finish.
    """
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def cut_behind(path: Path, lines: Sequence[bytes]) -> None:
    """Cut off what a file has behind these `whole_lines` of it."""
    size = sum(len(line) + 1 for line in lines)
    if path.exists() and size < path.stat().st_size:
        os.truncate(path, size)


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """A file to be appended to and read, by this process alone. Raises UserError if another process has it open so."""
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is writing it; wait for it or stop it") from None
        yield file


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """The SHA-256 of a value as JSON, in hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class FileHashes:
    """SHA-256 hashes of files, remembered between runs, so that an unchanged corpus is not read again.

    A file counts as unchanged if its path, size, inode and modification time are the same. path: the file that stores
    the hashes. keep: whether to write it; otherwise it is only read.
    """

    def __init__(self, path: Path, *, keep: bool = True) -> None:
        self._path, self._keep = path, keep
        self._known = _known(path)
        self._new, self._written = False, time.monotonic()

    def __call__(self, file: Path) -> str:
        """The SHA-256 of a file's bytes, in hexadecimal."""
        stat = file.stat()
        name, mark = str(file.absolute()), [stat.st_size, stat.st_ino, stat.st_mtime_ns]
        known = self._known.get(name)
        if known is not None and known[:-1] == mark:
            return str(known[-1])
        found = sha256_of(file)
        # A file written a moment ago may be written again without a visible change of its modification time.
        if time.time_ns() - stat.st_mtime_ns > _GRAIN and file.stat().st_mtime_ns == stat.st_mtime_ns:
            self._known[name] = [*mark, found]
            self._new = True
            # From time to time, so that a run stopped among many files need not hash all of them again.
            if time.monotonic() - self._written > _WRITE_EVERY:
                self.write()
        return found

    def write(self) -> None:
        """Store the hashes."""
        if self._new and self._keep and self._path.parent.is_dir():
            write_json(self._path, self._known)
            self._new, self._written = False, time.monotonic()


_GRAIN = 2 * 10**9  # nanoseconds
_WRITE_EVERY = 10.0  # seconds


def _known(path: Path) -> dict[str, list[Any]]:
    """The stored hashes; none if the file is missing or damaged, because files can be hashed again."""
    try:
        return read_json(path)
    except UserError:
        return {}


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Lock the work directory for this process. The kernel frees the lock of a process that died.

    Raises UserError if another process has the lock.
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


def is_locked(workdir: Path) -> bool:
    """Whether a process of this machine has the work directory's lock. It is not taken here, not even for a moment."""
    try:
        inode = (workdir / ".lock").stat().st_ino
        held = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return False  # no run was here, or no Linux
    # Such as "1: FLOCK  ADVISORY  WRITE 4242 fd:01:1234 0 EOF". Not every file system gives stat the lock's device.
    return any("FLOCK" in line and f":{inode} " in line for line in held)


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `500MB` or `2GiB`. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if not match or (size := int(float(match[1]) * _UNITS[match[2] or ""])) < 1:
        raise UserError(f"the size {text!r} is not of the form 5GB, 500MB or 2GiB; correct it")
    return size


def cache_directory() -> Path:
    """The directory of downloads, samples and compiled programs: `$TRANSLLM_CACHE`, or the user's cache directory."""
    if own := os.environ.get("TRANSLLM_CACHE"):
        return Path(own).expanduser()
    return user_cache()


def user_cache() -> Path:
    """The user's cache directory for this program."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("transllm-jax"))
