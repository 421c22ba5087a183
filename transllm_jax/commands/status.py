"""Which steps of a work directory are done, interrupted or left, and how much of the time was spent on training."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from transllm_jax.errors import UserError
from transllm_jax.evaluation.page.measures import number
from transllm_jax.evaluation.page.report import time_sentence
from transllm_jax.stages.pipeline import RUN
from transllm_jax.stages.steps import NAMES, STEPS, artifact
from transllm_jax.storage import open_workdir
from transllm_jax.training.record.ledger import LEDGER, summarise
from transllm_jax.training.record.metrics import read_rows, read_validations

MANIFEST, METRICS, VALIDATION, SKIPPED = "manifest.json", "metrics.jsonl", "validation.jsonl", "skipped.jsonl"


def status_table(given: Path | str) -> RenderableType:
    """A table with one row per step, and a line about the time.

    given: a directory, or the URL of a run on an object store. Raises UserError if there is no run.
    """
    if "://" not in str(given):
        return _table(Path(given), str(given))
    # Not into the run's own mirror: pulling only some files of a step would leave it incomplete.
    with tempfile.TemporaryDirectory(prefix="transllm-") as directory:
        place = open_workdir(str(given), Path(directory))
        for name in (RUN, LEDGER):
            place.pull(name)
        for step in (step.directory for step in STEPS):
            if place.pull(f"{step}/{MANIFEST}"):
                for log in (METRICS, VALIDATION, SKIPPED):
                    place.pull(f"{step}/{log}")
        return _table(place.local, place.name)


def _table(workdir: Path, name: str) -> RenderableType:
    if not (workdir / RUN).is_file():
        raise UserError(f"{name} is not a run's work directory (it has no run.yaml)")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("step", "state", "time", "result"):
        table.add_column(heading, justify="right" if heading == "time" else "left", no_wrap=heading != "result")
    for name in NAMES:
        place = artifact(workdir, name)
        manifest = place.manifest()
        if manifest is None:
            table.add_row(name, Text("to do", "dim"), "", "")
        elif manifest["state"] == "done":
            summary = manifest["summary"]
            table.add_row(name, Text("done", "green"), f"{summary['seconds']:.0f} s", Text(summary["text"]))
        else:
            table.add_row(name, Text("begun", "yellow"), "", Text(_so_far(place.directory)))
    spent = time_sentence(summarise(workdir / LEDGER))
    return Group(table, Text(f"\n{spent}")) if spent else table


def _so_far(directory: Path) -> str:
    """The progress of an unfinished stage: its last step, its best validation, the updates that it skipped."""
    parts = []
    losses = read_rows(directory / METRICS)
    if losses:
        loss = number(losses[-1].get("loss"))
        parts.append(f"step {losses[-1]['step']}, loss {'not finite' if loss is None else f'{loss:.3f}'}")
    found = [(number(row.get("bits_per_byte")), row["step"]) for row in read_validations(directory / VALIDATION)]
    measured = [(bits, -step) for bits, step in found if bits is not None]
    if measured:
        # The last of equal ones, as the stage itself chooses.
        bits, step = min(measured)
        parts.append(f"best so far {bits:.3f} bits a byte at step {-step}")
    skipped = len(read_rows(directory / SKIPPED))
    if skipped:
        parts.append(f"{skipped} update{'' if skipped == 1 else 's'} skipped, not finite")
    return "; ".join(parts)
