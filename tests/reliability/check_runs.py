"""Whole runs that are stopped, doubled, changed, moved to other devices, or meet a loss that is not finite."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES
from reliability.harness import (
    EVERY,
    STEPS,
    UNTIL,
    Ended,
    Whole,
    checkpoint,
    command,
    copied,
    environment,
    goes_on,
    prepare,
    read_log,
    require_batches,
    require_same,
    results,
    run,
    undisturbed,
)

from transllm_jax.training.record.metrics import read_rows

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    here = tmp_path_factory.mktemp("whole")
    # A file of its own, so that a test may change it.
    text = here / "text.txt"
    shutil.copy(EXAMPLES / "text.train.txt", text)
    return undisturbed(here, tiny_model, sources=[{"path": str(text), "max_bytes": 20000}])


def everything(workdir: Path) -> dict[str, str]:
    """The hash of each file that holds something of value."""
    files = [path for path in workdir.rglob("*") if path.is_file() and path.name not in (".lock", "hashes.json")]
    # What a save is at work on comes and goes.
    files = [path for path in files if ".orbax-checkpoint-tmp" not in str(path)]
    return {str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Two processes


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_taken_over(whole: Whole, tmp_path: Path) -> None:
    workdir = copied(whole.prepared, tmp_path / "run")
    line, log = command(whole.config, workdir, *UNTIL, harm={"kind": "batch", "number": 5, "do": "wait"})
    first = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not log.exists() or "harm" not in log.read_text(encoding="utf-8"):
            assert first.poll() is None
            time.sleep(0.05)
        before = everything(workdir)
        second = run(whole.config, workdir, *UNTIL)
        assert second.code == 2 and f"{workdir}: another run is at work here" in second.line()
        # The ledger's thread writes now and then.
        assert everything(workdir) | {"ledger.jsonl": ""} == before | {"ledger.jsonl": ""}
    finally:
        first.kill()
        first.wait()
    assert (workdir / ".lock").exists()
    goes_on(whole, workdir, Ended(first.returncode, "", "", read_log(log)))


# Signals


@pytest.mark.parametrize(
    ("kind", "number", "what"),
    [("batch", 6, "term"), ("batch", 7, "int"), ("save", 30, "term"), ("tokenise", 2, "int"), ("validate", 1, "term")],
)
def test_asked_to_stop_it_saves_and_goes_on(whole: Whole, tmp_path: Path, kind: str, number: int, what: str) -> None:
    workdir = copied(whole.prepared, tmp_path / "run")
    ended = run(whole.config, workdir, *UNTIL, harm={"kind": kind, "number": number, "do": what})
    assert ended.code == 75, ended.errors
    first, last = ended.errors.strip().splitlines()
    assert first.startswith("stopping after the piece of work at hand") and last.endswith(
        "run the same command again to go on"
    )
    if ended.batches:
        # The step at hand was finished, and saved whatever its number.
        done = 1 + ended.batches[-1][1]
        assert f"step {done} of {STEPS}, saved" in last
        assert f"step {done}" in checkpoint(workdir / "pretrain")
    goes_on(whole, workdir, ended)


def test_asked_twice_it_stops_at_once(whole: Whole, tmp_path: Path) -> None:
    workdir = copied(whole.prepared, tmp_path / "run")
    ended = run(whole.config, workdir, *UNTIL, harm={"kind": "batch", "number": 8, "do": "int twice", "after": 0.01})
    assert ended.code == 75 and "stopped at once, the last checkpoint is kept" in ended.errors
    assert "Traceback" not in ended.errors
    goes_on(whole, workdir, ended)


# Another config


@pytest.fixture(scope="module")
def begun(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A run that was stopped after its seventh step."""
    workdir = copied(whole.prepared, tmp_path_factory.mktemp("begun") / "run")
    ended = run(whole.config, workdir, *UNTIL, harm={"kind": "batch", "number": 7, "do": "term"})
    assert ended.code == 75
    return workdir, ended


