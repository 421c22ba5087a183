"""supervise.sh: a command is started again by its exit code, stopped by a signal, and never started twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from launch_scripts import RUNS, Bench, eventually


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def supervised(bench: Bench, *codes: int, restarts: int = 2) -> tuple[int, int]:
    """The exit code, and how often the command ran, for a command that ends with these codes in turn."""
    bench.queue("codes", *codes)
    bench.fake("transllm", "exit $(next codes)")
    done = bench.run(
        "supervise.sh",
        *("--dir", "d", "--max-restarts", restarts, "--delay", "0", "--", "transllm", "run", "a b"),
    )
    assert all(called == ["transllm", "run", "a b"] for called in bench.calls)
    assert bench.run("supervise.sh", "--dir", "d", "--state").stdout == f"exit {done.returncode}\n"
    return done.returncode, len(bench.calls)


@pytest.mark.parametrize(
    ("codes", "last", "runs"),
    [
        ((0,), 0, 1),
        ((2,), 2, 1),  # the input is wrong: never again
        ((75, 0), 0, 2),
        ((75,) * 6 + (0,), 0, 7),  # preemptions do not count
        ((1, 0), 0, 2),
        ((1, 75, 137, 75, 0), 0, 5),
        ((1, 75, 1, 75, 1, 0), 1, 5),  # the third failure is one too many
        ((1, 2), 2, 2),
    ],
)
def test_restarts_by_exit_code(bench: Bench, codes: tuple[int, ...], last: int, runs: int) -> None:
    assert supervised(bench, *codes) == (last, runs)


def test_no_restart_at_all(bench: Bench) -> None:
    assert supervised(bench, 1, restarts=0) == (1, 1)


def test_sigterm_reaches_the_command_and_ends_the_restarts(bench: Bench) -> None:
    bench.fake("transllm", RUNS)
    supervisor = bench.start("supervise.sh", "--dir", "d", "--", "transllm")
    eventually((bench.root / "up").exists)
    assert bench.run("supervise.sh", "--dir", "d", "--state").stdout == "running\n"
    # A second one leaves the first alone.
    second = bench.run("supervise.sh", "--dir", "d", "--", "transllm")
    assert (second.returncode, second.stdout) == (0, "already running in d\n")
    assert bench.run("supervise.sh", "--dir", "d", "--stop").returncode == 0
    assert supervisor.wait(20) == 75
    assert len(bench.calls) == 1 and "\nsaved\n" in (bench.root / "d" / "run.log").read_text()
    assert bench.run("supervise.sh", "--dir", "d", "--state").stdout == "exit 75\n"


def test_sigterm_between_two_runs(bench: Bench) -> None:
    bench.fake("transllm", "touch up; exit 75")
    supervisor = bench.start("supervise.sh", "--dir", "d", "--delay", "60", "--", "transllm")
    eventually(lambda: "preempted" in (bench.root / "d/run.log").read_text() if (bench.root / "up").exists() else False)
    supervisor.terminate()
    assert supervisor.wait(20) == 75
    assert len(bench.calls) == 1


def test_a_supervisor_that_was_killed_is_dead(bench: Bench) -> None:
    assert bench.run("supervise.sh", "--dir", "d", "--state").stdout == "absent\n"
    bench.fake("transllm", "touch up; echo $$ >child; exec sleep 60")
    supervisor = bench.start("supervise.sh", "--dir", "d", "--", "transllm")
    eventually((bench.root / "up").exists)
    eventually(lambda: (bench.root / "child").read_text().strip() != "" if (bench.root / "child").exists() else False)
    supervisor.kill()
    supervisor.wait(20)
    # The command still holds the TPU: it is not started beside itself.
    assert bench.run("supervise.sh", "--dir", "d", "--", "transllm").stdout == "already running in d\n"
    os.kill(int((bench.root / "child").read_text()), signal.SIGKILL)
    eventually(lambda: bench.run("supervise.sh", "--dir", "d", "--state").stdout == "dead\n")
    bench.fake("transllm", "exit 0")
    assert bench.run("supervise.sh", "--dir", "d", "--", "transllm").returncode == 0
