"""The steps of a run in their order: what is done is skipped, what was cut off goes on.

Several processes take every step together. What is done, and what a step is made of, the primary decides for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
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
from transllm_jax.stages import base, evaluate, export, pretrain, recover, report, transfer, translate, vocabulary
from transllm_jax.stages.manifest import Artifact, State, fingerprint, flatten
from transllm_jax.stages.run import HASHES, Run
from transllm_jax.stages.training import HOW, MAY_CHANGE
from transllm_jax.training.arrays import check_place
from transllm_jax.training.record.ledger import LEDGER

Inputs = Callable[[Run], dict[str, Any]]
Work = Callable[[Run, Path], Mapping[str, Any]]
Check = Callable[[Run], None]


@dataclass(frozen=True)
class Step:
    """A step writes one directory. `after` names the steps whose results it reads.

    `check` finds what is wrong with the step's part of the config and its files, given the base model alone.
    A resumable step keeps what it had when it was cut off; another is begun anew. `may_change` are config keys that may
    be others when it goes on; `short`: what it had is little, and where any of its inputs changed it is begun anew.
    `stays`: config keys that may be others when it is done: it stays as it was made.
    `alone`: the primary does the work, which needs no devices. `beside`: files that it writes outside of its directory.
    """

    name: str
    inputs: Inputs
    work: Work
    after: tuple[str, ...] = ()
    check: Check | None = None
    resumable: bool = False
    may_change: tuple[str, ...] = ()
    stays: tuple[str, ...] = ()
    short: bool = False
    alone: bool = False
    beside: tuple[str, ...] = ()


def _training(name: str, stage: Any, after: tuple[str, ...]) -> Step:
    may_change, stays = (tuple(f"{name}.{key}" for key in keys) for keys in (MAY_CHANGE, HOW))
    return Step(
        name, stage.inputs, stage.run_stage, after, stage.check, resumable=True, may_change=may_change, stays=stays
    )


def _evaluation(point: str) -> Step:
    after = ("base",) if point == "base" else (point, "evaluation/base")
    return Step(
        f"evaluation/{point}",
        evaluate.inputs,
        partial(_evaluate, point=point),
        after,
        evaluate.check,
        resumable=True,
        short=True,
        beside=(f"evaluation/{evaluate.ORIGINAL}",),
    )


def _evaluate(run: Run, directory: Path, *, point: str) -> Mapping[str, Any]:
    return evaluate.run_evaluation(run, directory, point)


STEPS = (
    Step("base", base.inputs, base.run_stage, alone=True),
    _evaluation("base"),
    Step("vocabulary", vocabulary.inputs, vocabulary.run_stage, ("base",), vocabulary.check),
    _evaluation("vocabulary"),
    _training("pretrain", pretrain, ("vocabulary",)),
    _evaluation("pretrain"),
    _training("translate", translate, ("pretrain",)),
    _evaluation("translate"),
    Step("recover", recover.inputs, recover.run_stage, ("translate",), recover.check, resumable=True),
    _training("transfer", transfer, ("translate", "recover")),
    _evaluation("transfer"),
    Step("export", export.inputs, export.run_stage, ("transfer",), alone=True),
    Step(
        "report",
        report.inputs,
        report.run_stage,
        (*(f"evaluation/{point}" for point in report.POINTS), "recover", "export"),
        alone=True,
        beside=("evaluation/results.json", "report.html"),
    ),
)
NAMES = tuple(step.name for step in STEPS)
# What lies in a work directory beside its steps.
RUN, VERSIONS = "run.yaml", "versions.json"


def directory_of(name: str) -> str:
    """A step's directory below the work directory. The report's page and results lie outside of its own."""
    return "evaluation/report" if name == "report" else name


def artifact(workdir: Path, name: str) -> Artifact:
    """The artifact of a step."""
    return Artifact(workdir / directory_of(name), name)


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

    workdir: a directory for this process alone, or where several are at work together. `force` begins a step and all
    that builds on it anew. `since`: when the process began, by `time.monotonic`. `profile`: steps of each training
    stage that are traced. Returns whether anything had to be done.
    Raises UserError for bad input, before any model is loaded where that can be known; Preempted when stopped.
    """
    for given, option in ((until, "--until"), (force, "--force")):
        if given is not None and given not in NAMES:
            raise UserError(f"{option} {given}: no such stage; the stages are {', '.join(NAMES)}")
    gone = _with_all_that_builds_on(force) if force is not None else set()
    with _begun(Run(config, workdir, progress, interrupt, since=since, profile=profile), gone) as (run, inputs, states):
        return _run(run, inputs, states, until)


