"""The ledger: every second of a run's processes is in it once, whatever kills them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transllm_jax.errors import UserError
from transllm_jax.training.record import ledger as module
from transllm_jax.training.record.ledger import CATEGORIES, Ledger, summarise


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def spent(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(CATEGORIES, 0.0) | seconds


def session(
    path: Path,
    first: int,
    step: int,
    *,
    seconds: float = 100.0,
    done: bool = False,
    anew: bool = False,
    name: str = "s",
) -> None:
    """A session that goes from step `first` to `step` of a stage in so many seconds, and is then killed or done."""
    clock = Clock()
    ledger = Ledger(path, clock=clock)
    try:
        with ledger.stage(name, anew=anew):
            with ledger.spend("init"):
                clock.now += 7
            ledger.mark(first)
            with ledger.spend("step"):
                clock.now += seconds
            ledger.mark(step)
            if not done:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    ledger.close()


def test_time_goes_to_the_innermost_category_of_the_stage(path: Path) -> None:
    clock = Clock()
    ledger = Ledger(path, clock=clock)
    clock.now += 1
    with ledger.stage("pretrain"):
        clock.now += 2
        with ledger.spend("step"):
            clock.now += 4
            with ledger.spend("save"):
                clock.now += 8
            clock.now += 16
        with ledger.spend("data"):
            clock.now += 32
    with ledger.spend("validate"):
        clock.now += 64
    clock.now += 128
    ledger.close()
    found = summarise(path)
    assert found["stages"]["pretrain"]["seconds"] == spent(other=2, step=20, save=8, data=32)
    assert found["stages"]["run"]["seconds"] == spent(other=129, validate=64)
    assert found["seconds"] == spent(other=131, step=20, save=8, data=32, validate=64)
    assert found["total"] == 255 and found["stages"]["pretrain"]["total"] == 62
    assert found["trained"] == 20 / 255 and found["stages"]["pretrain"]["trained"] == 20 / 62
    assert (found["lost"], found["redone"], found["sessions"], found["restarts"]) == (0, 0, 1, 0)


def test_what_came_before_the_ledger_is_init(path: Path) -> None:
    clock = Clock()
    with Ledger(path, clock=clock, since=clock.now - 3.5):
        clock.now += 1
    assert summarise(path)["seconds"] == spent(init=3.5, other=1)


MOVES = st.recursive(
    st.tuples(st.just("wait"), st.floats(0, 1e5)),
    lambda inner: st.tuples(st.sampled_from([*CATEGORIES, "stage a", "stage b", "mark"]), st.lists(inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(moves=st.lists(MOVES, max_size=5))
def test_categories_add_up_to_the_clock_to_the_microsecond(
    moves: list[tuple[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    clock = Clock(12.345678)
    ledger = Ledger(path, clock=clock)

    def play(what: str, inner: object) -> None:
        if what == "wait":
            assert isinstance(inner, float)
            clock.now += inner
            return
        assert isinstance(inner, list)
        if what == "mark":
            ledger.mark(len(inner))
            return
        name = what.removeprefix("stage ")
        with ledger.stage(name) if name != what else ledger.spend(name):
            for move in inner:
                play(*move)

    for move in moves:
        play(*move)
    ledger.close()
    found = summarise(path)
    elapsed = round((clock.now - 12.345678) * 1e6)
    counted = [round(seconds * 1e6) for stage in found["stages"].values() for seconds in stage["seconds"].values()]
    assert sum(counted) == elapsed == round(found["total"] * 1e6)
    assert sum(round(seconds * 1e6) for seconds in found["seconds"].values()) == elapsed


def test_steps_that_a_later_session_does_again_are_lost(path: Path) -> None:
    session(path, 0, 50)
    assert summarise(path)["lost"] == 0  # nobody has gone on from an earlier step
    session(path, 40, 60)
    session(path, 60, 80, done=True)
    found = summarise(path)["stages"]["s"]
    # 10 of the first session's 50 steps; the second one was asked to stop and had saved all of its own.
    assert found["lost"] == 20 and found["seconds"] == spent(init=21, step=280)
    assert found["total"] == 321 and found["trained"] == 280 / 321
    assert found["sessions"] == 3 and found["restarts"] == 2


def test_an_older_checkpoint_loses_the_steps_of_all_sessions_since(path: Path) -> None:
    session(path, 0, 50)
    session(path, 50, 100)
    session(path, 25, 100, done=True)  # the checkpoints of 50 and 75 were damaged
    found = summarise(path)
    assert found["lost"] == 50 + 100 and found["stages"]["s"]["seconds"] == spent(init=21, step=150)


def test_a_session_that_finishes_no_step_trains_nothing(path: Path) -> None:
    session(path, 0, 0)
    assert summarise(path)["lost"] == 0
    session(path, 0, 10, done=True)
    found = summarise(path)
    assert found["lost"] == 100 and found["seconds"]["step"] == 100


def test_a_stage_that_begins_anew_loses_all_of_what_was_cut_off(path: Path) -> None:
    session(path, 0, 50)
    session(path, 50, 60)
    session(path, 0, 60, anew=True, done=True)
    found = summarise(path)
    assert found["lost"] == 214 and found["redone"] == 0
    assert found["seconds"] == spent(init=7, step=100) and found["restarts"] == 2


def test_a_stage_that_was_done_and_is_forced_anew_is_not_lost_to_a_restart(path: Path) -> None:
    session(path, 0, 50)
    session(path, 40, 60, done=True)
    session(path, 0, 60, anew=True, done=True)
    session(path, 0, 5, done=True, name="other")
    found = summarise(path)["stages"]["s"]
    assert found["redone"] == 214 and found["lost"] == 0 and found["restarts"] == 1
    assert found["total"] == 321 and found["seconds"] == spent(init=7, step=100)
    assert summarise(path)["seconds"] == spent(init=14, step=200)


def test_marks_write_now_and_then(path: Path) -> None:
    clock = Clock()
    ledger = Ledger(path, clock=clock)
    with ledger.stage("s"):
        written = len(path.read_bytes())
        ledger.mark(0)
        with ledger.spend("step"):
            clock.now += 4.9
        ledger.mark(1)
        assert len(path.read_bytes()) == written
        with ledger.spend("step"):
            clock.now += 0.1
        ledger.mark(2)
        # Written though the stage goes on: a process that is killed here has its 5 seconds.
        assert summarise(path)["stages"]["s"]["seconds"] == spent(step=5)
        assert json.loads(path.read_text().splitlines()[-1])["step"] == 2
        clock.now += 3
        ledger.mark(3)
        assert summarise(path)["total"] == 5
    assert summarise(path)["total"] == 8
    ledger.close()
    ledger.close()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from transllm_jax.training.record import ledger
ledger.FLUSH_EVERY = 0.05
book = ledger.Ledger(Path(sys.argv[1]))
with book.stage("evaluation"), book.spend("validate"):
    time.sleep(0.6)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_long_piece_of_work_is_noted_before_it_is_killed(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    # Not all of the 0.6 s: those since the last line are gone, on a busy machine more than on an idle one.
    assert 0.2 < summarise(path)["stages"]["evaluation"]["seconds"]["validate"] < 10


def test_an_unfinished_line_is_no_line(path: Path) -> None:
    session(path, 0, 10)
    whole = path.read_bytes()
    before = summarise(path)
    for cut in (1, 10, len(whole.splitlines()[-1])):
        path.write_bytes(whole + whole.splitlines()[-1][:-cut])
        assert summarise(path) == before
    path.write_bytes(whole + b'{"session": "x", "sta\xff')
    session(path, 10, 20, done=True)  # opens the file, and takes the broken line out
    assert summarise(path)["seconds"] == spent(init=14, step=200)
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize("line", ['{"step": 1, "loss": 2.0}', "[1]", "7"])
def test_another_file_is_refused(path: Path, line: str) -> None:
    session(path, 0, 10)
    count = len(path.read_text().splitlines())
    path.write_text(path.read_text() + line + "\n")
    before = path.read_bytes()
    for open_it in (summarise, Ledger):
        with pytest.raises(UserError, match=rf"ledger.jsonl, line {count + 1} is not a ledger's line"):
            open_it(path)
    assert path.read_bytes() == before


def test_no_ledger_is_no_time(path: Path) -> None:
    found = summarise(path)
    assert (found["total"], found["trained"], found["stages"]) == (0, None, {})


def test_a_run_of_weeks_stays_small_and_fast_to_read(path: Path) -> None:
    clock = Clock()
    with Ledger(path, clock=clock) as ledger, ledger.stage("pretrain"):
        ledger.mark(0)
        for step in range(1, 30_001):  # two days of lines, 5 seconds apart
            with ledger.spend("step"):
                clock.now += 5
            ledger.mark(step)
            assert step % 1000 or path.stat().st_size < 250 * module.COMPACT_AFTER
        started = time.perf_counter()
        assert summarise(path)["stages"]["pretrain"]["seconds"] == spent(step=150_000)
        assert time.perf_counter() - started < 1  # takes 0.03 s
    before = summarise(path)
    Ledger(path, clock=clock).close()
    # A line a session and stage, and the new session's own.
    assert len(path.read_text().splitlines()) == 3
    assert summarise(path)["stages"]["pretrain"] == before["stages"]["pretrain"]
    assert not path.with_name(path.name + ".part").exists()


def test_a_full_disk_is_said_and_does_not_hide_a_greater_trouble(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    ledger = Ledger(path, clock=clock)
    with Path("/dev/full").open("ab", buffering=0) as full:
        with pytest.raises(RuntimeError, match="the greater trouble"), ledger.stage("s"):
            monkeypatch.setattr(ledger, "_file", full)
            raise RuntimeError("the greater trouble")
        refused = r"ledger.jsonl cannot be written \(No space left on device\); free space"
        with pytest.raises(UserError, match=refused), ledger.stage("t"):
            pass
        with pytest.raises(UserError, match=refused):
            ledger.close()
    (path.parent / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Ledger(path.parent / "file" / "ledger.jsonl")


def test_a_category_that_is_none_is_a_defect(path: Path) -> None:
    refused = "no such category: 'sleep'; the categories are init"
    with Ledger(path) as ledger, pytest.raises(ValueError, match=refused), ledger.spend("sleep"):
        pass


def test_jax_is_not_imported() -> None:
    code = "import sys, transllm_jax.training.record.ledger; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
