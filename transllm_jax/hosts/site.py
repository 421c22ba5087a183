"""The work directory of a run's processes: one shared directory, or one object store with a local mirror for each.

Only the primary writes to the work directory and the store; the others see what it wrote after `publish`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transllm_jax.disk import locked
from transllm_jax.errors import UserError
from transllm_jax.hosts.runtime import Peers
from transllm_jax.storage import Workdir

# Seconds within which a file that one host wrote has to be visible to the others.
SEEN = 10.0


@dataclass(frozen=True)
class Site:
    """A run's work directory and its processes."""

    storage: Workdir
    peers: Peers = field(default_factory=Peers)
    _shared: dict[Path, bool] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(directory: Path) -> Site:
        """A directory for this process alone."""
        return Site(Workdir(directory))

    @property
    def workdir(self) -> Path:
        """The work directory, or this process's mirror of it."""
        return self.storage.local

    @property
    def mirrored(self) -> bool:
        """Whether the run is on an object store."""
        return self.storage.remote is not None

    @contextmanager
    def held(self, say: Callable[[str], None]) -> Iterator[None]:
        """Lock the work directory against other runs.

        Raises UserError in all processes if another run holds it or a host does not share it.
        """
        with ExitStack() as stack:

            def take() -> None:
                stack.enter_context(locked(self.workdir))
                stack.enter_context(self.storage.lease(say=say))

            self.peers.run_on_primary("the work directory", take)
            self.peers.on_peer_loss(self.storage.release)
            if self.mirrored:
                # Two processes of one host must not share a mirror.
                self.peers.run_on_all(lambda: None if self.peers.primary else stack.enter_context(locked(self.workdir)))
            else:
                self._require_shared()
            yield

    def _require_shared(self) -> None:
        seen = self.seen_by(self.workdir)
        without = [number for number, there in enumerate(seen) if not there]
        hosts = ", ".join(f"{self.peers.hosts[number]} (process {number})" for number in without)

        def refuse() -> None:
            raise UserError(
                f"{self.workdir} on host {hosts} is not the directory of that name on host {self.peers.hosts[0]}; give "
                "a --workdir that all hosts share, or gs://BUCKET/PATH"
            )

        if without:
            self.peers.run_on_primary("the work directory", refuse)

    def shares(self, directory: Path) -> bool:
        """Whether all processes see one directory of this name; found out once. To be asked by all."""
        if directory not in self._shared:
            self._shared[directory] = all(self.seen_by(directory))
        return self._shared[directory]

    def seen_by(self, directory: Path) -> list[bool]:
        """By process: whether a file that the primary writes into a directory is there for it."""
        if self.peers.count == 1:
            return [True]
        name = f".shared-{secrets.token_hex(8)}"

        def write() -> str:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / name).touch()
            except OSError as error:
                raise UserError(f"{directory} cannot be written to ({error.strerror}); choose another") from None
            return name

        probe = directory / str(self.peers.run_on_primary("a shared directory", write))
        give_up = time.monotonic() + SEEN
        while not (there := probe.exists()) and time.monotonic() < give_up:
            time.sleep(0.2)
        seen = self.peers.gather(there)
        if self.peers.primary:
            probe.unlink(missing_ok=True)
        return seen

    def pull(self, *names: str) -> None:
        """Bring the local copies of these up to date with the store; does nothing without a store."""
        for name in names:
            self.storage.pull(name)

    def push(self, *names: str) -> None:
        """Copy the primary's local copies of these to the store; names that do not exist are left out."""
        if self.peers.primary:
            for name in names:
                if (self.workdir / name).exists():
                    self.storage.push(name)

    def publish(self, *names: str) -> None:
        """Make what the primary wrote under these names visible to all processes. All have to call this."""
        self.push(*names)
        self.peers.barrier("publish")
        if not self.peers.primary:
            self.pull(*names)
