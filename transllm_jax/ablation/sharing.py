"""No step is done twice: what another run has made from the same inputs is linked into a run's directory.

Files of a finished step are never changed in place, only replaced; so two runs can share them as hard links.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transllm_jax.disk import whole, write_json
from transllm_jax.errors import UserError
from transllm_jax.stages.manifest import Artifact, fingerprint
from transllm_jax.stages.steps import STEPS, Inputs, Step, artifact

# Smaller files are copied, so that an editor that writes in place changes one run only.
SMALL = 1 << 20
# Not taken along: they are for a training that goes on.
_LEFT_BEHIND = ("checkpoints", "profile")
# What the answers of the original model do not depend on, of the inputs of stage `recover`.
_AFTER_ANSWERS = ("after translate", "recover.translate_", "recover.filters", "recover.checks", "recover.sentences")
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Made:
    """Where a step was made."""

    workdir: Path
    inputs: Mapping[str, Any]


class Shelf:
    """The finished steps of all runs, by step and inputs."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], Made] = {}
        self._answers: dict[str, Path] = {}

    def add(self, workdir: Path, steps: Iterable[Step] = STEPS) -> None:
        """Note the finished steps of a run's directory."""
        for step in steps:
            manifest = _manifest(artifact(workdir, step.name))
            if manifest is None:
                continue
            inputs = manifest["inputs"]
            if manifest["state"] == "done" and "fingerprint" in manifest:
                self._made.setdefault((step.name, manifest["fingerprint"]), Made(workdir, inputs))
                if step.name == "recover" and (workdir / "recover" / ANSWERS).is_file():
                    base = _manifest(artifact(workdir, "base")) or {}
                    self._answers.setdefault(
                        _answers_key(base.get("fingerprint"), inputs), workdir / "recover" / ANSWERS
                    )

    def find(self, step: str, inputs: Inputs) -> Made | None:
        """Where a step was made with these inputs; None if nowhere."""
        return self._made.get((step, fingerprint(inputs)))

    def answers(self, inputs: Mapping[str, Inputs]) -> Path | None:
        """The original model's answers for a run's stage `recover`, made by another run; None if there are none.

        inputs: of all steps of the run.
        """
        return self._answers.get(answers_key(inputs))


def answers_key(inputs: Mapping[str, Inputs]) -> str:
    """A hash of what the original's answers in stage `recover` depend on. inputs: of all steps of a run."""
    return _answers_key(fingerprint(inputs["base"]), inputs["recover"])


def _manifest(place: Artifact) -> dict[str, Any] | None:
    try:
        return place.manifest()
    except UserError:
        return None  # a damaged one is no result


def _answers_key(base: str | None, recover: Mapping[str, Any]) -> str:
    own = {key: value for key, value in recover.items() if not key.startswith(_AFTER_ANSWERS)}
    return fingerprint({"base": base, "own": own})


def link_step(step: Step, made: Made, workdir: Path) -> None:
    """Put a step of another run into a run's directory: whole, or not there."""
    target = workdir / step.directory
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    if target.exists():
        shutil.rmtree(target)  # without a manifest: what an interrupted command left
    _link_tree(made.workdir / step.directory, partial)
    for name in step.other_files:
        source, copy = made.workdir / name, workdir / name
        if source.is_file() and not copy.exists():
            with whole(copy) as new:
                shutil.copyfile(source, new)
    os.replace(partial, target)


def begin_with_answers(answers: Path, workdir: Path, inputs: Inputs) -> None:
    """Begin stage `recover` with the original model's answers of another run; it goes on with translating them."""
    target = workdir / "recover"
    partial = target.with_name(".recover.part")
    shutil.rmtree(partial, ignore_errors=True)
    if target.exists():
        shutil.rmtree(target)
    partial.mkdir(parents=True)
    shutil.copyfile(answers, partial / ANSWERS)
    write_json(partial / "manifest.json", {"step": "recover", "state": "running", "inputs": inputs})
    os.replace(partial, target)


def _link_tree(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            if entry.name not in _LEFT_BEHIND:
                _link_tree(entry, target / entry.name)
            continue
        if entry.stat().st_size > SMALL:
            try:
                os.link(entry, target / entry.name)
                continue
            except OSError:
                pass  # another disk, or one without links
        shutil.copy2(entry, target / entry.name)


def drop_checkpoints(workdir: Path) -> None:
    """Remove the checkpoints of finished trainings, which only a training that goes on needs."""
    for step in STEPS:
        manifest = _manifest(artifact(workdir, step.name))
        if manifest is not None and manifest["state"] == "done":
            shutil.rmtree(workdir / step.directory / "checkpoints", ignore_errors=True)