@pytest.mark.parametrize(
    ("change", "said", "steps"),
    [
        (["pretrain.steps=10"], ["pretrain.steps: 12 -> 10"], 10),
        (["pretrain.steps=14"], ["pretrain.steps: 12 -> 14"], 14),
        (["pretrain.validation.every=4"], ["pretrain.validation.every: 5 -> 4"], STEPS),
        (["pretrain.validation.rows=2"], ["pretrain.validation.rows: 4 -> 2"], STEPS),
        (["pretrain.log_every=3", "pretrain.checkpoint_every=5"], [], STEPS),
    ],
)
def test_what_may_change_changes(
    whole: Whole, begun: tuple[Path, Ended], tmp_path: Path, change: list[str], said: list[str], steps: int
) -> None:
    workdir = copied(begun[0], tmp_path / "run")
    ended = run(whole.config, workdir, *change, *UNTIL)
    assert ended.code == 0, ended.errors
    for words in said:
        assert f"goes on with another {words}" in ended.out
    # What was measured on other rows has no say.
    assert ("validations up to step 5 were of other rows" in ended.out) == ("rows" in change[0])
    assert [step for _, step, _ in ended.batches] == list(range(7, steps))
    if steps == STEPS:
        # The same bytes: only what is written down on the way is another.
        differ = {name for name, value in results(workdir, ["pretrain"]).items() if value != whole.results.get(name)}
        allowed = {"pretrain/metrics.jsonl", "pretrain/validation.jsonl"}
        # With other validations another step may be the best.
        assert differ <= allowed or "validation" in change[0]
    if "log_every" in change[0]:
        assert [row["step"] for row in read_rows(workdir / "pretrain/metrics.jsonl")] == [*range(1, 8), 9, 12]


REFUSED = {
    "lora.rank (4 -> 5)": ["lora.rank=5"],
    "pretrain.learning_rate (0.01 -> 0.02)": ["pretrain.learning_rate=0.02"],
    "pretrain.length (64 -> 32)": ["pretrain.length=32"],
    "pretrain.batch_size (2 -> 4)": ["pretrain.batch_size=4"],
    "seed (1 -> 2)": ["seed=2"],
    "vocabulary.size (140 -> 150)": ["vocabulary.size=150"],
    "language.code (th -> km)": ["language.code=km", "language.name=Khmer"],
    "text.txt (": [],
}


def test_what_may_not_change_is_refused_by_its_name_and_nothing_is_lost(
    whole: Whole, begun: tuple[Path, Ended], tmp_path: Path
) -> None:
    workdir = copied(begun[0], tmp_path / "run")
    before = everything(workdir)
    text = whole.config.with_name("text.txt")
    original = text.read_bytes()
    for named, change in REFUSED.items():
        try:
            if not change:
                text.write_bytes(original.replace(b"\n", b" x\n", 1))
            ended = run(whole.config, workdir, *change, *UNTIL)
        finally:
            text.write_bytes(original)
        assert ended.code == 2, ended.errors
        assert named in ended.line() and "--force" in ended.line()
        assert everything(workdir) == before, named
    goes_on(whole, workdir, begun[1])


# Other devices


def test_another_layout_of_devices_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    config, prepared = prepare(tmp_path, tiny_model, batch_size=8)
    one = run(config, copied(prepared, tmp_path / "one"), *UNTIL)
    assert one.code == 0, one.errors
    workdir = copied(prepared, tmp_path / "moved")
    stop = {"kind": "batch", "number": 4, "do": "term"}
    # One axis after the other, and all at once.
    mesh = ("mesh.data=2", "mesh.tensor=2")
    moved = [run(config, workdir, *mesh, *UNTIL, harm=stop, devices=8)]
    moved.append(run(config, workdir, *UNTIL, harm=stop, devices=4))
    assert [ended.code for ended in moved] == [75, 75], [ended.errors for ended in moved]
    moved.append(run(config, workdir, *UNTIL))
    assert moved[-1].code == 0, moved[-1].errors
    require_batches(moved, one)
    assert [len(ended.batches) for ended in moved] == [4, 4, 4]
    for name, key in (("metrics", "loss"), ("metrics", "gradient_norm"), ("validation", "bits_per_byte")):
        found, wanted = (
            np.array([row[key] for row in read_rows(tmp_path / which / f"pretrain/{name}.jsonl")])
            for which in ("moved", "one")
        )
        print(f"\n{name} {key}: largest relative difference {np.max(np.abs(found / wanted - 1)):.1e}")
        # Sums over a batch are added in another order on other devices: a few units of float32's last place (6e-8) in
        # each step, and Adam carries them on.
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_batch_that_the_devices_do_not_divide_is_refused(whole: Whole, tmp_path: Path) -> None:
    workdir = copied(whole.prepared, tmp_path / "run")
    ended = run(whole.config, workdir, "pretrain.batch_size=6", *UNTIL, devices=4)
    assert ended.code == 2
    assert "pretrain.batch_size: 6 rows at once cannot be cut over 4 devices" in ended.line()
    assert not (workdir / "pretrain").exists()


