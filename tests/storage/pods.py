"""Hosts of a run and the store that they share; here the store is a local directory."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from transllm_jax.storage import Workdir
from transllm_jax.storage.mirror import Mirror

DONE, RUNNING = '{"state": "done"}', '{"state": "running"}'
# The files of a step, and the files after it was redone: one changed but as large, one new, one removed, one the same.
BEFORE = {"a": "one", "b/c": "same", "gone": "x", "manifest.json": '{"state": "done", "v": 1}'}
AFTER = {"a": "two", "b/c": "same", "b/new": "y" * 5000, "manifest.json": '{"state": "done", "v": 2}'}


class Killed(BaseException):
    """The end of a process, raised where it is killed."""


def write(directory: Path, files: dict[str, str]) -> None:
    """Makes a directory that has these files and no others."""
    if directory.exists():
        shutil.rmtree(directory)
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")


def read(directory: Path) -> dict[str, str]:
    """The text of each file below the directory, but for the index of the store."""
    return {
        path.relative_to(directory).as_posix(): path.read_text(encoding="utf-8")
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".mirror.json"
    }


class Pod:
    """Hosts that share a store."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.store = directory, directory / "store"
        self.waited: list[float] = []

    def host(self, name: str) -> Workdir:
        """A new process on the host of this name, which has the files that earlier ones left."""
        return Workdir(self.directory / name, epath.Path(self.store), wait=self.waited.append)

    def seen(self, step: str = "step") -> dict[str, str]:
        """The files of a step on a new host after a pull."""
        shutil.rmtree(self.directory / "fresh", ignore_errors=True)
        host = self.host("fresh")
        there = host.pull(step)
        assert there == (host.local / step).exists()
        return read(host.local / step)


def mirror_of(host: Workdir) -> Mirror:
    assert host._mirror is not None
    return host._mirror


def kill_at(host: Workdir, moment: int, methods: tuple[str, ...] = ("upload", "write", "remove")) -> Callable[[], int]:
    """Kill the process after `moment` calls of these methods of the store. Returns a function that counts the calls."""
    mirror, guard, calls = mirror_of(host), threading.Lock(), [0]

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with guard:
                calls[0] += 1
                if calls[0] > moment:
                    raise Killed
            return method(*arguments)

        return call

    for name in methods:
        setattr(mirror.store, name, dying(getattr(mirror.store, name)))
    return lambda: calls[0]
