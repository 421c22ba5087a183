"""The steps of a run in their order: what is done is skipped, what was cut off goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transllm_jax.artifacts import Artifact, State, fingerprint, flatten, locked, write_json
from transllm_jax.config import Config
from transllm_jax.errors import UserError
from transllm_jax.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import base, evaluate, export, pretrain, recover, report, transfer, translate, vocabulary
from transllm_jax.stages.run import Run
from transllm_jax.stages.training import MAY_CHANGE

Inputs = Callable[[Run], dict[str, Any]]
Work = Callable[[Run, Path], Mapping[str, Any]]
Check = Callable[[Run], None]


@dataclass(frozen=True)
class Step:
    """A step writes one directory. `after` names the steps whose results it reads.

    `check` finds what is wrong with the step's part of the config and its files, given the base model alone.
    A resumable step keeps what it had when it was cut off; another is begun anew. `may_change` are config keys that may
    be others when it goes on.
    """

    name: str
    inputs: Inputs
    work: Work
    after: tuple[str, ...] = ()
    check: Check | None = None
    resumable: bool = False
    may_change: tuple[str, ...] = ()


def _training(name: str, stage: Any, after: tuple[str, ...]) -> Step:
    may_change = tuple(f"{name}.{key}" for key in MAY_CHANGE)
    return Step(name, stage.inputs, stage.run_stage, after, stage.check, resumable=True, may_change=may_change)


def _evaluation(point: str) -> Step:
    after = ("base",) if point == "base" else (point, "evaluation/base")
    return Step(f"evaluation/{point}", evaluate.inputs, partial(_evaluate, point=point), after, evaluate.check)


def _evaluate(run: Run, directory: Path, *, point: str) -> Mapping[str, Any]:
    return evaluate.run_evaluation(run, directory, point)


STEPS = (
    Step("base", base.inputs, base.run_stage),
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
    Step("export", export.inputs, export.run_stage, ("transfer",)),
    Step(
        "report",
        report.inputs,
        report.run_stage,
        (*(f"evaluation/{point}" for point in report.POINTS), "recover", "export"),
    ),
)
NAMES = tuple(step.name for step in STEPS)


def artifact(workdir: Path, name: str) -> Artifact:
    """The artifact of a step. The report's page and results lie outside of its own directory."""
    directory = workdir / ("evaluation/report" if name == "report" else name)
    return Artifact(directory, name)


def run_pipeline(
    config: Config,
    workdir: Path,
    progress: Progress,
    interrupt: Interrupt,
    *,
    until: str | None = None,
    force: str | None = None,
    since: float | None = None,
) -> bool:
    """Run what is not done yet, up to and including stage `until` with its evaluation.

    `force` begins a step and all that builds on it anew. `since`: when the process began, by `time.monotonic`.
    Returns whether anything had to be done.
    Raises UserError for bad input, before any model is loaded where that can be known; Preempted when stopped.
    """
    for given, option in ((until, "--until"), (force, "--force")):
        if given is not None and given not in NAMES:
            raise UserError(f"{option} {given}: no such stage; the stages are {', '.join(NAMES)}")
    with locked(workdir):
        run = Run(config, workdir, progress, interrupt, since=since)
        # Every step's inputs first: a path that does not exist is found before an hour of training, not after.
        vocabulary.require_language(run)
        evaluate.require_held_out(run)
        inputs = _all_inputs(run)
        gone = _with_all_that_builds_on(force) if force is not None else set()
        # What stays is looked at before anything goes: a run that is refused has removed nothing.
        states = {
            step.name: artifact(workdir, step.name).state(inputs[step.name], step.may_change)
            for step in STEPS
            if step.name not in gone
        }
        _forget(workdir, gone)
        _write_run_file(workdir, config)
        with run.ledger:
            return _run(run, inputs, states, until)


def plan(
    config: Config,
    workdir: Path,
    progress: Progress,
    interrupt: Interrupt,
    show: Callable[[Run], None],
    *,
    since: float | None = None,
) -> None:
    """Do what comes before the first training, then let `show` tell of the trainings; raises as `run_pipeline` does."""
    with locked(workdir):
        run = Run(config, workdir, progress, interrupt, since=since)
        vocabulary.require_language(run)
        evaluate.require_held_out(run)
        inputs = _all_inputs(run)
        states = {step.name: artifact(workdir, step.name).state(inputs[step.name], step.may_change) for step in STEPS}
        _write_run_file(workdir, config)
        with run.ledger:
            for step in STEPS:
                if step.name == "vocabulary":
                    # The base is there, and the rest can be looked at.
                    _check(run, STEPS)
                if step.name in ("base", "vocabulary") and states[step.name] != "done":
                    with run.ledger.stage(step.name, anew=True):
                        _do(run, step, inputs[step.name], resume=False)
            show(run)


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
        run.interrupt.check(step.name)
    return bool(todo)


def _check(run: Run, steps: Sequence[Step]) -> None:
    for check in dict.fromkeys(step.check for step in steps):
        if check is not None:
            check(run)


def _do(run: Run, step: Step, inputs: dict[str, Any], *, resume: bool) -> None:
    place = artifact(run.workdir, step.name)
    run.progress.say(f"[bold]{step.name}[/bold]{' goes on' if resume else ''}")
    for key, (old, new) in (place.changes(inputs) if resume else {}).items():
        run.progress.say(f"  [yellow]goes on with another {key}: {old} -> {new}")
    if not resume:
        place.clear()
    if step.resumable:
        place.begin(inputs)
    started = time.monotonic()
    summary = dict(step.work(run, place.directory))
    seconds = time.monotonic() - started
    place.finish(inputs, {**summary, "seconds": seconds})
    run.progress.say(f"  {summary['text']}  [dim]{seconds:.0f} s[/dim]")


def _all_inputs(run: Run) -> dict[str, dict[str, Any]]:
    """Each step's inputs as dotted keys, with the fingerprints of the steps that it reads."""
    inputs: dict[str, dict[str, Any]] = {}
    for step in STEPS:
        own = {k: v for key, value in step.inputs(run).items() for k, v in flatten(key, value).items()}
        inputs[step.name] = {**own, **{f"after {name}": fingerprint(inputs[name]) for name in step.after}}
    return inputs


def _with_all_that_builds_on(name: str) -> set[str]:
    gone = {name}
    for step in STEPS:
        if gone & set(step.after):
            gone.add(step.name)
    return gone


def _forget(workdir: Path, gone: Set[str]) -> None:
    # The last first: a kill in between leaves no step that builds on one that is gone.
    for step in reversed(STEPS):
        if step.name in gone:
            artifact(workdir, step.name).clear()


def _end(until: str | None) -> int:
    if until is None:
        return len(STEPS)
    end = NAMES.index(until) + 1
    if end < len(NAMES) and NAMES[end] == f"evaluation/{until}":
        end += 1
    return end


def _write_run_file(workdir: Path, config: Config) -> None:
    path = workdir / "run.yaml"
    path.write_text(f"# transllm-jax {version('transllm-jax')}\n{config.to_yaml()}", encoding="utf-8")
    write_json(workdir / "versions.json", {name: version(name) for name in report.VERSIONS})
