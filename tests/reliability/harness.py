"""Runs of the tiny model that come to harm: how they are started, harmed, resumed and compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import yaml
from conftest import EXAMPLES, tiny_run
from processes import virtual_devices

from transllm_jax.training.arrays import load_arrays

HERE = Path(__file__).parent
TRAINED = ("pretrain", "translate", "transfer")
STEPS, EVERY = 12, 2
UNTIL = ("--until", "pretrain")
# What follows from config and data alone, of a whole run; the same bytes for every run.
FILES = (
    *(f"{stage}/{name}.jsonl" for stage in TRAINED for name in ("metrics", "validation", "skipped")),
    "recover/answers.jsonl",
    "recover/translations.jsonl",
    "recover/chains.jsonl",
    "base/model.safetensors",
    "vocabulary/tokenizer.json",
    *(f"evaluation/{point}/results.json" for point in ("base", "vocabulary", *TRAINED)),
)
Harm = Mapping[str, Any]


@dataclass(frozen=True)
class Ended:
    """A command that ended: its exit code (below 0: the signal), what it printed, and its events, (kind, detail)."""

    code: int
    out: str
    errors: str
    events: list[tuple[str, str]]

    @property
    def counts(self) -> Counter[str]:
        """How many events of each kind there were."""
        return Counter(kind for kind, _ in self.events)

    @property
    def batches(self) -> list[tuple[str, int, str]]:
        """The steps that were begun: (stage, step, hash of the batch)."""
        found = [detail.split() for kind, detail in self.events if kind == "batch"]
        return [(stage, int(step), digest) for stage, step, digest in found]

    def line(self) -> str:
        """The one line on standard error that says what is wrong; nothing else may stand there."""
        assert "Traceback" not in self.errors, self.errors
        lines = self.errors.strip().splitlines()
        assert len(lines) == 1, self.errors
        return lines[0]


def write_config(path: Path, model: Path, **changes: Any) -> Path:
    """A config with many steps, checkpoints and validations in its training stages.

    changes: of keys of the stage `pretrain`, or whole sections of the config.
    """
    config: dict[str, Any] = tiny_run(model, path.with_name("never"))
    often = {"steps": STEPS, "checkpoint_every": EVERY}
    for stage in TRAINED:
        config[stage] |= often
    validation = {"source": {"path": str(EXAMPLES / "text.heldout.txt"), "max_bytes": 4000}, "every": 5, "rows": 4}
    config["pretrain"] |= {"validation": validation}
    for key, value in changes.items():
        target = config if key in config else config["pretrain"]
        target[key] = value
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return path


def command(config: Path, workdir: Path, *arguments: str, harm: Harm | None = None) -> tuple[list[str], Path]:
    """The command line of a recorded run, and where its events are written."""
    number = len(list(workdir.parent.glob(f"{workdir.name}.*.log")))
    log = workdir.with_name(f"{workdir.name}.{number}.log")
    recorded = [sys.executable, str(HERE / "recorded.py"), str(log), json.dumps(harm)]
    return [*recorded, "run", str(config), *arguments, "--workdir", str(workdir)], log


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of a run: the CPU as so many devices, a wide terminal."""
    flags = {"XLA_FLAGS": virtual_devices(devices)} if devices > 1 else {}
    inherited = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    # As conftest.py sets it for itself: what compiles in a tenth of a second is kept too.
    return inherited | {"COLUMNS": "300", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"} | flags


def run(config: Path, workdir: Path, *arguments: str, harm: Harm | None = None, devices: int = 1) -> Ended:
    """Run the pipeline in a process of its own."""
    line, log = command(config, workdir, *arguments, harm=harm)
    done = subprocess.run(
        line, env=environment(devices), capture_output=True, text=True, timeout=600, encoding="utf-8", errors="replace"
    )
    return Ended(done.returncode, done.stdout, done.stderr, read_log(log))


def read_log(log: Path) -> list[tuple[str, str]]:
    """The events of a log; the harm done is none."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    found = [tuple(line.split(" ", 1)) for line in lines]
    return [(kind, detail) for kind, detail in found if kind != "harm"]


def prepare(here: Path, model: Path, **changes: Any) -> tuple[Path, Path]:
    """A config, and a work directory with all that comes before the first training stage."""
    config = write_config(here / "config.yaml", model, **changes)
    ended = run(config, here / "prepared", "--until", "vocabulary")
    assert ended.code == 0, ended.errors
    return config, here / "prepared"


class Whole(NamedTuple):
    """An undisturbed run of the stage pretrain, and what it began with."""

    config: Path
    prepared: Path
    ended: Ended
    results: dict[str, Any]


def undisturbed(here: Path, model: Path, **changes: Any) -> Whole:
    """Run the stage pretrain with all that comes before it, in `here`; changes: of its config."""
    config, prepared = prepare(here, model, **changes)
    ended = run(config, copied(prepared, here / "whole"), *UNTIL)
    assert ended.code == 0, ended.errors
    return Whole(config, prepared, ended, results(here / "whole", ["pretrain"]))


def goes_on(whole: Whole, workdir: Path, *before: Ended) -> Ended:
    """The next run of a work directory ends as the undisturbed one; before: the processes that were at work on it."""
    ended = run(whole.config, workdir, *UNTIL)
    assert ended.code == 0, ended.errors
    assert "Traceback" not in ended.errors
    require_same(results(workdir, ["pretrain"]), whole.results)
    require_batches([*before, ended], whole.ended)
    return ended


def copied(prepared: Path, to: Path) -> Path:
    """A copy of a work directory."""
    shutil.copytree(prepared, to)
    return to


def checkpoint(stage: Path, step: int | None = None) -> dict[str, bytes]:
    """All arrays of a stage's newest (or given) checkpoint as they stand on disk: adapters, optimizer, counters."""
    steps = stage / "checkpoints"
    newest = max(int(path.name) for path in steps.iterdir() if path.name.isdigit()) if step is None else step
    with ocp.PyTreeCheckpointer() as reader:
        place = steps / str(newest) / "state"
        known = reader.metadata(place).item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), known)
        tree = reader.restore(place, restore_args=kinds)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}
    return {f"step {newest}": b"", **arrays}


