"""Where a run is written: a local directory, or a local mirror of a path on an object store."""

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
from transllm_jax.storage.mirror import CHECKPOINTS, Mirror, checked
from transllm_jax.storage.store import Store


class Workdir:
    """A run's directory. Where `remote` is None, pull, push, remove and lease do nothing."""

    def __init__(
        self, local: Path, remote: epath.Path | None = None, *, wait: Callable[[float], None] = time.sleep
    ) -> None:
        """local: where the run is written. remote: what outlives this host; a local directory will do for a test.

        wait: how to let seconds pass before something is tried again.
        """
        self.local, self.remote = local, remote
        self._mirror = None if remote is None else Mirror(Store(os.fspath(remote), wait=wait), local, wait=wait)
        self._lease: Lease | None = None

    @property
    def name(self) -> str:
        """The directory as a user knows it: a path, or the store's."""
        return os.fspath(self.local if self.remote is None else self.remote)

    def checkpoints(self, stage: str) -> epath.Path:
        """Where a stage's checkpoints lie: on the store itself, which all hosts write, never in the mirror."""
        return (self.remote if self.remote is not None else epath.Path(self.local)) / checked(stage) / CHECKPOINTS

    def pull(self, name: str) -> bool:
        """Make a file or a step's directory here what it is on the store; returns whether the store has it.

        Where the store has none: what is here stays if the store never had it, and goes if it was removed there.
        Raises UserError for what is damaged on the store.
        """
        return self._mirror is not None and self._mirror.pull(checked(name))

    def push(self, name: str) -> int:
        """Make a file or a step's directory on the store what it is here; returns how many files were uploaded.

        Whoever finds a step's manifest on the store, and that it is done, finds all of its files as they are here. A
        push that was cut off is mended by the next. Checkpoints on the store are left as they are. A directory that
        was removed here after it was pulled or pushed is removed there.
        Raises UserError when another run has taken over.
        """
        return 0 if self._mirror is None else self._mirror.push(checked(name))

    def remove(self, name: str) -> None:
        """Remove a step from the store, its checkpoints too, before it is begun anew. What is here stays."""
        if self._mirror is not None:
            self._mirror.remove(checked(name))

    def add(self, folder: str, *groups: Iterable[str]) -> None:
        """Put files of a folder on the store, that are not there yet; several hosts may do so at once.

        For files that never change, since their name says what they hold. A group is there before the next is begun.
        """
        if self._mirror is not None:
            self._mirror.add(checked(folder), *groups)

    def fetch(self, folder: str, *groups: Iterable[str]) -> None:
        """Bring files of a folder that `add` put there, and are not here, group after group; others are passed over."""
        if self._mirror is not None:
            self._mirror.fetch(checked(folder), *groups)

    @contextmanager
    def lease(self, *, watch: bool = True, say: Callable[[str], None] = lambda message: None) -> Iterator[None]:
        """Hold the store for this process (of a pod: host 0's), in place of a lock.

        Raises UserError while another run holds it; `watch` is explained at `Lease`.
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
        """Give the lease back, from another thread, before this process ends by force."""
        if self._lease is not None:
            self._lease.release()


def open_workdir(given: str, mirror: Path | None = None) -> Workdir:
    """A run's directory from what `--workdir` says: a path, or gs://bucket/path.

    A path may begin with ~: a shell expands it as a word of its own, but not in a config nor in --workdir=~/runs.
    The mirror of gs:// lies in `mirror`, `$TRANSLLM_MIRROR`, or in the user's cache directory under a hash of the url.
    Raises UserError for another scheme, a bucket that does not exist, no permission, or no gcsfs.
    """
    if re.match(r"gs:/[^/]", given):
        raise UserError(f"--workdir {given}: a bucket is written gs://BUCKET/PATH, with two slashes")
    if "://" not in given:
        # The library that writes checkpoints takes no other.
        if not is_utf8(given):
            raise UserError(f"--workdir {given}: the path is not UTF-8; choose another")
        return Workdir(Path(given).expanduser())
    scheme, _, rest = given.partition("://")
    if scheme != "gs":
        # Orbax takes every other url for a relative path.
        raise UserError(f"--workdir {given}: checkpoints can be written to gs:// and local paths only, not {scheme}://")
    parts = [part for part in rest.split("/") if part]
    if not parts or "." in parts or ".." in parts:
        raise UserError(f"--workdir {given}: a bucket is written gs://BUCKET/PATH")
    url = "gs://" + "/".join(parts)
    # Before anything is made here: the bucket, the permission, the library.
    Store(url).files(".lease")
    return Workdir(mirror or _mirror_of(url), epath.Path(url))


def _mirror_of(url: str) -> Path:
    if own := os.environ.get("TRANSLLM_MIRROR"):
        return Path(own).expanduser()
    return user_cache() / "mirrors" / hashlib.sha256(url.encode()).hexdigest()[:16]
