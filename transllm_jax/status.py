"""What is done in a work directory, what was cut off, what is left."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from transllm_jax.errors import UserError
from transllm_jax.pipeline import NAMES, artifact
from transllm_jax.training.metrics import read_rows


def status_table(workdir: Path) -> Table:
    """A row a step. Raises UserError where there is no run."""
    if not (workdir / "run.yaml").is_file():
        raise UserError(f"{workdir} is no work directory of a run (it has no run.yaml)")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("step", "state", "time", "result"):
        table.add_column(heading, justify="right" if heading == "time" else "left")
    for name in NAMES:
        place = artifact(workdir, name)
        manifest = place.manifest()
        if manifest is None:
            table.add_row(name, "[dim]to do[/dim]", "", "")
        elif manifest["state"] == "done":
            summary = manifest["summary"]
            table.add_row(name, "[green]done[/green]", f"{summary['seconds']:.0f} s", summary["text"])
        else:
            rows = read_rows(place.directory / "metrics.jsonl")
            note = f"step {rows[-1]['step']}, loss {rows[-1]['loss']:.3f}" if rows else ""
            table.add_row(name, "[yellow]begun[/yellow]", "", note)
    return table
