"""A run: does the steps that are not done, in order, and continues a stopped one.

If there are several processes, they do every step together. The primary decides for all which steps are done, and with
which inputs a step is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.text import Text

from transllm_jax.config import Config
from transllm_jax.config.load import recorded_date
from transllm_jax.disk import write_json, write_text
from transllm_jax.errors import Preempted, UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.hosts.site import Site
from transllm_jax.progress import Progress
from transllm_jax.stages import base, evaluate, report, vocabulary
from transllm_jax.stages.manifest import State
from transllm_jax.stages.recorded import RUN
from transllm_jax.stages.run import HASHES, Run
from transllm_jax.stages.steps import (
    STEPS,
    Inputs,
    Step,
    all_inputs,
    artifact,
    dependents,
    file_hashes,
    fingerprints,
    steps_until,
)
from transllm_jax.training.arrays import check_checkpoint_path
from transllm_jax.training.record.ledger import LEDGER

# A file of a work directory that belongs to no step, as run.yaml does.
VERSIONS = "versions.json"


@dataclass(frozen=True)
class Begun:
    """A run that holds its work directory, with the inputs of each step, and the states of the steps that stay."""

    run: Run
    inputs: Mapping[str, Inputs]
    states: Mapping[str, State]


def run_pipeline(
    config: Config,
    workdir: Path | Site,
    progress: Progress,
    interrupt: Interrupt,
    *,
    until: str | None = None,
    force: str | None = None,
    since: float | None = None,
    profile: int = 0,
    left_out: Set[str] = frozenset(),
) -> bool:
    """Run the steps that are not done, up to and including stage `until` with its evaluation.

    workdir: a directory for a single process, or the site of several. force: redo this step and all that build on it.
    since: when the process began, by `time.monotonic`. profile: how many steps of each training stage are traced.
    left_out: steps that are not done, on which no later one builds.
    Returns whether there was anything to do.
    Raises UserError for bad input, if possible before any model is loaded; Preempted when stopped.
    """
    wanted, removed = steps_until(until), dependents(force) if force is not None else set()
    with _begin(config, workdir, progress, interrupt, removed, since=since, profile=profile) as begun:
        done = {name for name, state in begun.states.items() if state == "done"} | left_out
        run, todo = begun.run, [step for step in wanted if step.name not in done]
        checked = False
        for step in todo:
            if step.after and not checked:
                # All checks need the base model. They are made now, not after hours of training.
                with run.ledger.spend("init"):
                    _check(run, todo)
                checked = True
            _take(begun, step)
            if run.peers.any(run.interrupt.requested):
                raise Preempted(f"{step.name}: stopped, what is done is saved")
    return bool(todo)


def plan(
    config: Config,
    workdir: Path | Site,
    progress: Progress,
    interrupt: Interrupt,
    show: Callable[[Run], None],
    *,
    since: float | None = None,
) -> None:
    """Do the steps before the first training, then let `show` describe the trainings. Raises as `run_pipeline`."""
    with _begin(config, workdir, progress, interrupt, set(), since=since) as begun:
        for step in STEPS:
            if step.name == "vocabulary":
                # All checks need the base model.
                _check(begun.run, STEPS)
            if step.name in ("base", "vocabulary") and begun.states[step.name] != "done":
                _take(begun, step)
        show(begun.run)


@contextmanager
def _begin(
    config: Config,
    workdir: Path | Site,
    progress: Progress,
    interrupt: Interrupt,
    removed: Set[str],
    *,
    since: float | None,
    profile: int = 0,
) -> Iterator[Begun]:
    """Lock the work directory, determine the steps' states, remove the steps `removed`, and open the ledger."""
    site = workdir if isinstance(workdir, Site) else Site.of(workdir)
    for place in (site.workdir, site.storage.name):
        check_checkpoint_path(place)
    with site.held(progress.say):
        site.pull(RUN, HASHES, LEDGER)
        day = site.peers.run_on_primary("the date", lambda: _first_day(config, site.workdir).isoformat())
        config = config.model_copy(update={"date": date.fromisoformat(str(day))})
        run = Run(config, site, progress, interrupt, since=since, profile=profile)
        # The inputs of all steps come first, so that a missing file is found before any training. A file that all hosts
        # see is hashed only by the primary.
        inputs = run.peers.run_primary_first("inputs", lambda: look_at_inputs(run))
        run.peers.require_equal(file_hashes(inputs))
        # All hosts fetch at the same time: nothing is written to the store meanwhile.
        for step in STEPS:
            if step.name not in removed:
                site.pull(step.directory, *step.other_files)
        # States are determined before anything is removed, so that a run that is refused has removed nothing.
        settled, states = run.peers.run_on_primary("states", lambda: look_at_states(run, inputs, removed)) or ({}, {})
        if run.primary:
            _remove(run, removed)
            _write_run_file(run.workdir, config)
        site.push(RUN, VERSIONS)
        run.peers.barrier("begun")
        try:
            with run.ledger:
                yield Begun(run, settled, states)
        except BaseException:
            # The error that ended the run matters more than one from saving these files.
            with suppress(UserError, OSError):
                site.push(HASHES, LEDGER)
            raise
        site.push(HASHES, LEDGER)


