"""Which keys of a training stage may change where it was cut off, and where it is done; each key has its line here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import EXAMPLES, tiny_run

from transllm_jax.config import Pretraining, Transfer, Validation, load_config
from transllm_jax.errors import UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.progress import Progress
from transllm_jax.stages import pipeline, steps
from transllm_jax.stages.manifest import State
from transllm_jax.stages.run import Run

# Where the stage was cut off, where it is done: whether the change is taken.
FREE, CUT_OFF, NEVER = (True, True), (True, False), (False, False)
# Key -> another value than that of the tiny run with validation, and when it is taken.
KEYS: Mapping[str, tuple[Any, tuple[bool, bool]]] = {
    # How often something is written down.
    "log_every": (3, FREE),
    "checkpoint_every": (5, FREE),
    "keep_checkpoints": (7, FREE),
    # How the result is computed, and when a run ends in an error.
    "max_skipped": (9, FREE),
    "remat": ("full", FREE),
    "accumulate": (2, FREE),
    # Where the stage ends, and which checkpoint it ends with: a stage that is done would have another result.
    "steps": (6, CUT_OFF),
    "epochs": (2.0, CUT_OFF),
    "validation": (None, CUT_OFF),
    "validation.every": (3, CUT_OFF),
    "validation.rows": (2, CUT_OFF),
    "validation.patience": (1, CUT_OFF),
    "validation.source": ({"path": str(EXAMPLES / "english.heldout.txt")}, CUT_OFF),
    # What the result is: steps that are done would have been others.
    "batch_size": (4, NEVER),
    "length": (32, NEVER),
    "learning_rate": (0.5, NEVER),
    "new_rows_multiplier": (3.0, NEVER),
    "schedule": ("linear", NEVER),
    "warmup_ratio": (0.5, NEVER),
    "warmup_steps": (1, NEVER),
    "decay_ratio": (0.3, NEVER),
    "final_fraction": (0.3, NEVER),
    "weight_decay": (0.3, NEVER),
    "clip_norm": (0.3, NEVER),
    "z_loss": (0.3, NEVER),
    "sources": ([{"path": str(EXAMPLES / "english.train.txt"), "weight": 1.0}], NEVER),
    "pairs": ({"path": str(EXAMPLES / "pairs.train.tsv"), "format": "pairs", "max_items": 9}, NEVER),
    "contamination": (False, NEVER),
    "answers": ("direct", NEVER),
    "chains": (0.9, NEVER),
    "english": (0.9, NEVER),
    "recovery": ("token", NEVER),
    "recovery_weight": (2.0, NEVER),
    "translations": (0.9, NEVER),
}
VALIDATION = {"source": {"path": str(EXAMPLES / "text.heldout.txt"), "max_bytes": 4000}, "every": 2, "rows": 4}


def write(here: Path, model: Path, stage: str, change: Mapping[str, Any], validation: Any = VALIDATION) -> Path:
    tree: dict[str, Any] = tiny_run(model, here / "run")
    section = tree[stage]
    if validation is not None:
        section["validation"] = {**validation}
    # What must be given beside it, or left out.
    if "schedule" not in change and "decay_ratio" in change:
        section["schedule"] = "wsd"
    for key, other in (("warmup_steps", "warmup_ratio"), ("epochs", "steps")):
        if key in change:
            del section[other]
    for key, value in change.items():
        *above, last = key.split(".")
        (section[above[0]] if above else section)[last] = value
    (here / "config.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return here / "config.yaml"


def looked_up(config: Path) -> tuple[Run, dict[str, dict[str, Any]], dict[str, State]]:
    settings = load_config(config)
    run = Run(settings, Path(settings.workdir), Progress(quiet=True), Interrupt())
    inputs, states = pipeline.look_at_states(run, pipeline.look_at_inputs(run), set())
    return run, inputs, states


def stand(config: Path, stage: str, state: str) -> None:
    """Leave the manifests of a run in which this stage is cut off, or all is done."""
    run, inputs, _ = looked_up(config)
    for step in steps.STEPS:
        place = steps.artifact(run.workdir, step.name)
        if step.name == stage and state == "running":
            place.begin(inputs[step.name])
            break
        place.finish(inputs[step.name], {})


def cases() -> Iterator[tuple[str, str]]:
    for stage, section in (("pretrain", Pretraining), ("transfer", Transfer)):
        below = {f"validation.{key}" for key in Validation.model_fields}
        for key in sorted({*section.model_fields, *below}):
            yield stage, key


@pytest.mark.parametrize(("stage", "key"), list(cases()))
def test_each_key_of_a_training_stage(tiny_model: Path, tmp_path: Path, stage: str, key: str) -> None:
    value, taken = KEYS[key]  # a new key needs a line
    given = {"schedule": "wsd"} if key == "decay_ratio" else {}
    before = write(tmp_path, tiny_model, stage, given)
    for state, free in zip(("running", "done"), taken, strict=True):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        write(tmp_path, tiny_model, stage, given)
        (tmp_path / "run").mkdir()
        stand(before, stage, state)
        after = write(tmp_path, tiny_model, stage, {**given, key: value})
        if free:
            _, _, states = looked_up(after)
            # And what builds on it, by its fingerprint, is done as it was.
            assert states[stage] == state
            assert set(states.values()) == ({"done"} if state == "done" else {"done", "running", "absent"})
        else:
            with pytest.raises(UserError, match=rf"{stage} was made with other inputs: .*--force {stage}") as refused:
                looked_up(after)
            assert f"{stage}.{key.split('.')[0]}" in str(refused.value)


@pytest.mark.parametrize("validation", [None, VALIDATION])
def test_validation_comes_and_goes(tiny_model: Path, tmp_path: Path, validation: Any) -> None:
    other = None if validation else VALIDATION
    (tmp_path / "run").mkdir()
    stand(write(tmp_path, tiny_model, "pretrain", {}, validation), "pretrain", "running")
    _, _, states = looked_up(write(tmp_path, tiny_model, "pretrain", {}, other))
    assert states["pretrain"] == "running"
    stand(write(tmp_path, tiny_model, "pretrain", {}, validation), "pretrain", "done")
    with pytest.raises(UserError, match=r"pretrain\.validation \("):
        looked_up(write(tmp_path, tiny_model, "pretrain", {}, other))


def test_a_held_out_file_that_changed_changes_the_validation(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "held.txt"
    file.write_text("ฝนตก\n", encoding="utf-8")
    config = write(tmp_path, tiny_model, "pretrain", {"validation.source": {"path": str(file)}})
    (tmp_path / "run").mkdir()
    stand(config, "pretrain", "running")
    file.write_text("แดดออก\n", encoding="utf-8")
    assert looked_up(config)[2]["pretrain"] == "running"