def plan(
    config: Config,
    workdir: Path | Site,
    progress: Progress,
    interrupt: Interrupt,
    show: Callable[[Run], None],
    *,
    since: float | None = None,
) -> None:
    """Do what comes before the first training, then let `show` tell of the trainings; raises as `run_pipeline` does."""
    with _begun(Run(config, workdir, progress, interrupt, since=since), set()) as (run, inputs, states):
        for step in STEPS:
            if step.name == "vocabulary":
                # The base is there, and the rest can be looked at.
                _check(run, STEPS)
            if step.name in ("base", "vocabulary") and states[step.name] != "done":
                with run.ledger.stage(step.name, anew=True):
                    _do(run, step, inputs[step.name], resume=False)
        show(run)


@contextmanager
def _begun(run: Run, gone: Set[str]) -> Iterator[tuple[Run, dict[str, dict[str, Any]], dict[str, State]]]:
    """Hold the work directory, look at what is there, and remove the steps that are to go; with the ledger open.

    Gives the run, each step's inputs, and the states of the steps that stay.
    """
    site = run.site
    for place in (run.workdir, site.storage.name):
        check_place(place)

    def tell(message: str) -> None:
        run.progress.say(message)

    with site.held(tell):
        site.pull(RUN, HASHES, LEDGER)
        day = run.peers.run_on_primary("the date", partial(_began_on, run))
        run.config = run.config.model_copy(update={"date": date.fromisoformat(str(day))})
        # Every step's inputs first: a path that does not exist is found before an hour of training, not after. The
        # primary's hashes are the others', too, of files that all see.
        inputs = run.peers.run_primary_first("inputs", partial(_looked_at, run))
        run.peers.require_equal(_hashes(inputs))
        # Nothing is written to the store meanwhile, so all hosts fetch at once.
        for step in STEPS:
            if step.name not in gone:
                site.pull(directory_of(step.name), *step.beside)
        # What stays is looked at before anything goes: a run that is refused has removed nothing.
        inputs, states = run.peers.run_on_primary("states", partial(_looked_up, run, inputs, gone)) or ({}, {})
        if run.primary:
            _forget(run, gone)
            _write_run_file(run.workdir, run.config)
        site.push(RUN, VERSIONS)
        run.peers.barrier("begun")
        try:
            with run.ledger:
                yield run, inputs, states
        except BaseException:
            # Why the run ended matters more than that the last of it could not be kept.
            with suppress(UserError, OSError):
                site.push(HASHES, LEDGER)
            raise
        site.push(HASHES, LEDGER)


def _began_on(run: Run) -> str:
    """The day that the run is told it is: the config's, else that on which it began, which run.yaml keeps."""
    path = run.workdir / RUN
    kept = recorded_date(path) if run.config.date is None and path.exists() else None
    return (kept or run.today).isoformat()


def _looked_at(run: Run) -> dict[str, dict[str, Any]]:
    vocabulary.require_language(run)
    vocabulary.require_corpus(run)
    evaluate.require_held_out(run)
    return _all_inputs(run)


