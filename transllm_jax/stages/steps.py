"""The steps of a run in order: what each reads, which steps it follows, and what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transllm_jax.choices import POINTS
from transllm_jax.errors import UserError
from transllm_jax.stages import base, evaluate, export, pretrain, recover, report, transfer, translate, vocabulary
from transllm_jax.stages.manifest import Artifact, fingerprint, flatten
from transllm_jax.stages.run import Run
from transllm_jax.stages.training import MAY_CHANGE, METHOD

# A step's inputs as dotted config keys and hashes of files.
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A step writes one directory. `after` names the steps whose results it reads.

    inputs: returns what the step reads. work: does the step in its directory, and returns a summary with a line `text`.
    check: finds faults in the step's config and files; of the model it needs only the base.
    resumable: a stopped step continues; if not, it begins again.
    may_change: config keys that may differ when a stopped step continues. stays: keys that may differ when the step is
    done; its result stays as it was made. short: the step takes minutes, so it begins again if any input has changed.
    alone: only the primary does the work, which needs no devices. other_files: files outside its directory.
    """

    name: str
    inputs: Callable[[Run], Inputs]
    work: Callable[[Run, Path], Mapping[str, Any]]
    after: tuple[str, ...] = ()
    check: Callable[[Run], None] | None = None
    resumable: bool = False
    may_change: tuple[str, ...] = ()
    stays: tuple[str, ...] = ()
    short: bool = False
    alone: bool = False
    other_files: tuple[str, ...] = ()

    @property
    def directory(self) -> str:
        """The step's directory below the work directory."""
        # The report's page and results are outside of it.
        return "evaluation/report" if self.name == "report" else self.name

    @property
    def activity(self) -> str:
        """The ledger's category for the step's time; training is recorded separately."""
        return "validate" if self.name.startswith("evaluation/") else "other"


def _training(name: str, stage: Any, after: tuple[str, ...]) -> Step:
    may_change, stays = (tuple(f"{name}.{key}" for key in keys) for keys in (MAY_CHANGE, METHOD))
    return Step(
        name, stage.inputs, stage.run_stage, after, stage.check, resumable=True, may_change=may_change, stays=stays
    )


def _evaluation(point: str) -> Step:
    return Step(
        f"evaluation/{point}",
        evaluate.inputs,
        partial(evaluate.run_evaluation, point=point),
        ("base",) if point == "base" else (point, "evaluation/base"),
        evaluate.check,
        resumable=True,
        short=True,
        other_files=(f"evaluation/{evaluate.ORIGINAL}",),
    )


STEPS = (
    Step("base", base.inputs, base.run_stage, alone=True),
    _evaluation("base"),
    Step("vocabulary", vocabulary.inputs, vocabulary.run_stage, ("base",), vocabulary.check),
    _evaluation("vocabulary"),
    _training("pretrain", pretrain, ("vocabulary",)),
    _evaluation("pretrain"),
    _training("translate", translate, ("pretrain",)),
    _evaluation("translate"),
    Step(
        "recover",
        recover.inputs,
        recover.run_stage,
        ("translate",),
        recover.check,
        resumable=True,
        # Nothing that was generated depends on them.
        may_change=("recover.checks", *recover.WHERE),
        stays=recover.WHERE,
    ),
    _training("transfer", transfer, ("translate", "recover")),
    _evaluation("transfer"),
    Step("export", export.inputs, export.run_stage, ("transfer",), alone=True),
    Step(
        "report",
        report.inputs,
        report.run_stage,
        (*(f"evaluation/{point}" for point in POINTS), "recover", "export"),
        alone=True,
        other_files=("evaluation/results.json", "report.html"),
    ),
)
NAMES = tuple(step.name for step in STEPS)


def artifact(workdir: Path, name: str) -> Artifact:
    """The artifact of a step."""
    return Artifact(workdir / STEPS[index(name)].directory, name)


def index(name: str, option: str = "step") -> int:
    """A step's position in `STEPS`. Raises UserError if there is no such step; option: named in the message."""
    if name not in NAMES:
        raise UserError(f"{option} {name}: no such stage; the stages are {', '.join(NAMES)}")
    return NAMES.index(name)


def steps_until(name: str | None) -> tuple[Step, ...]:
    """The steps up to and including this one with its evaluation; all steps for None. Raises UserError."""
    if name is None:
        return STEPS
    end, evaluation = index(name, "--until"), f"evaluation/{name}"
    return STEPS[: (NAMES.index(evaluation) if evaluation in NAMES else end) + 1]


def dependents(name: str) -> set[str]:
    """This step and all steps that build on it. Raises UserError."""
    found = {NAMES[index(name, "--force")]}
    for step in STEPS:
        if found & set(step.after):
            found.add(step.name)
    return found


def all_inputs(run: Run) -> dict[str, Inputs]:
    """The inputs of each step, with the fingerprints of the steps that it follows."""
    found: dict[str, Inputs] = {}
    for step in STEPS:
        own = {k: v for key, value in step.inputs(run).items() for k, v in flatten(key, value).items()}
        found[step.name] = {**own, **fingerprints(step, found)}
    return found


def fingerprints(step: Step, inputs: Mapping[str, Inputs]) -> dict[str, str]:
    """The fingerprints of the steps that a step follows."""
    return {f"after {name}": fingerprint(inputs[name]) for name in step.after}


def file_hashes(inputs: Mapping[str, Inputs]) -> dict[str, str]:
    """The hashes of files among the inputs. Each host may have its own copies, which must be equal."""
    found = {key: value for of_step in inputs.values() for key, value in of_step.items() if " " in key}
    return {key: str(value) for key, value in found.items() if not key.startswith("after ")}
