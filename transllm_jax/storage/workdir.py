"""A run's work directory: a local directory, or a local mirror of a path on an object store."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from transllm_jax.disk import is_utf8, user_cache
from transllm_jax.errors import UserError
from transllm_jax.storage.lease import Lease
from transllm_jax.storage.mirror import CHECKPOINTS, Mirror, check_name
from transllm_jax.storage.store import Store


class Workdir:
    """A run's directory. If `remote` is None, pull, push, remove and lease do nothing."""

    def __init__(
        self, local: Path, remote: epath.Path | None = None, *, wait: Callable[[float], None] = time.sleep
    ) -> None:
        """local: the directory that the run writes to. remote: the store; tests give a local directory.

        wait: called with the seconds to sleep before a retry.
        """
        self.local, self.remote = local, remote
        self._mirror = None if remote is None else Mirror(Store(os.fspath(remote), wait=wait), local, wait=wait)
        self._lease: Lease | None = None

    @property
    def name(self) -> str:
        """The directory as the user gave it: a local path, or the store's URL."""
        return os.fspath(self.local if self.remote is None else self.remote)

    def checkpoints(self, stage: str) -> epath.Path:
        """A stage's directory of checkpoints: on the store itself, to which all hosts write, never in the mirror."""
        return (self.remote if self.remote is not None else epath.Path(self.local)) / check_name(stage) / CHECKPOINTS

    def pull(self, name: str) -> bool:
        """Update the local copy of a file or a step's directory from the store; returns whether the store has it.

        If the store does not have it: the local copy stays if the store never had it, and is deleted if it was removed
        there. Raises UserError if it is damaged on the store.
        """
        return self._mirror is not None and self._mirror.pull(check_name(name))

    def push(self, name: str) -> int:
        """Update the store's copy of a file or a step's directory from here; returns how many files were uploaded.

        A reader that finds a step's manifest on the store, with the step done, finds all of its files as they are here.
        The next push repairs one that was interrupted. Checkpoints on the store are left as they are. A directory that
        was removed here after it was pulled or pushed is removed there. Raises UserError if another run has taken over.
        """
        return 0 if self._mirror is None else self._mirror.push(check_name(name))

    def remove(self, name: str) -> None:
        """Remove a step and its checkpoints from the store, before it is run again. The local copy stays."""
        if self._mirror is not None:
            self._mirror.remove(check_name(name))

    def add(self, folder: str, *groups: Iterable[str]) -> None:
        """Upload files of a folder that the store does not have; several hosts may do so at once.

        Only for files that never change, because their name identifies their content. Each group is uploaded before the
        next is begun.
        """
        if self._mirror is not None:
            self._mirror.add(check_name(folder), *groups)

    def fetch(self, folder: str, *groups: Iterable[str]) -> None:
        """Download files of a folder that `add` uploaded and that are not here, group by group; ignores other names."""
        if self._mirror is not None:
            self._mirror.fetch(check_name(folder), *groups)

    @contextmanager
    def lease(self, *, watch: bool = True, say: Callable[[str], None] = lambda message: None) -> Iterator[None]:
        """Reserve the store for this process (on a pod: that of host 0), in place of a lock.

        Raises UserError if another run holds it. `watch`: see `Lease`.
        """
        if self._mirror is None:
            yield
            return
        with Lease(self._mirror.store, watch=watch, say=say) as lease:
            self._mirror.check, self._lease = lease.check, lease
            try:
                yield
            finally:
                self._mirror.check, self._lease = lambda: None, None

    def release(self) -> None:
        """Give the lease back before this process is ended by force; for another thread."""
        if self._lease is not None:
            self._lease.release()


def open_workdir(given: str, mirror: Path | None = None) -> Workdir:
    """The run's directory that `--workdir` gives: a path, or gs://bucket/path.

    A path may begin with ~, which a shell does not expand in --workdir=~/runs, nor in a config. The mirror of gs:// is
    `mirror`, $TRANSLLM_MIRROR, or a directory of the user's cache named by a hash of the URL. Raises UserError for
    another scheme, a bucket that does not exist, missing permission, or missing gcsfs.
    """
    if re.match(r"gs:/[^/]", given):
        raise UserError(f"--workdir {given}: a bucket is written gs://BUCKET/PATH, with two slashes")
    if "://" not in given:
        # orbax accepts only UTF-8.
        if not is_utf8(given):
            raise UserError(f"--workdir {given}: the path is not UTF-8; choose another")
        return Workdir(Path(given).expanduser())
    scheme, _, rest = given.partition("://")
    if scheme != "gs":
        # orbax takes any other URL for a relative path.
        raise UserError(f"--workdir {given}: checkpoints can be written to gs:// and local paths only, not {scheme}://")
    parts = [part for part in rest.split("/") if part]
    if not parts or "." in parts or ".." in parts:
        raise UserError(f"--workdir {given}: a bucket is written gs://BUCKET/PATH")
    url = "gs://" + "/".join(parts)
    # Check bucket, permission and gcsfs before creating local files.
    Store(url).files(".lease")
    return Workdir(mirror or _mirror_of(url), epath.Path(url))


def _mirror_of(url: str) -> Path:
    if given := os.environ.get("TRANSLLM_MIRROR"):
        return Path(given).expanduser()
    return user_cache() / "mirrors" / hashlib.sha256(url.encode()).hexdigest()[:16]