def _hashes(inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What of the inputs each host reads by itself: the hashes of files."""
    found = {key: value for of_step in inputs.values() for key, value in of_step.items() if " " in key}
    return {key: str(value) for key, value in found.items() if not key.startswith("after ")}


def _looked_up(
    run: Run, inputs: Mapping[str, dict[str, Any]], gone: Set[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, State]]:
    """The steps' inputs, of those that are done as they were made, and the states of the steps that stay."""
    settled: dict[str, dict[str, Any]] = {}
    for step in STEPS:
        given = settled[step.name] = {**inputs[step.name], **_before(step, settled)}
        place = artifact(run.workdir, step.name)
        manifest = place.manifest() if step.stays and step.name not in gone else None
        if manifest is not None and manifest["state"] == "done":
            for key, (old, new) in place.changes(given).items():
                if key in step.stays:
                    given[key] = old
                    stays = f"  {step.name} is done, and stays as made: {key} {old}, not {new}"
                    run.progress.say(stays, style="yellow")
    return settled, _states(run, settled, gone)


def _before(step: Step, inputs: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """The fingerprints of the steps that a step reads."""
    return {f"after {name}": fingerprint(inputs[name]) for name in step.after}


def _states(run: Run, inputs: Mapping[str, dict[str, Any]], gone: Set[str]) -> dict[str, State]:
    def state(step: Step) -> State:
        place, given = artifact(run.workdir, step.name), inputs[step.name]
        manifest = place.manifest()
        if step.short and manifest is not None and manifest["state"] == "running" and place.changes(given):
            return "absent"
        return place.state(given, step.may_change)

    return {step.name: state(step) for step in STEPS if step.name not in gone}


def _run(run: Run, inputs: Mapping[str, dict[str, Any]], states: Mapping[str, State], until: str | None) -> bool:
    """Run the steps that are not done, with the ledger open. Returns whether there were any."""
    todo = [step for step in STEPS[: _end(until)] if states.get(step.name) != "done"]
    checked = False
    for step in todo:
        if step.after and not checked:
            # The base is there. What else the steps need is looked at now, not after hours of their predecessors.
            with run.ledger.spend("init"):
                _check(run, todo)
            checked = True
        resume = step.resumable and states.get(step.name) == "running"
        measures = step.name.startswith("evaluation/")
        with run.ledger.stage(step.name, anew=not resume), run.ledger.spend("validate" if measures else "other"):
            _do(run, step, inputs[step.name], resume=resume)
        if run.peers.any(run.interrupt.requested):
            raise Preempted(f"{step.name}: stopped, what is done is saved")
    return bool(todo)


def _check(run: Run, steps: Sequence[Step]) -> None:
    def look() -> None:
        base.check(run)
        for check in dict.fromkeys(step.check for step in steps):
            if check is not None:
                check(run)

    run.peers.run_on_all(look)


def _do(run: Run, step: Step, inputs: dict[str, Any], *, resume: bool) -> None:
    place, name = artifact(run.workdir, step.name), directory_of(step.name)
    run.progress.say(Text.assemble((step.name, "bold"), " goes on" if resume else ""))
    for key, (old, new) in (place.changes(inputs) if resume else {}).items():
        run.progress.say(f"  goes on with another {key}: {old} -> {new}", style="yellow")
    if run.primary:
        if not resume:
            run.site.storage.remove(name)
            place.clear()
        if step.resumable:
            place.begin(inputs)
            run.site.push(name)
    run.peers.barrier(step.name)
    started = time.monotonic()

    def work() -> dict[str, Any]:
        return dict(step.work(run, place.directory))

    summary = run.peers.run_on_primary(step.name, work) if step.alone else work()
    seconds = time.monotonic() - started
    if run.primary:
        place.finish(inputs, {**(summary or {}), "seconds": seconds})
    run.keep()
    run.site.publish(*step.beside, name)
    run.progress.say(Text.assemble(f"  {(summary or {})['text']}  ", (f"{seconds:.0f} s", "dim")))


def _all_inputs(run: Run) -> dict[str, dict[str, Any]]:
    """Each step's inputs as dotted keys, with the fingerprints of the steps that it reads."""
    inputs: dict[str, dict[str, Any]] = {}
    for step in STEPS:
        own = {k: v for key, value in step.inputs(run).items() for k, v in flatten(key, value).items()}
        inputs[step.name] = {**own, **_before(step, inputs)}
    return inputs


def _with_all_that_builds_on(name: str) -> set[str]:
    gone = {name}
    for step in STEPS:
        if gone & set(step.after):
            gone.add(step.name)
    return gone


def _forget(run: Run, gone: Set[str]) -> None:
    # The last first: a kill in between leaves no step that builds on one that is gone.
    for step in reversed(STEPS):
        if step.name in gone:
            run.site.storage.remove(directory_of(step.name))
            artifact(run.workdir, step.name).clear()


def _end(until: str | None) -> int:
    if until is None:
        return len(STEPS)
    end = NAMES.index(until) + 1
    if end < len(NAMES) and NAMES[end] == f"evaluation/{until}":
        end += 1
    return end


def _write_run_file(workdir: Path, config: Config) -> None:
    write_text(workdir / RUN, f"# transllm-jax {version('transllm-jax')}\n{config.to_yaml()}")
    write_json(workdir / VERSIONS, {name: version(name) for name in report.VERSIONS})