def _first_day(config: Config, workdir: Path) -> date:
    """The date for chat templates: that of the config, else the day on which the run began, which run.yaml records."""
    path = workdir / RUN
    kept = recorded_date(path) if config.date is None and path.exists() else None
    return kept or config.date or date.today()


def look_at_inputs(run: Run) -> dict[str, Inputs]:
    """The inputs of each step. Raises UserError for faults that can be found without the base model."""
    vocabulary.require_language(run)
    vocabulary.require_corpus(run)
    evaluate.require_held_out(run)
    return all_inputs(run)


def look_at_states(
    run: Run, inputs: Mapping[str, Inputs], removed: Set[str]
) -> tuple[dict[str, Inputs], dict[str, State]]:
    """The inputs of each step, and the states of the steps that are not removed.

    A step that is done keeps those of its inputs that may differ then (`Step.stays`). Raises UserError if a step was
    made with other inputs.
    """
    settled: dict[str, Inputs] = {}
    states: dict[str, State] = {}
    for step in STEPS:
        given = settled[step.name] = {**inputs[step.name], **fingerprints(step, settled)}
        if step.name not in removed:
            _keep_as_made(run, step, given)
    for step in STEPS:
        if step.name not in removed:
            states[step.name] = _state(run, step, settled[step.name])
    return settled, states


def _keep_as_made(run: Run, step: Step, given: Inputs) -> None:
    """In `given`, replace values that may differ by those with which a finished step was made; prints which."""
    place = artifact(run.workdir, step.name)
    manifest = place.manifest() if step.stays else None
    if manifest is None or manifest["state"] != "done":
        return
    for key, (old, new) in place.changes(given).items():
        if key in step.stays:
            given[key] = old
            run.progress.say(f"  {step.name} is done, and stays as made: {key} {old}, not {new}", style="yellow")


def _state(run: Run, step: Step, given: Inputs) -> State:
    """A step's state; a stopped short step whose inputs have changed counts as absent, because it begins again."""
    place = artifact(run.workdir, step.name)
    manifest = place.manifest()
    if step.short and manifest is not None and manifest["state"] == "running" and place.changes(given):
        return "absent"
    return place.state(given, step.may_change)


def _check(run: Run, steps: Sequence[Step]) -> None:
    """Check the config and the files of these steps, in all processes together. Raises UserError."""

    def check() -> None:
        base.check(run)
        for check_step in dict.fromkeys(step.check for step in steps):
            if check_step is not None:
                check_step(run)

    run.peers.run_on_all(check)


def _take(begun: Begun, step: Step) -> None:
    """Do a step, or continue it if it was stopped. Its time is recorded in the ledger."""
    run, resume = begun.run, step.resumable and begun.states.get(step.name) == "running"
    with run.ledger.stage(step.name, anew=not resume), run.ledger.spend(step.activity):
        _do(run, step, begun.inputs[step.name], resume=resume)


def _do(run: Run, step: Step, inputs: Inputs, *, resume: bool) -> None:
    place = artifact(run.workdir, step.name)
    run.progress.say(Text.assemble((step.name, "bold"), " goes on" if resume else ""))
    for key, (old, new) in (place.changes(inputs) if resume else {}).items():
        run.progress.say(f"  goes on with another {key}: {old} -> {new}", style="yellow")
    if run.primary:
        if not resume:
            run.site.storage.remove(step.directory)
            place.clear()
        if step.resumable:
            place.begin(inputs)
            run.site.push(step.directory)
    run.peers.barrier(step.name)
    started = time.monotonic()

    def work() -> dict[str, Any]:
        return dict(step.work(run, place.directory))

    summary = (run.peers.run_on_primary(step.name, work) if step.alone else work()) or {}
    seconds = time.monotonic() - started
    if run.primary:
        place.finish(inputs, {**summary, "seconds": seconds})
    run.push()
    run.site.publish(*step.other_files, step.directory)
    run.progress.say(Text.assemble(f"  {summary['text']}  ", (f"{seconds:.0f} s", "dim")))


def _remove(run: Run, names: Set[str]) -> None:
    # In reverse order, so that a kill in between leaves no step that builds on a missing one.
    for step in reversed(STEPS):
        if step.name in names:
            run.site.storage.remove(step.directory)
            artifact(run.workdir, step.name).clear()


def _write_run_file(workdir: Path, config: Config) -> None:
    write_text(workdir / RUN, f"# transllm-jax {version('transllm-jax')}\n{config.to_yaml()}")
    write_json(workdir / VERSIONS, {name: version(name) for name in report.VERSIONS})
