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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from transllm_jax.errors import UserError

State = Literal["absent", "running", "done"]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


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

    def state(self, inputs: Mapping[str, Any]) -> State:
        """Whether the step is absent, was cut off, or is done, with these inputs.

        Raises UserError that names what changed, when it was begun with others.
        """
        manifest = self.manifest()
        if manifest is None:
            return "absent"
        # Through JSON, as the manifest went: a tuple there is a list.
        wanted, given = manifest["inputs"], json.loads(json.dumps(inputs))
        changed = sorted(k for k in wanted.keys() | given.keys() if wanted.get(k) != given.get(k))
        if changed:
            shown = ", ".join(f"{k} ({_short(wanted.get(k))} -> {_short(given.get(k))})" for k in changed[:5])
            raise UserError(
                f"{self.directory}: {self.name} was made with other inputs: {shown}"
                f"{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}; "
                f"redo it with --force {self.name}, or use another --workdir"
            )
        state: State = manifest["state"]
        return state

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
