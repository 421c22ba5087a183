"""A new directory that is there whole or not at all."""

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

# One of these is in every directory that we write, or that another program of the field does.
_MARKS = ("config.json", "adapter_config.json", "adapter.json", "weights.json", "tokenizer.json")


def check_destination(dst: Path, *, overwrite: bool = False, reads: Iterable[Path] = ()) -> None:
    """Raises UserError for a destination that may not be written, or whose replacement would take more than a model.

    `reads`: what is read to make it. Nothing is written into one of them, and none is replaced.
    """
    real = dst.resolve()
    for source in reads:
        source = source.resolve()
        if source.is_dir() and real.is_relative_to(source):
            raise UserError(f"{dst} lies in {source}, which is read; choose a destination outside")
        if source.is_relative_to(real):
            raise UserError(f"{dst} holds {source}, which is read; choose another destination")
    # `absolute` and not `resolve`: a symbolic link as the last part is a name of its own.
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
    """Yield an empty directory beside `dst` that takes the name `dst` when the block ends well.

    On an exception the partial directory is removed and `dst` is as it was. After a kill, the next call for the same
    `dst` on the same machine removes the partial directory (`.NAME.partial-HOST-PID`), or puts back what was being
    replaced. Two processes with one `dst` do not meet: the later one to finish is refused.

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
    """Put back what a killed process was replacing, and remove what it was writing."""
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
    """As it was before: `made` is the first of the parents that had to be made."""
    shutil.rmtree(partial, ignore_errors=True)
    if replaced.exists() and not dst.exists():
        os.replace(replaced, dst)
    parent = dst.parent
    while made is not None and parent.is_relative_to(made):
        try:
            parent.rmdir()
        except OSError:
            return  # something else is in it by now
        parent = parent.parent