# Losses that are not finite


def test_a_run_that_diverges_stops_and_the_last_checkpoint_stands(whole: Whole, tmp_path: Path) -> None:
    much = ("pretrain.learning_rate=1e30", "pretrain.max_skipped=5")
    workdir = copied(whole.prepared, tmp_path / "run")
    ended = run(whole.config, workdir, *much, *UNTIL)
    assert ended.code == 1
    line = ended.line()
    assert "the loss or its gradient was not finite in 5 steps in a row" in line and "pretrain/skipped.jsonl" in line
    skipped = read_rows(workdir / "pretrain/skipped.jsonl")
    assert len(skipped) == 5
    for row in skipped:
        assert row["loss"] in ("nan", "inf") and len(row["rows"]) == 2
        assert all("text.txt:" in place for place in row["rows"])
    last = skipped[-1]["step"]
    stands = max(int(path.name) for path in (workdir / "pretrain/checkpoints").iterdir() if path.name.isdigit())
    assert last - EVERY <= stands <= last
    # Killed on the way, it counts on.
    again = copied(whole.prepared, tmp_path / "again")
    first = run(whole.config, again, *much, *UNTIL, harm={"kind": "batch", "number": last - 1, "do": "kill"})
    second = run(whole.config, again, *much, *UNTIL)
    assert (first.code, second.code) == (-9, 1) and second.line() == line
    for name in ("metrics", "skipped"):
        assert (again / f"pretrain/{name}.jsonl").read_bytes() == (workdir / f"pretrain/{name}.jsonl").read_bytes()
    # With a rate that it can bear, and begun anew, it ends as the undisturbed run.
    mended = run(whole.config, workdir, *UNTIL, "--force", "pretrain")
    assert mended.code == 0, mended.errors
    require_same(results(workdir, ["pretrain"]), whole.results)


def test_one_loss_that_is_not_finite_is_skipped_and_the_run_goes_on(whole: Whole, tmp_path: Path) -> None:
    poison = {"kind": "batch", "number": 6, "do": "poison"}
    ended = run(whole.config, copied(whole.prepared, tmp_path / "run"), *UNTIL, harm=poison)
    assert ended.code == 0, ended.errors
    assert "1 update skipped, not finite" in ended.out
    (row,) = read_rows(tmp_path / "run/pretrain/skipped.jsonl")
    assert row["step"] == 6 and row["loss"] in ("nan", "inf")
    rows = {row["step"]: row for row in read_rows(tmp_path / "run/pretrain/metrics.jsonl")}
    assert rows[6]["loss"] is None and all(rows[step]["loss"] is not None for step in rows.keys() - {6})
    manifest = json.loads((tmp_path / "run/pretrain/manifest.json").read_text(encoding="utf-8"))
    assert manifest["summary"]["skipped"] == 1
    # The step was lost and nothing else: the next losses are close to those of the undisturbed run, a step behind.
    undisturbed = read_rows(whole.config.with_name("whole") / "pretrain/metrics.jsonl")
    assert [row["loss"] for row in undisturbed[:5]] == [rows[step]["loss"] for step in range(1, 6)]
    assert all(abs(rows[row["step"]]["loss"] / row["loss"] - 1) < 0.1 for row in undisturbed[6:])