def results(workdir: Path, stages: Sequence[str] = TRAINED) -> dict[str, Any]:
    """What must be the same for every run of a config: name -> bytes, or the arrays' bytes."""
    found: dict[str, Any] = {}
    for stage in stages:
        trainable = load_arrays(workdir / stage / "trainable")
        found |= {f"{stage} {name}": array.tobytes() for name, array in trainable.items()}
        found |= {f"{stage} checkpoint {name}": data for name, data in checkpoint(workdir / stage).items()}
    for name in FILES:
        if (workdir / name).exists() or name.split("/")[0] in stages:
            found[name] = (workdir / name).read_bytes() if (workdir / name).exists() else None
    return found


def require_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Fail with the names of what differs."""
    differ = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    assert not differ, f"differ from the undisturbed run: {differ}"
    assert len(found) > 20


def require_batches(processes: Sequence[Ended], undisturbed: Ended) -> None:
    """No batch is lost, none trained twice in what stands, and every one is that of the undisturbed run."""
    wanted = {(stage, step): digest for stage, step, digest in undisturbed.batches}
    stands: dict[str, int] = {}  # the steps of each stage that are done, as far as the next process knows
    for process in processes:
        seen: dict[str, int] = {}
        for stage, step, digest in process.batches:
            assert digest == wanted[stage, step], (stage, step)
            if stage in seen:
                assert step == seen[stage] + 1, f"{stage}: step {step} follows {seen[stage]}"
            else:
                # It goes on from a checkpoint: at a step that was done, none of them left out.
                assert step <= stands.get(stage, 0), f"{stage}: goes on at {step}, of {stands.get(stage, 0)} done"
            seen[stage] = step
        stands |= {stage: step + 1 for stage, step in seen.items()}
    for stage in {stage for stage, _ in wanted}:
        assert stands[stage] == 1 + max(step for name, step in wanted if name == stage), stage


def where(ended: Ended) -> str:
    """What a killed process was in, by its last events."""
    if not ended.events:
        return "start"
    kind, detail = ended.events[-1]
    if kind in ("batch", "line"):
        return "step"
    if kind in ("stage", "manifest") or (kind == "evaluation" and detail.endswith("ends")):
        return "between stages"
    return {"validate": "validation", "plan": "packing", "tokenise": "tokenising"}.get(kind, kind)
