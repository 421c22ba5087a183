"""tpu_vm.sh on a cloud that answers: waiting for a TPU, preemption, failures and the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from launch_scripts import Bench
from tpu_vm import CLOUD, CREATE, DESCRIBE, FLAGS, RUN, SLICE, short


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def wheel(bench: Bench) -> Path:
    path = bench.root / "transllm_jax-1.0-py3-none-any.whl"
    path.touch()
    return path


def watched(
    bench: Bench, wheel: Path, states: Sequence[str], workers: Sequence[str], *more: object, node: str = "READY"
) -> tuple[int, list[str], str]:
    """The exit code of a watch, what it did in order, and what it said."""
    bench.queue("states", *states)
    bench.queue("workers", *workers)
    bench.queue("nodes", node)
    bench.queue("codes", 0)
    bench.fake("gcloud", CLOUD)
    done = bench.run("tpu_vm.sh", "watch", *FLAGS, *SLICE, *RUN, "--wheel", wheel, "--poll", "0", *more)
    return done.returncode, [word for word in map(short, bench.calls) if word], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("states", "workers", "code", "did"),
    [
        # From nothing to the end.
        (
            ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
            ["absent/absent", "running/running", "exit 0/running", "exit 0/exit 0"],
            0,
            ["create", "install", "run"],
        ),
        # Preempted twice, once while it waited.
        (
            [*("ACTIVE", "SUSPENDING", "SUSPENDED", "NONE", "PROVISIONING", "SUSPENDED", "NONE"), "ACTIVE"],
            ["running/running", "absent/absent", "running/running", "exit 0/exit 0"],
            0,
            ["delete", "create", "delete", "create", "install", "run"],
        ),
        (["FAILED", "NONE", "ACTIVE"], ["absent/absent", "exit 0/exit 0"], 0, ["delete", "create", "install", "run"]),
        # Rebooted for maintenance: installed, but nothing runs.
        (["ACTIVE"], ["dead/running", "running/running", "exit 75/exit 75", "exit 0/exit 0"], 0, ["run", "run"]),
        (["ACTIVE"], ["running/running", "running/exit 2"], 2, []),
        (["ACTIVE"], ["running/running", "exit 1/running"], 1, []),
        (["ACTIVE"], ["exit 137/exit 0"], 1, []),
        # No network for a while.
        (["ERROR", "ERROR", "ACTIVE"], ["unreachable", "running/running", "exit 0/exit 0"], 0, []),
    ],
)
def test_tpu_watch(bench: Bench, wheel: Path, states: list[str], workers: list[str], code: int, did: list[str]) -> None:
    ended, done, said = watched(bench, wheel, states, workers)
    assert (ended, done) == (code, did), said
    assert "costs money" in said


def test_tpu_watch_of_a_preempted_node_in_an_active_resource(bench: Bench, wheel: Path) -> None:
    states = ["ACTIVE", "NONE", "ACTIVE"]
    workers = ["unreachable", "absent/absent", "exit 0/exit 0"]
    code, did, said = watched(bench, wheel, states, workers, node="PREEMPTED")
    assert (code, did) == (0, ["delete", "create", "install", "run"]), said


def test_tpu_watch_gives_up(bench: Bench, wheel: Path) -> None:
    code, did, said = watched(bench, wheel, ["ERROR"], ["absent/absent"])
    assert (code, did) == (1, []) and "giving up" in said and said.count("no network") == 10


def test_tpu_watch_gives_up_on_an_installation(bench: Bench, wheel: Path) -> None:
    bench.queue("states", "ACTIVE")
    bench.queue("workers", "absent/absent")
    bench.queue("codes", 1)
    bench.fake("gcloud", CLOUD)
    done = bench.run("tpu_vm.sh", "watch", *FLAGS, *SLICE, *RUN, "--wheel", wheel, "--poll", "0")
    assert done.returncode == 1 and "install or run failed (10 in a row)" in done.stderr


@pytest.mark.parametrize(("worker", "code"), [("exit 0", 0), ("exit 2", 2), ("exit 1", 1)])
def test_tpu_watch_cleans_up(bench: Bench, wheel: Path, worker: str, code: int) -> None:
    ended, did, _ = watched(bench, wheel, ["ACTIVE"], [f"{worker}/{worker}"], "--delete-at-end")
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
def test_tpu_create_waits(bench: Bench, states: list[str], code: int) -> None:
    bench.queue("states", *states)
    bench.queue("codes", 0)
    bench.fake("gcloud", CLOUD)
    done = bench.run("tpu_vm.sh", "create", *FLAGS, *SLICE, "--poll", "0")
    assert done.returncode == code, done.stderr
    assert bench.calls[0] == CREATE and bench.calls[1] == DESCRIBE


def test_tpu_up_stops_at_the_step_that_fails(bench: Bench, wheel: Path) -> None:
    bench.queue("states", "ACTIVE")
    bench.queue("codes", 0, 0, 0, 7)  # create, mkdir, copy; then the installation
    bench.fake("gcloud", CLOUD)
    done = bench.run("tpu_vm.sh", "up", *FLAGS, *SLICE, *RUN, "--wheel", wheel, "--poll", "0")
    assert done.returncode == 7
    assert [word for word in map(short, bench.calls) if word] == ["create", "install"]
