"""What a suite has found so far: a jsonl file to which records are appended, so that a killed suite goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from transllm_jax.disk import appending, cut_behind, read_json, whole_lines, write_json
from transllm_jax.errors import UserError


class Records:
    """The records of one file by their id, in the order in which they were added."""

    def __init__(self, path: Path, file: BinaryIO, known: dict[str, dict[str, Any]]) -> None:
        self.path, self._file, self._known = path, file, known

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, id: str) -> bool:
        return id in self._known

    def __getitem__(self, id: str) -> dict[str, Any]:
        return self._known[id]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._known.values())

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record, which has an `id` that none has yet. It is in the file when this returns."""
        id = record["id"]
        if id in self._known:
            raise ValueError(f"{self.path}: two records have the id {id!r}")
        line = json.dumps(record, ensure_ascii=False)
        # One call, so that a killed process leaves whole lines and at most a part of the last one.
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._known[id] = dict(record)


@contextmanager
def open_records(path: Path, made_with: Mapping[str, Any]) -> Iterator[Records]:
    """Open a file of records to go on with it, for this process alone.

    made_with: all that the records depend on (JSON): the system, the questions, the settings. It is kept beside the
    file, as `NAME.settings.json`. Raises UserError if the file was made with something else, if another process writes
    it, or if a line of it is no record.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with appending(path) as file:
        _require_made_with(path, dict(made_with))
        lines = whole_lines(path)
        known: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                new = record["id"] not in known
            except (ValueError, TypeError, KeyError):
                new = False
            if not new:
                raise UserError(f"{path}:{number} is no record, or has the id of another; remove the line")
            known[record["id"]] = record
        cut_behind(path, lines)
        yield Records(path, file, known)


def _require_made_with(path: Path, wanted: dict[str, Any]) -> None:
    beside = path.with_name(f"{path.name.removesuffix('.jsonl')}.settings.json")
    wanted = json.loads(json.dumps(wanted))
    known = read_json(beside) if beside.exists() else None
    if path.stat().st_size and known != wanted:
        if known is None:
            raise UserError(f"{path} exists, and {beside.name}, which says how it was made, does not; remove it")
        other = sorted(name for name in {**known, **wanted} if known.get(name) != wanted.get(name))
        raise UserError(
            f"{path} was made with other settings ({', '.join(other)}: see {beside.name}); use those, give another "
            "--out, or remove it"
        )
    write_json(beside, wanted)
