"""local.sh starts several processes on one machine, and stops all when one fails or when it is stopped itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch_scripts import CONFIG, LAUNCH, UNTIL_SIGTERM, VALID, FakeTools, commands_of, eventually


@pytest.fixture
def tools(tmp_path: Path) -> FakeTools:
    return FakeTools(tmp_path)


def test_local_dry_run(tools: FakeTools) -> None:
    tools.fake("transllm")
    done = tools.run("local.sh", *VALID["local.sh"], "--port", "1234", "--devices", "2", "--dry-run", "a=b c")
    assert done.returncode == 0 and tools.calls == [] and not (tools.root / "run.logs").exists()
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


def test_local_starts_each_process(tools: FakeTools) -> None:
    tools.fake("transllm", 'echo "$JAX_PLATFORMS $JAX_CPU_COLLECTIVES_IMPLEMENTATION $XLA_FLAGS"')
    done = tools.run("local.sh", *VALID["local.sh"], "--processes", "3", XLA_FLAGS="--mine")
    assert done.returncode == 0
    assert sorted(called[-1] for called in tools.calls) == ["0", "1", "2"]
    addresses = {called[called.index("--coordinator") + 1] for called in tools.calls}
    assert len(addresses) == 1 and re.fullmatch(r"127\.0\.0\.1:2\d{4}", addresses.pop())
    for process in range(3):
        log = (tools.root / "run.logs" / f"process-{process}.log").read_text()
        assert log == "cpu gloo --mine --xla_force_host_platform_device_count=1\n"


def test_local_ends_with_the_first_failure(tools: FakeTools) -> None:
    """One process exits with 2, and the other with 75 because it is then stopped: the result is 2."""
    tools.fake(
        "transllm",
        f"[[ ${{@: -1}} == 0 ]] || {{ until [[ -f up ]]; do sleep 0.05; done; echo bad; exit 2; }}; {UNTIL_SIGTERM}",
    )
    began = time.monotonic()
    done = tools.run("local.sh", *VALID["local.sh"])
    assert done.returncode == 2 and time.monotonic() - began < 20
    assert "process 1 failed first, with exit code 2" in done.stderr and done.stderr.endswith("bad\n")
    assert (tools.root / "run.logs" / "process-0.log").read_text() == "up\nsaved\n"


def test_local_kills_a_process_that_does_not_stop(tools: FakeTools) -> None:
    tools.fake(
        "transllm",
        "[[ ${@: -1} == 0 ]] || { until [[ -f up ]]; do sleep 0.05; done; exit 1; }\n"
        "trap '' TERM; touch up; exec sleep 60",
    )
    began = time.monotonic()
    done = tools.run("local.sh", *VALID["local.sh"], "--grace", "1")
    assert done.returncode == 1 and time.monotonic() - began < 20
    assert "process 0 ended with exit code 137" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local_stops_each_process_once(tools: FakeTools, number: int) -> None:
    tools.fake("transllm", f'touch "started-${{@: -1}}"; {UNTIL_SIGTERM}')
    # A terminal sends Ctrl-C to the whole process group.
    started = subprocess.Popen(
        [str(LAUNCH / "local.sh"), *map(str, VALID["local.sh"])],
        env=tools.environment(),
        cwd=tools.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    eventually(lambda: (tools.root / "started-0").exists() and (tools.root / "started-1").exists())
    eventually(lambda: all((tools.root / f"run.logs/process-{i}.log").read_text() == "up\n" for i in range(2)))
    os.killpg(started.pid, number)
    printed, _ = started.communicate(timeout=20)
    assert started.returncode == 75, printed
    for process in range(2):
        assert (tools.root / "run.logs" / f"process-{process}.log").read_text() == "up\nsaved\n"
