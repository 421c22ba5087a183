"""What a step leaves on disk, and its manifest: what it was made of, so that what is done is known and never redone.

A step is done when its manifest says so; the manifest is written last. Its `inputs` are the config keys that it read,
the hashes of the files that it read, and the fingerprints of the steps before it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from transllm_jax.errors import UserError

State = Literal["absent", "running", "done"]


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


def _known(path: Path) -> dict[str, list[Any]]:
    """What is kept; nothing where it is damaged, as files can be read anew."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


_GRAIN = 2 * 10**9  # nanoseconds
_WRITE_EVERY = 10.0  # seconds


# Stands in a message for a section of the config in place of which there was, or is, a value.
SECTION = "a section"


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """A hash of a step's inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def flatten(prefix: str, value: Any) -> dict[str, Any]:
    """A nested config section as dotted keys, so that a change can be named."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in flatten(f"{prefix}.{key}", inner).items()}
    return {prefix: value}


class Artifact:
    """A step's directory and its manifest."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.path = directory / "manifest.json"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None before the step began."""
        if not self.path.exists():
            return None
        manifest: dict[str, Any] = read_json(self.path)
        return manifest

    def state(self, inputs: Mapping[str, Any], may_change: Sequence[str] = ()) -> State:
        """Whether the step is absent, was cut off, or is done, with these inputs.

        may_change: keys (and what lies below them) that may differ where the step was cut off.
        Raises UserError that names what changed, when it was begun with others.
        """
        manifest = self.manifest()
        if manifest is None:
            return "absent"
        changed = self.changes(inputs)
        if manifest["state"] == "running":
            free = tuple(f"{key}." for key in may_change)
            changed = (
                {key: both for key, both in changed.items() if not f"{key}.".startswith(free)} if free else changed
            )
        if changed:
            shown = ", ".join(f"{k} ({_short(old)} -> {_short(new)})" for k, (old, new) in list(changed.items())[:5])
            raise UserError(
                f"{self.directory}: {self.name} was made with other inputs: {shown}"
                f"{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}; "
                f"redo it with --force {self.name}, or use another --workdir"
            )
        state: State = manifest["state"]
        return state

    def changes(self, inputs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The inputs that differ from those that the step was begun with: key -> (then, now)."""
        manifest = self.manifest()
        if manifest is None:
            return {}
        # Through JSON, as the manifest went: a tuple there is a list.
        wanted, given = manifest["inputs"], json.loads(json.dumps(inputs))
        keys = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
        found = {key: (wanted.get(key), given.get(key)) for key in keys}
        # A key that is a value on one side and a section on the other is one change, not one for each key below it.
        for key in wanted.keys() ^ given.keys():
            # What is named with a space is a file, whose name may begin another's.
            below = [] if " " in key else [other for other in keys if other.startswith(f"{key}.")]
            if below:
                found[key] = (wanted.get(key, SECTION), given.get(key, SECTION))
                for other in below:
                    found.pop(other, None)
        return dict(sorted(found.items()))

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Note what a resumable step is being made of."""
        write_json(self.path, {"step": self.name, "state": "running", "inputs": inputs})

    def finish(self, inputs: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Note that the step is done; written last."""
        write_json(
            self.path,
            {
                "step": self.name,
                "state": "done",
                "fingerprint": fingerprint(inputs),
                "inputs": inputs,
                "summary": summary,
            },
        )

    def clear(self) -> None:
        """Remove all of it; the manifest first, so that a kill in between leaves nothing that looks done."""
        self.path.unlink(missing_ok=True)
        if self.directory.exists():
            shutil.rmtree(self.directory)


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 16 else text[:12] + "…"


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
