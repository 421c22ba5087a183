"""Names on the Hugging Face hub look like paths: what tells a mistyped path from one."""

from __future__ import annotations

from pathlib import Path

# Of files; a name on the hub may end on .1-8B, and on nothing of these.
_FILES = (".safetensors", ".bin", ".gguf", ".model", ".json", ".jsonl", ".parquet", ".arrow", ".csv", ".txt", ".tsv")
_PACKED = (".gz", ".xz", ".zst", ".zip", ".tar")


def mistyped(name: str) -> str | None:
    """Why a name such as a/b, that is no path here, is not to be asked of the hub; None where it may be meant for it.

    A revision (a/b@main) says that the hub is meant.
    """
    if "@" in name:
        return None
    first, _, rest = name.partition("/")
    if rest and Path(first).is_dir():
        return f"there is a directory {first} here, and no {rest} in it; correct it, or for the hub's write {name}@main"
    if name.lower().endswith(_FILES + _PACKED):
        return f"there is no such file here; check the path ({Path.cwd()} is where the command was started)"
    return None
