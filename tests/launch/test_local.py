"""local.sh: several processes on one machine, and what happens to all when one fails or is stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch_scripts import CONFIG, LAUNCH, RIGHT, RUNS, Bench, commands_of, eventually


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_local_dry_run(bench: Bench) -> None:
    bench.fake("transllm")
    done = bench.run("local.sh", *RIGHT["local.sh"], "--port", "1234", "--devices", "2", "--dry-run", "a=b c")
    assert done.returncode == 0 and bench.calls == [] and not (bench.root / "run.logs").exists()
    assert commands_of(done.stdout) == [
        [
            *("env", "JAX_PLATFORMS=cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo"),
            "XLA_FLAGS=--xla_force_host_platform_device_count=2",
            *("transllm", "run", str(CONFIG), "a=b c", "--workdir", "run"),
            *("--coordinator", "127.0.0.1:1234", "--processes", "2", "--process", str(process)),
            *(">", f"run.logs/process-{process}.log", "2>&1", "&"),
        ]
        for process in range(2)
    ]


def test_local_runs_all(bench: Bench) -> None:
    bench.fake("transllm", 'echo "$JAX_PLATFORMS $JAX_CPU_COLLECTIVES_IMPLEMENTATION $XLA_FLAGS"')
    done = bench.run("local.sh", *RIGHT["local.sh"], "--processes", "3", XLA_FLAGS="--mine")
    assert done.returncode == 0
    assert sorted(called[-1] for called in bench.calls) == ["0", "1", "2"]
    addresses = {called[called.index("--coordinator") + 1] for called in bench.calls}
    assert len(addresses) == 1 and re.fullmatch(r"127\.0\.0\.1:2\d{4}", addresses.pop())
    for process in range(3):
        log = (bench.root / "run.logs" / f"process-{process}.log").read_text()
        assert log == "cpu gloo --mine --xla_force_host_platform_device_count=1\n"


def test_local_first_failure_wins(bench: Bench) -> None:
    """One process ends with 2, the other then with 75 since it is asked to: the result is 2."""
    bench.fake(
        "transllm", f"[[ ${{@: -1}} == 0 ]] || {{ until [[ -f up ]]; do sleep 0.05; done; echo bad; exit 2; }}; {RUNS}"
    )
    began = time.monotonic()
    done = bench.run("local.sh", *RIGHT["local.sh"])
    assert done.returncode == 2 and time.monotonic() - began < 20
    assert "process 1 failed first, with exit code 2" in done.stderr and done.stderr.endswith("bad\n")
    assert (bench.root / "run.logs" / "process-0.log").read_text() == "up\nsaved\n"


def test_local_kills_what_does_not_stop(bench: Bench) -> None:
    bench.fake(
        "transllm",
        "[[ ${@: -1} == 0 ]] || { until [[ -f up ]]; do sleep 0.05; done; exit 1; }\n"
        "trap '' TERM; touch up; exec sleep 60",
    )
    began = time.monotonic()
    done = bench.run("local.sh", *RIGHT["local.sh"], "--grace", "1")
    assert done.returncode == 1 and time.monotonic() - began < 20
    assert "process 0 ended with exit code 137" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local_stop_reaches_all_once(bench: Bench, number: int) -> None:
    bench.fake("transllm", f'touch "started-${{@: -1}}"; {RUNS}')
    # As a terminal does it: Ctrl-C goes to the whole process group.
    started = subprocess.Popen(
        [str(LAUNCH / "local.sh"), *map(str, RIGHT["local.sh"])],
        env=bench.environment(),
        cwd=bench.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    eventually(lambda: (bench.root / "started-0").exists() and (bench.root / "started-1").exists())
    eventually(lambda: all((bench.root / f"run.logs/process-{i}.log").read_text() == "up\n" for i in range(2)))
    os.killpg(started.pid, number)
    printed, _ = started.communicate(timeout=20)
    assert started.returncode == 75, printed
    for process in range(2):
        assert (bench.root / "run.logs" / f"process-{process}.log").read_text() == "up\nsaved\n"
