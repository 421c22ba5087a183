"""A disk that fills up: a clear line, the last complete checkpoint stands, and with space the run goes on."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from reliability.harness import UNTIL, Ended, Whole, checkpoint, copied, goes_on, run, undisturbed

pytestmark = pytest.mark.reliability
SEED = 7


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An undisturbed run."""
    return undisturbed(tmp_path_factory.mktemp("whole"), tiny_model)


def said(ended: Ended) -> str:
    """The one line of a run that met a full disk."""
    assert ended.code == 2, (ended.code, ended.errors)
    line = ended.line()
    assert line.startswith("error: "), line
    assert any(words in line for words in ("disk is full", "No space left on device")), line
    assert any(words in line for words in ("free some space", "free space")), line
    assert any(words in line for words in ("run the same command again", "run again")), line
    return line


def checkpoints_stand(workdir: Path) -> None:
    """Every checkpoint that bears a step's name can be read."""
    place = workdir / "pretrain" / "checkpoints"
    for step in place.iterdir() if place.exists() else []:
        if step.name.isdigit():
            assert len(checkpoint(workdir / "pretrain", int(step.name))) > 20


# How many events of each kind are tried; see recorded.py.
KINDS = {"save": 6, "line": 3, "tokenise": 2, "plan": 1, "arrays": 2, "manifest": 2, "file": 3, "evaluation": 1}


def test_a_write_fails_at_any_moment(whole: Whole, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for kind, times in KINDS.items():
        number = whole.ended.counts[kind]
        for place in range(times):
            at = 1 + int((place + chance.random()) * number / times)
            workdir = copied(whole.prepared, tmp_path / f"{kind}{place}")
            ended = run(whole.config, workdir, *UNTIL, harm={"kind": kind, "number": at, "do": "full"})
            print(f"\n{kind} {at}: {said(ended)[:150]}", end="")
            checkpoints_stand(workdir)
            goes_on(whole, workdir, ended)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_small_disk_fills_up(whole: Whole, small_disk: Path) -> None:
    seen = set()
    # Kilobytes that are left for the run: the disk is full a little later each time.
    for left in (8, 60, 150, 260, 400, 600, 900, 1300):
        workdir = copied(whole.prepared, small_disk / f"run{left}")
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    break
        with filler.open("rb+") as file:
            file.truncate(filler.stat().st_size - left * 1024)
        ended = run(whole.config, workdir, *UNTIL)
        begun = max((step for _, step, _ in ended.batches), default=None)
        if ended.code == 0:
            print(f"\n{left} kB left: enough", end="")
        else:
            print(f"\n{left} kB left: full at step {begun}: {said(ended)[:150]}", end="")
            seen.add(begun)
            checkpoints_stand(workdir)
        filler.unlink()
        goes_on(whole, workdir, *([ended] if ended.code else []))
        subprocess.run(["rm", "-rf", workdir], check=True)
    assert len(seen) >= 3, seen
