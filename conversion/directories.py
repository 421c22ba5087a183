"""Directories that are there whole or not at all, and files that are hashed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transllm_jax.errors import UserError


@contextmanager
def new_directory(dst: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `dst` that takes the name `dst` when the block ends well.

    On an exception the partial directory is removed and `dst` is as it was. After a kill, the next call
    removes the partial directory (`.NAME.partial`).

    Raises UserError if `dst` exists, is not empty, and `overwrite` is false; or if the disk fills up.
    """
    # `absolute` and not `resolve`: a symbolic link as the last part is a name of its own.
    dst = dst.absolute()
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise UserError(f"{dst} exists and is not a directory; remove it or choose another destination")
    if dst.exists() and any(dst.iterdir()) and not overwrite:
        raise UserError(f"{dst} exists and is not empty; choose another destination or ask to overwrite it")
    partial = dst.with_name(f".{dst.name}.partial")
    replaced = dst.with_name(f".{dst.name}.replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if dst.exists():
            os.replace(dst, replaced)
        os.replace(partial, dst)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full at {dst.parent}; free some space and run again") from error
        ours = str(error.filename or dst).startswith(str(dst.parent))
        if ours and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"cannot write {dst}: {error.strerror}; choose a destination that you may write") from None
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_of(files: dict[str, str]) -> str:
    """One SHA-256 for a set of files, given `{name: sha256}`.

    A single file's own; of several, that of the lines `sha256  name` in name order, which is what
    `sha256sum *.safetensors | sha256sum` prints.
    """
    if len(files) == 1:
        return next(iter(files.values()))
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError if it is missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; is {path.parent} a complete model directory?") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct its permissions") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} where an object belongs; fetch the file again")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object for people and programs: indented, UTF-8, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
