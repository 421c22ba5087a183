"""Tells names on the Hugging Face hub from mistyped paths, which look alike."""

from __future__ import annotations

from pathlib import Path

# Endings of files. A name on the hub may end in .1-8B, but in none of these.
_FILES = (".safetensors", ".bin", ".gguf", ".model", ".json", ".jsonl", ".parquet", ".arrow", ".csv", ".txt", ".tsv")
_PACKED = (".gz", ".xz", ".zst", ".zip", ".tar")


def hub_name_problem(name: str) -> str | None:
    """Why a name such as a/b, which is no path here, is no name on the hub either; None if it may be one.

    A name with a revision (a/b@main) is always one of the hub.
    """
    if "@" in name:
        return None
    first, _, rest = name.partition("/")
    if rest and Path(first).is_dir():
        return f"there is a directory {first} here, and no {rest} in it; correct it, or write {name}@main for the hub"
    if name.lower().endswith(_FILES + _PACKED):
        return f"there is no such file here; check the path ({Path.cwd()} is where the command was started)"
    return None
