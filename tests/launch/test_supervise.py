"""supervise.sh restarts a command by its exit code, stops it on a signal, and never starts it twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from launch_scripts import UNTIL_SIGTERM, FakeTools, eventually


@pytest.fixture
def tools(tmp_path: Path) -> FakeTools:
    return FakeTools(tmp_path)


def supervised(tools: FakeTools, *codes: int, restarts: int = 2) -> tuple[int, int]:
    """The exit code and the number of runs, of a command that exits with each of these codes in turn."""
    tools.queue("codes", *codes)
    tools.fake("transllm", "exit $(next codes)")
    done = tools.run(
        "supervise.sh",
        *("--dir", "d", "--max-restarts", restarts, "--delay", "0", "--", "transllm", "run", "a b"),
    )
    assert all(called == ["transllm", "run", "a b"] for called in tools.calls)
    assert tools.run("supervise.sh", "--dir", "d", "--state").stdout == f"exit {done.returncode}\n"
    return done.returncode, len(tools.calls)


@pytest.mark.parametrize(
    ("codes", "last", "runs"),
    [
        ((0,), 0, 1),
        ((2,), 2, 1),  # the input is wrong: a restart would not help
        ((75, 0), 0, 2),
        ((75,) * 6 + (0,), 0, 7),  # preemptions do not count
        ((1, 0), 0, 2),
        ((1, 75, 137, 75, 0), 0, 5),
        ((1, 75, 1, 75, 1, 0), 1, 5),  # two restarts are allowed
        ((1, 2), 2, 2),
    ],
)
def test_restarts_by_exit_code(tools: FakeTools, codes: tuple[int, ...], last: int, runs: int) -> None:
    assert supervised(tools, *codes) == (last, runs)


def test_restarts_can_be_turned_off(tools: FakeTools) -> None:
    assert supervised(tools, 1, restarts=0) == (1, 1)


def test_sigterm_reaches_the_command_and_ends_the_restarts(tools: FakeTools) -> None:
    tools.fake("transllm", UNTIL_SIGTERM)
    supervisor = tools.start("supervise.sh", "--dir", "d", "--", "transllm")
    eventually((tools.root / "up").exists)
    assert tools.run("supervise.sh", "--dir", "d", "--state").stdout == "running\n"
    # A second supervisor does not disturb the first.
    second = tools.run("supervise.sh", "--dir", "d", "--", "transllm")
    assert (second.returncode, second.stdout) == (0, "already running in d\n")
    assert tools.run("supervise.sh", "--dir", "d", "--stop").returncode == 0
    assert supervisor.wait(20) == 75
    assert len(tools.calls) == 1 and "\nsaved\n" in (tools.root / "d" / "run.log").read_text()
    assert tools.run("supervise.sh", "--dir", "d", "--state").stdout == "exit 75\n"


def test_sigterm_between_two_runs(tools: FakeTools) -> None:
    tools.fake("transllm", "touch up; exit 75")
    supervisor = tools.start("supervise.sh", "--dir", "d", "--delay", "60", "--", "transllm")
    eventually(lambda: "preempted" in (tools.root / "d/run.log").read_text() if (tools.root / "up").exists() else False)
    supervisor.terminate()
    assert supervisor.wait(20) == 75
    assert len(tools.calls) == 1


def test_a_killed_supervisor_is_reported_as_dead(tools: FakeTools) -> None:
    assert tools.run("supervise.sh", "--dir", "d", "--state").stdout == "absent\n"
    tools.fake("transllm", "touch up; echo $$ >child; exec sleep 60")
    supervisor = tools.start("supervise.sh", "--dir", "d", "--", "transllm")
    eventually((tools.root / "up").exists)
    eventually(lambda: (tools.root / "child").read_text().strip() != "" if (tools.root / "child").exists() else False)
    supervisor.kill()
    supervisor.wait(20)
    # The command still runs and holds the TPU, so it is not started a second time.
    assert tools.run("supervise.sh", "--dir", "d", "--", "transllm").stdout == "already running in d\n"
    os.kill(int((tools.root / "child").read_text()), signal.SIGKILL)
    eventually(lambda: tools.run("supervise.sh", "--dir", "d", "--state").stdout == "dead\n")
    tools.fake("transllm", "exit 0")
    assert tools.run("supervise.sh", "--dir", "d", "--", "transllm").returncode == 0
