"""A run: each step that is not done is done, in order; a stopped one goes on.

Several processes take every step together. The primary decides for all what is done, and what a step is made of.
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
from transllm_jax.training.arrays import check_place
from transllm_jax.training.record.ledger import LEDGER

# Files of a work directory that belong to no step.
RUN, VERSIONS = "run.yaml", "versions.json"


@dataclass(frozen=True)
class Begun:
    """A run that holds its work directory: the inputs of each step, and the states of the steps that stay."""

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
) -> bool:
    """Run what is not done yet, up to and including stage `until` with its evaluation.

    workdir: a directory for this process alone, or the site of several. force: redo this step and all that builds on
    it. since: when the process began, by `time.monotonic`. profile: how many steps of each training stage are traced.
    Returns whether there was anything to do.
    Raises UserError for bad input, before any model is loaded where that can be known; Preempted when stopped.
    """
    wanted, removed = steps_until(until), dependents(force) if force is not None else set()
    with _begin(config, workdir, progress, interrupt, removed, since=since, profile=profile) as begun:
        run, todo = begun.run, [step for step in wanted if begun.states.get(step.name) != "done"]
        checked = False
        for step in todo:
            if step.after and not checked:
                # The base is there. What else the steps need is checked now, not after hours of training.
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
    """Take the steps before the first training, then let `show` describe the trainings. Raises as `run_pipeline`."""
    with _begin(config, workdir, progress, interrupt, set(), since=since) as begun:
        for step in STEPS:
            if step.name == "vocabulary":
                # The base is there, and the rest can be checked.
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
    """Hold the work directory, look at what is there, and remove the steps `removed`; with the ledger open."""
    site = workdir if isinstance(workdir, Site) else Site.of(workdir)
    for place in (site.workdir, site.storage.name):
        check_place(place)
    with site.held(progress.say):
        site.pull(RUN, HASHES, LEDGER)
        day = site.peers.run_on_primary("the date", lambda: _first_day(config, site.workdir).isoformat())
        config = config.model_copy(update={"date": date.fromisoformat(str(day))})
        run = Run(config, site, progress, interrupt, since=since, profile=profile)
        # Every step's inputs first: a path without a file is found before an hour of training, not after. A file that
        # all hosts see is hashed by the primary alone.
        inputs = run.peers.run_primary_first("inputs", lambda: look_at_inputs(run))
        run.peers.require_equal(file_hashes(inputs))
        # Nothing is written to the store meanwhile, so all hosts fetch at once.
        for step in STEPS:
            if step.name not in removed:
                site.pull(step.directory, *step.beside)
        # States are looked at before anything is removed: a run that is refused has removed nothing.
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
            # Why the run ended matters more than that these could not be kept.
            with suppress(UserError, OSError):
                site.push(HASHES, LEDGER)
            raise
        site.push(HASHES, LEDGER)


def _first_day(config: Config, workdir: Path) -> date:
    """The day that chat templates are told: the config's; else the day on which the run began, which run.yaml keeps."""
    path = workdir / RUN
    kept = recorded_date(path) if config.date is None and path.exists() else None
    return kept or config.date or date.today()


def look_at_inputs(run: Run) -> dict[str, Inputs]:
    """The inputs of each step. Raises UserError for what is wrong with them, and can be known without the base."""
    vocabulary.require_language(run)
    vocabulary.require_corpus(run)
    evaluate.require_held_out(run)
    return all_inputs(run)


def look_at_states(
    run: Run, inputs: Mapping[str, Inputs], removed: Set[str]
) -> tuple[dict[str, Inputs], dict[str, State]]:
    """The inputs of each step, and the states of the steps that are not removed.

    A step that is done keeps the inputs it was made with where they may differ (`Step.stays`). Raises UserError where a
    step was made with others.
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
    """Put the values that a finished step was made with in place of those in `given`, and say so."""
    place = artifact(run.workdir, step.name)
    manifest = place.manifest() if step.stays else None
    if manifest is None or manifest["state"] != "done":
        return
    for key, (old, new) in place.changes(given).items():
        if key in step.stays:
            given[key] = old
            run.progress.say(f"  {step.name} is done, and stays as made: {key} {old}, not {new}", style="yellow")


def _state(run: Run, step: Step, given: Inputs) -> State:
    place = artifact(run.workdir, step.name)
    manifest = place.manifest()
    if step.short and manifest is not None and manifest["state"] == "running" and place.changes(given):
        return "absent"
    return place.state(given, step.may_change)


def _check(run: Run, steps: Sequence[Step]) -> None:
    """Find what is wrong with the config and the files of these steps, in all processes together."""

    def check() -> None:
        base.check(run)
        for look in dict.fromkeys(step.check for step in steps):
            if look is not None:
                look(run)

    run.peers.run_on_all(check)


def _take(begun: Begun, step: Step) -> None:
    """Do a step, or go on with it."""
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
    run.site.publish(*step.beside, step.directory)
    run.progress.say(Text.assemble(f"  {summary['text']}  ", (f"{seconds:.0f} s", "dim")))


def _remove(run: Run, names: Set[str]) -> None:
    # The last first: a kill in between leaves no step that builds on a missing one.
    for step in reversed(STEPS):
        if step.name in names:
            run.site.storage.remove(step.directory)
            artifact(run.workdir, step.name).clear()


def _write_run_file(workdir: Path, config: Config) -> None:
    write_text(workdir / RUN, f"# transllm-jax {version('transllm-jax')}\n{config.to_yaml()}")
    write_json(workdir / VERSIONS, {name: version(name) for name in report.VERSIONS})
