"""Which steps of a work directory are done, interrupted or left; where its time went, what its numbers say to do, and
which command comes next."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from transllm_jax.disk import is_locked
from transllm_jax.errors import UserError
from transllm_jax.evaluation.advice.findings import findings
from transllm_jax.evaluation.page.measures import number
from transllm_jax.evaluation.page.report import asked_sentence, findings_lines, time_sentence
from transllm_jax.stages.recorded import MANIFEST, METRICS, RUN, SKIPPED, VALIDATION, VOCABULARY, recorded
from transllm_jax.stages.steps import NAMES, STEPS, artifact
from transllm_jax.storage import open_workdir
from transllm_jax.training.record.ledger import LEDGER
from transllm_jax.training.record.metrics import read_rows, read_validations


def status_table(given: Path | str) -> RenderableType:
    """A table with one row per step, a line about the time, the findings, and the next command.

    To be printed with `crop=False`: a command is one line, however long.

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
        place.pull(VOCABULARY)
        return _table(place.local, place.name)


def _table(workdir: Path, given: str) -> RenderableType:
    if not (workdir / RUN).is_file():
        begin = f"begin one there with: transllm run CONFIG --workdir {shlex.quote(given)}"
        raise UserError(f"{given} is not a run's work directory (it has no run.yaml); {begin}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("step", "state", "time", "result"):
        table.add_column(heading, justify="right" if heading == "time" else "left", no_wrap=heading != "result")
    states = {}
    for name in NAMES:
        place = artifact(workdir, name)
        manifest = place.manifest()
        states[name] = "to do" if manifest is None else "done" if manifest["state"] == "done" else "begun"
        if manifest is None:
            table.add_row(name, Text("to do", "dim"), "", "")
        elif manifest["state"] == "done":
            summary = manifest["summary"]
            table.add_row(name, Text("done", "green"), f"{summary['seconds']:.0f} s", Text(summary["text"]))
        else:
            table.add_row(name, Text("begun", "yellow"), "", Text(_so_far(place.directory)))
    parts: list[RenderableType] = [table]
    record = recorded(workdir)
    if spent := time_sentence(record.ledger):
        parts.append(Text(f"\n{spent}"))
    if told := asked_sentence(record.asked, record.language()):
        parts.append(Text(f"\n{told}"))
    if (lines := findings_lines(finding.written(record) for finding in findings(record))) is not None:
        parts += [Text(), lines]
    return Group(*parts, Text(), *_next(workdir, given, states, adapters=record.setting("lora") != "none"))


def _next(workdir: Path, given: str, states: Mapping[str, str], *, adapters: bool) -> Iterator[Text]:
    """The commands that come next: to begin or go on, or to use what is done. adapters: whether the run trains any."""
    name = shlex.quote(given)
    if all(state == "done" for state in states.values()):
        yield _command("talk to it", f"transllm chat {name} --show-chain")
        yield _command("the model", f"transllm convert to-hf {name} DST" if "://" in given else f"{name}/export")
        if adapters:
            yield _command("adapters for PEFT", f"transllm convert to-peft {name} DST")
        yield _command("read", f"{name}/report.html")
        return
    step = next(step for step, state in states.items() if state != "done")
    if is_locked(workdir):
        yield _command("at work", f"a run is at work here now, on {step}")
        return
    # run.yaml is the whole config, overrides included. On an object store, no command can read it.
    config = "CONFIG" if "://" in given else shlex.quote(str(Path(given) / RUN))
    began = any(state != "to do" for state in states.values())
    yield _command(f"go on with {step}" if began else "begin", f"transllm run {config} --workdir {name}")
    if config == "CONFIG":
        yield Text("         with the config and overrides that the run was begun with", "dim")


def _command(what: str, command: str) -> Text:
    # In one line however long it is, to be copied.
    return Text.assemble((f"{what:<17}  ", "dim"), command, no_wrap=True, overflow="ignore")


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
