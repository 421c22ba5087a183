"""Rows that a model generates. They are appended to a file as they are done, so that a stopped run can continue."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transllm_jax.disk import cut_behind, whole_lines
from transllm_jax.errors import Preempted, UserError
from transllm_jax.stages.run import Run

Row = dict[str, Any]
# Makes the rows from a number on: gives each row with its number, in any order. The second argument is to be called
# with new tokens' counts, the third now and then, at the same moments in all processes: it saves the rows given so far.
Make = Callable[[int, Callable[[int], None], Callable[[], None]], Iterable[tuple[int, Row]]]

# Seconds between two copies of the file to a store.
KEEP_EVERY = 60.0


class Keeper:
    """While a stage adds to its files: copies them to the run's store now and then, and stops if it was asked to."""

    def __init__(self, run: Run, stage: str) -> None:
        self._run, self._stage, self._pushed = run, stage, time.monotonic()

    def look(self, done: str) -> None:
        """To be called at the same moments in all processes. done: how far the stage is, such as `3 of 9 answers`.

        Raises Preempted in all of them if one was asked to stop.
        """
        stops = self._run.peers.any(self._run.interrupt.requested)
        if stops or time.monotonic() - self._pushed > KEEP_EVERY:
            self._run.push(self._stage)
            self._pushed = time.monotonic()
        if stops:
            raise Preempted(f"{self._stage}: {done}: stopped, what is done is saved")


def generated_rows(
    run: Run,
    path: Path,
    known: Sequence[Mapping[str, Any]],
    make: Make,
    *,
    stage: str,
    what: str,
    unit: str,
) -> list[Row]:
    """The rows of `path`, one JSON object per line, in the order of `known`. Missing rows are made and appended.

    known: the fields of each row that are known before it is made. make: gives complete rows; each has to be the same
    whatever number it begins with. So the file, which grows row by row and is never rewritten, has the same bytes after
    a resumed run as after an undisturbed one. A row that is done before one of a lower number waits for it in memory.
    All processes take part, and `make` gives the same rows at the same moments in all of them; the primary writes.
    Raises Preempted when asked to stop, after what is done is saved; UserError if the file holds other rows.
    """
    rows: list[Row] = run.peers.run_on_primary(f"the {what} so far", lambda: _kept(path, known, stage)) or []
    if len(rows) == len(known):
        return rows
    waiting: dict[int, Row] = {}
    keeper = Keeper(run, stage)

    def save() -> None:
        saved = len(rows)
        while len(rows) in waiting:
            rows.append(waiting.pop(len(rows)))
        if run.primary and len(rows) > saved:
            with path.open("ab") as file:
                file.write(b"".join(map(_line, rows[saved:])))
        keeper.look(f"{len(rows)} of {len(known)} {what}")

    with run.progress.task(what, total=len(known), done=len(rows), unit=unit) as bar:
        for number, row in make(len(rows), bar.tokens, save):
            waiting[number] = row
            bar.update(len(rows) + len(waiting))
        save()
    assert len(rows) == len(known), "not all rows were made"
    return rows


def _kept(path: Path, known: Sequence[Mapping[str, Any]], stage: str) -> list[Row]:
    """The rows of the file. An unfinished line at its end is cut off.

    Raises UserError for a line that is damaged or belongs to another row; the file is then left as it is.
    """
    lines = whole_lines(path)
    rows: list[Row] = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        wanted = known[number] if number < len(known) else None
        if not isinstance(row, dict) or wanted is None or any(row.get(key) != value for key, value in wanted.items()):
            raise UserError(
                f"{path}:{number + 1} is not the row that belongs there; correct the line, remove the file to make all "
                f"rows again, or redo the stage with --force {stage}"
            )
        rows.append(row)
    cut_behind(path, lines)
    return rows


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
