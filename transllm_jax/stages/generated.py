"""Rows that a model makes batch by batch, kept in a file as they come: a run that was cut off goes on behind them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transllm_jax.errors import Preempted, UserError
from transllm_jax.stages.run import Run

Row = dict[str, Any]
# Makes the rows of one batch of places; it is also given what tells of new tokens.
Make = Callable[[Sequence[int], Callable[[int], None]], Sequence[Row]]

# Seconds between two copies of the rows to a store.
KEEP_EVERY = 60.0


def generated_rows(
    run: Run,
    path: Path,
    known: Sequence[Mapping[str, Any]],
    make: Make,
    *,
    stage: str,
    what: str,
    unit: str,
    batch_size: int,
) -> list[Row]:
    """The rows of `path`, one JSON object a line, in the order of `known`; those that it lacks are made and appended.

    known: the fields of each row that are known before it is made. make: gives a batch's rows whole. The file grows by
    whole batches and is never written anew: a resumed run makes the same batches as an undisturbed one, and the same
    bytes. All processes take part; the primary writes.
    Raises Preempted after a batch when asked to stop; UserError for a file that holds other rows.
    """

    def kept() -> list[Row]:
        return _kept(path, known, batch_size, stage)

    rows: list[Row] = run.peers.run_on_primary(f"the {what} so far", kept) or []
    if len(rows) == len(known):
        return rows
    pushed = time.monotonic()
    with run.progress.task(what, total=len(known), done=len(rows), unit=unit) as bar:
        while len(rows) < len(known):
            batch = range(len(rows), min(len(rows) + batch_size, len(known)))
            made = make(batch, bar.tokens)
            rows += made
            if run.primary:
                with path.open("ab") as file:
                    file.write(b"".join(_line(row) for row in made))
            bar.update(len(rows))
            stops = run.peers.any(run.interrupt.requested)
            if stops or time.monotonic() - pushed > KEEP_EVERY:
                run.push(stage)
                pushed = time.monotonic()
            if stops:
                raise Preempted(f"{stage}: {len(rows)} of {len(known)} {what}: stopped, what is done is saved")
    return rows


def _kept(path: Path, known: Sequence[Mapping[str, Any]], batch_size: int, stage: str) -> list[Row]:
    """The rows of whole batches that the file holds. What stands behind them, an unfinished line for one, is cut off.

    Raises UserError for a line that is damaged or of another row, and does not touch the file then.
    """
    data = path.read_bytes() if path.exists() else b""
    # What a killed process was writing has no line end.
    lines = data.split(b"\n")[:-1]
    rows: list[Row] = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        wanted = known[number] if number < len(known) else None
        if not isinstance(row, dict) or wanted is None or any(row.get(key) != value for key, value in wanted.items()):
            raise UserError(
                f"{path}:{number + 1} is not the row that belongs there; mend the line, remove the file to have all of "
                f"it made anew, or begin the stage anew with --force {stage}"
            )
        rows.append(row)
    if len(rows) < len(known):
        del rows[len(rows) // batch_size * batch_size :]
    size = sum(len(line) + 1 for line in lines[: len(rows)])
    if size < len(data):
        os.truncate(path, size)
    return rows


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
