"""metrics.jsonl: one line per logged step. A resumed run first drops lines past its checkpoint, so no step is twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from transllm_jax.disk import write_text


class MetricsLog:
    """Appends rows to a jsonl file, each flushed at once, starting after `step`."""

    def __init__(self, path: Path, *, step: int = 0) -> None:
        self._path = path
        self._file: TextIO | None = None
        if path.exists():
            kept = [row for row in read_rows(path) if row["step"] <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; the first row creates the file."""
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file that a run appends to. An unfinished last line, left by a killed process, is skipped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_validations(path: Path) -> list[dict[str, Any]]:
    """The rows of validation.jsonl that are comparable with the last one: those on the same text."""
    rows = read_rows(path)
    return [row for row in rows if row.get("of") == rows[-1].get("of")]
