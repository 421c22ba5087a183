"""tpu_vm.sh against a fake cloud: waiting for a TPU, preemption, failures and the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from launch_scripts import FakeTools
from tpu_vm import CLOUD, CREATE, DESCRIBE, FLAGS, RUN, SLICE, purpose


@pytest.fixture
def tools(tmp_path: Path) -> FakeTools:
    return FakeTools(tmp_path)


@pytest.fixture
def wheel(tools: FakeTools) -> Path:
    path = tools.root / "transllm_jax-1.0-py3-none-any.whl"
    path.touch()
    return path


def watched(
    tools: FakeTools,
    wheel: Path,
    states: Sequence[str],
    workers: Sequence[str],
    *more: object,
    node: str = "READY",
    command: int = 0,
) -> tuple[int, list[str], str]:
    """Runs `tpu_vm.sh watch`.

    Args:
        states, workers, node: What the cloud answers.
        command: The exit code of each call that changes something.

    Returns:
        The exit code, the purposes of the calls in order, and what was printed.
    """
    tools.queue("states", *states)
    tools.queue("workers", *workers)
    tools.queue("nodes", node)
    tools.queue("codes", command)
    tools.fake("gcloud", CLOUD)
    done = tools.run("tpu_vm.sh", "watch", *FLAGS, *SLICE, *RUN, "--wheel", wheel, "--poll", "0", *more)
    return done.returncode, [word for word in map(purpose, tools.calls) if word], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("states", "workers", "code", "did"),
    [
        # A TPU is created, and the run ends.
        (
            ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
            ["absent/absent", "running/running", "exit 0/running", "exit 0/exit 0"],
            0,
            ["create", "install", "run"],
        ),
        # Preempted twice, the second time while it was provisioned.
        (
            [*("ACTIVE", "SUSPENDING", "SUSPENDED", "NONE", "PROVISIONING", "SUSPENDED", "NONE"), "ACTIVE"],
            ["running/running", "absent/absent", "running/running", "exit 0/exit 0"],
            0,
            ["delete", "create", "delete", "create", "install", "run"],
        ),
        (["FAILED", "NONE", "ACTIVE"], ["absent/absent", "exit 0/exit 0"], 0, ["delete", "create", "install", "run"]),
        # Rebooted for maintenance: the installation is there, the run is not.
        (["ACTIVE"], ["dead/running", "running/running", "exit 75/exit 75", "exit 0/exit 0"], 0, ["run", "run"]),
        (["ACTIVE"], ["running/running", "running/exit 2"], 2, []),
        (["ACTIVE"], ["running/running", "exit 1/running"], 1, []),
        (["ACTIVE"], ["exit 137/exit 0"], 1, []),
        # No network for a while.
        (["ERROR", "ERROR", "ACTIVE"], ["unreachable", "running/running", "exit 0/exit 0"], 0, []),
    ],
)
def test_tpu_watch(
    tools: FakeTools, wheel: Path, states: list[str], workers: list[str], code: int, did: list[str]
) -> None:
    ended, done, said = watched(tools, wheel, states, workers)
    assert (ended, done) == (code, did), said
    assert "costs money" in said


def test_tpu_watch_sees_a_preempted_node_of_an_active_resource(tools: FakeTools, wheel: Path) -> None:
    states = ["ACTIVE", "NONE", "ACTIVE"]
    workers = ["unreachable", "absent/absent", "exit 0/exit 0"]
    code, did, said = watched(tools, wheel, states, workers, node="PREEMPTED")
    assert (code, did) == (0, ["delete", "create", "install", "run"]), said


def test_tpu_watch_gives_up(tools: FakeTools, wheel: Path) -> None:
    code, did, said = watched(tools, wheel, ["ERROR"], ["absent/absent"])
    assert (code, did) == (1, []) and "giving up" in said and said.count("no network") == 10


def test_tpu_watch_gives_up_on_an_installation(tools: FakeTools, wheel: Path) -> None:
    code, _, said = watched(tools, wheel, ["ACTIVE"], ["absent/absent"], command=1)
    assert code == 1 and "install or run failed (10 in a row)" in said


@pytest.mark.parametrize(("worker", "code"), [("exit 0", 0), ("exit 2", 2), ("exit 1", 1)])
def test_tpu_watch_fetches_logs_and_deletes_at_the_end(tools: FakeTools, wheel: Path, worker: str, code: int) -> None:
    ended, did, _ = watched(tools, wheel, ["ACTIVE"], [f"{worker}/{worker}"], "--delete-at-end")
    assert (ended, did) == (code, ["logs", "delete"])


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], 0),
        (["WAITING_FOR_RESOURCES", "FAILED"], 1),
        (["PROVISIONING", "SUSPENDING"], 1),
        (["ERROR"], 1),
    ],
)
def test_tpu_create_waits(tools: FakeTools, states: list[str], code: int) -> None:
    tools.queue("states", *states)
    tools.queue("codes", 0)
    tools.fake("gcloud", CLOUD)
    done = tools.run("tpu_vm.sh", "create", *FLAGS, *SLICE, "--poll", "0")
    assert done.returncode == code, done.stderr
    assert tools.calls[0] == CREATE and tools.calls[1] == DESCRIBE


def test_tpu_up_stops_at_the_step_that_fails(tools: FakeTools, wheel: Path) -> None:
    tools.queue("states", "ACTIVE")
    tools.queue("codes", 0, 0, 0, 7)  # create, mkdir, copy; then the installation
    tools.fake("gcloud", CLOUD)
    done = tools.run("tpu_vm.sh", "up", *FLAGS, *SLICE, *RUN, "--wheel", wheel, "--poll", "0")
    assert done.returncode == 7
    assert [word for word in map(purpose, tools.calls) if word] == ["create", "install"]
