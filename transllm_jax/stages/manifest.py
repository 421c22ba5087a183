"""A step's directory and its manifest, which records what the step was made from, so that no finished step is redone.

A step is done when its manifest says so; the manifest is written last. Its `inputs` are the config keys that the step
read, the hashes of the files that it read, and the fingerprints of the steps before it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transllm_jax.disk import read_json, sha256_of_json, write_json
from transllm_jax.errors import UserError

State = Literal["absent", "running", "done"]

# Represents a section of the config in a message, if the key had or has a plain value instead.
SECTION = "a section"


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """A hash of a step's inputs."""
    return sha256_of_json(inputs)


def flatten(prefix: str, value: Any) -> dict[str, Any]:
    """A nested config section as dotted keys, so that messages can name a change."""
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
        """Whether the step with these inputs is absent, was stopped ("running"), or is done.

        may_change: keys, with all keys below them, that may differ if the step was stopped.
        Raises UserError that names the changes if the step was begun with other inputs.
        """
        manifest = self.manifest()
        if manifest is None:
            return "absent"
        changed = self.changes(inputs)
        if manifest["state"] == "running":
            free = tuple(f"{key}." for key in may_change)
            changed = {key: both for key, both in changed.items() if not f"{key}.".startswith(free)}
        if changed:
            shown = ", ".join(f"{k} ({_short(old)} -> {_short(new)})" for k, (old, new) in list(changed.items())[:5])
            raise UserError(
                f"{self.directory}: {self.name} was made with other inputs: {shown}"
                f"{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}; "
                f"to go on give the values from before (run.yaml has them), redo it with --force {self.name}, or use "
                "another --workdir"
            )
        state: State = manifest["state"]
        return state

    def changes(self, inputs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The inputs that differ from those that the step was begun with: key -> (then, now)."""
        manifest = self.manifest()
        if manifest is None:
            return {}
        # Converted through JSON, like the manifest, in which tuples have become lists.
        then, now = manifest["inputs"], json.loads(json.dumps(inputs))
        keys = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
        changed = {key: (then.get(key), now.get(key)) for key in keys}
        # A key that is a value on one side and a section on the other is one change, not one for each key below it.
        for key in then.keys() ^ now.keys():
            # A key with a space is a file, whose name may be the beginning of another file's.
            below = [] if " " in key else [other for other in keys if other.startswith(f"{key}.")]
            if below:
                changed[key] = (then.get(key, SECTION), now.get(key, SECTION))
                for other in below:
                    changed.pop(other, None)
        return dict(sorted(changed.items()))

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Write that a resumable step has begun, with its inputs."""
        write_json(self.path, {"step": self.name, "state": "running", "inputs": inputs})

    def finish(self, inputs: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Write that the step is done. To be called last."""
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
        """Remove the directory; the manifest first, so that a kill in between leaves nothing that looks done."""
        self.path.unlink(missing_ok=True)
        if self.directory.exists():
            shutil.rmtree(self.directory)


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 16 else text[:12] + "…"
