"""A new directory that is complete or absent, never partial."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transllm_jax.disk import is_alive
from transllm_jax.errors import UserError

# Every model or tokenizer directory, ours or of another program, has one of these files.
_MARKS = ("config.json", "adapter_config.json", "adapter.json", "weights.json", "tokenizer.json", "Modelfile")


def check_destination(dst: Path, *, overwrite: bool = False, reads: Iterable[Path] = ()) -> None:
    """Raises UserError if `dst` may not be written, or if replacing it would remove more than a model.

    reads: the directories and files that the new directory is made from. Nothing is written into them, and none is
    replaced.
    """
    real = dst.resolve()
    for source in reads:
        source = source.resolve()
        if source.is_dir() and real.is_relative_to(source):
            raise UserError(f"{dst} lies in {source}, which is read; choose a destination outside")
        if source.is_relative_to(real):
            raise UserError(f"{dst} holds {source}, which is read; choose another destination")
    # Not `resolve`: it would follow a symbolic link, which is refused.
    place = dst.absolute()
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise UserError(f"{dst} exists and is not a directory; remove it or choose another destination")
    if not place.exists() or not any(place.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{dst} exists and is not empty; choose another destination, or --force to replace it")
    for kept in (Path.cwd(), Path.home()):
        if kept.resolve().is_relative_to(real):
            raise UserError(f"{dst} is or holds {kept}, which is not replaced; choose another destination")
    if not any((place / mark).is_file() for mark in _MARKS):
        raise UserError(f"{dst} is not empty and does not look like a model, so it is not replaced; remove it yourself")


@contextmanager
def new_directory(dst: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory next to `dst` that is renamed to `dst` when the block ends without error.

    On an exception the partial directory is removed and `dst` is unchanged. After a kill, the next call for the same
    `dst` on the same machine removes the partial directory (`.NAME.partial-HOST-PID`), or restores the directory that
    was being replaced. If two processes write the same `dst`, the one that finishes later is refused.

    Raises UserError as `check_destination` does, or if the disk fills up or may not be written.
    """
    check_destination(dst, overwrite=overwrite)
    dst = Path(os.path.normpath(dst.absolute()))
    made = next((parent for parent in reversed(dst.parents) if not parent.exists()), None)
    partial = dst.with_name(f".{dst.name}.partial-{_OWNER}")
    replaced = dst.with_name(f".{dst.name}.replaced-{_OWNER}")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        _clear_away(dst)
        partial.mkdir()
    except OSError as error:
        _undo(dst, partial, replaced, made)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full at {dst.parent}; free some space and run again") from error
        reason = "a part of its path is a file" if error.errno == errno.EEXIST else error.strerror
        raise UserError(f"cannot write {dst}: {reason}; choose a destination that you may write") from None
    try:
        yield partial
        if overwrite and dst.exists():
            os.replace(dst, replaced)
        os.replace(partial, dst)
    except OSError as error:
        _undo(dst, partial, replaced, made)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full at {dst.parent}; free some space and run again") from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and error.filename == str(partial):
            raise UserError(f"{dst} was made by another process meanwhile; it is left as it is") from None
        ours = str(error.filename or dst).startswith(str(dst.parent))
        if ours and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"cannot write {dst}: {error.strerror}; choose a destination that you may write") from None
        raise
    except BaseException:
        _undo(dst, partial, replaced, made)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


_OWNER = f"{socket.gethostname()}-{os.getpid()}"


def _clear_away(dst: Path) -> None:
    """Restore the directory that a killed process was replacing, and remove the one that it was writing."""
    for left in sorted(dst.parent.glob(f".{glob.escape(dst.name)}.*-*-*")):
        kind, _, owner = left.name.removeprefix(f".{dst.name}.").partition("-")
        host, _, number = owner.rpartition("-")
        if kind not in ("partial", "replaced") or host != socket.gethostname() or not number.isdecimal():
            continue
        if int(number) != os.getpid() and is_alive(int(number)):
            continue
        if kind == "replaced" and not dst.exists():
            os.replace(left, dst)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _undo(dst: Path, partial: Path, replaced: Path, made: Path | None) -> None:
    """Undo everything. made: the topmost parent directory that was created; None if all existed."""
    shutil.rmtree(partial, ignore_errors=True)
    if replaced.exists() and not dst.exists():
        os.replace(replaced, dst)
    parent = dst.parent
    while made is not None and parent.is_relative_to(made):
        try:
            parent.rmdir()
        except OSError:
            return  # it holds something else by now
        parent = parent.parent
