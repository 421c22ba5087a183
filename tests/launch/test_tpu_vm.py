"""tpu_vm.sh: the calls of gcloud that each command makes, and what is refused before any is made."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from launch_scripts import CONFIG, LAUNCH, UNTIL_SIGTERM, FakeTools, commands_of, eventually, option_value
from tpu_vm import CREATE, DELETE, DESCRIBE, FLAGS, RUN, SLICE, TPUS, WHERE, dry_run


@pytest.fixture
def tools(tmp_path: Path) -> FakeTools:
    return FakeTools(tmp_path)


@pytest.fixture
def wheel(tools: FakeTools) -> Path:
    path = tools.root / "transllm_jax-1.0-py3-none-any.whl"
    path.touch()
    return path


def test_tpu_create(tools: FakeTools) -> None:
    assert dry_run(tools, "create", *SLICE) == [CREATE, DESCRIBE]
    on_demand = dry_run(tools, "create", *SLICE, "--on-demand")[0]
    assert on_demand == [word for word in CREATE if word != "--spot"]
    assert dry_run(tools, "create", *SLICE, TRANSLLM_SPOT="0")[0] == on_demand
    account = dry_run(tools, "create", *SLICE, "--service-account", "a@p.iam.gserviceaccount.com")[0]
    assert "--service-account=a@p.iam.gserviceaccount.com" in account


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_tpu_runtime_versions(tools: FakeTools, accelerator: str, version: str) -> None:
    create = dry_run(tools, "create", TRANSLLM_ACCELERATOR_TYPE=accelerator)[0]
    assert (
        option_value(create, "--accelerator-type") == accelerator
        and option_value(create, "--runtime-version") == version
    )
    given = dry_run(tools, "create", "--accelerator-type", accelerator, "--runtime-version", "other")[0]
    assert option_value(given, "--runtime-version") == "other"


def test_tpu_up(tools: FakeTools, wheel: Path) -> None:
    create, describe, folder, copy, install, config, run = dry_run(
        tools, "up", *SLICE, *RUN, "--wheel", wheel, "--setup", "gcloud storage cp gs://b/t .", "a.b=it's 1"
    )
    assert [create, describe] == [CREATE, DESCRIBE]
    ssh = [*TPUS, "tpu-vm", "ssh", "tpu", *WHERE, "--worker=all"]
    assert folder == [*ssh, "--command=mkdir -p transllm"]
    scp = [*TPUS, "tpu-vm", "scp"]
    assert copy == [*scp, str(LAUNCH / "supervise.sh"), str(wheel), "tpu:transllm/", *WHERE, "--worker=all"]
    assert install[:-1] == ssh
    line = option_value(install, "--command")
    target = "uv pip install --quiet --python transllm/venv/bin/python --reinstall-package transllm-jax"
    assert f"; {target} './transllm/{wheel.name}[tpu,gcs,data,align]';" in line
    assert line.endswith("; gcloud storage cp gs://b/t .")
    assert config == [*scp, str(CONFIG), "tpu:transllm/", *WHERE, "--worker=all"]
    assert run[:-1] == ssh
    words = shlex.split(option_value(run, "--command"))
    at = words.index("venv/bin/transllm")
    assert words[at : at + 8] == [
        *(
            "venv/bin/transllm",
            "run",
            "demo.yaml",
            "a.b=it's 1",
            "--workdir",
            "gs://bucket/run",
            "--distributed",
            "auto",
        )
    ]
    assert words[at - 5 : at] == [*("--dir", ".", "--max-restarts", "10", "--")]


def test_tpu_install_from_a_repository(tools: FakeTools) -> None:
    _, copy, install = dry_run(tools, "install", "--git", "https://host/repo.git@v1", "--extras", "tpu")
    assert copy[5:7] == [str(LAUNCH / "supervise.sh"), "tpu:transllm/"]
    assert "'transllm-jax[tpu] @ git+https://host/repo.git@v1'" in option_value(install, "--command")


def test_tpu_logs_status_stop_delete(tools: FakeTools) -> None:
    [logs] = dry_run(tools, "logs", "--logs", "here")
    assert (
        option_value(logs, "--output-directory") == "here" and option_value(logs, "--command") == "cat transllm/run.log"
    )
    assert not (tools.root / "here").exists()
    status = dry_run(tools, "status")
    assert status[0] == DESCRIBE and "--state" in option_value(status[1], "--command")
    [stop] = dry_run(tools, "stop")
    assert option_value(stop, "--command") == "bash transllm/supervise.sh --dir transllm --stop"
    assert dry_run(tools, "delete") == [DELETE]


def test_tpu_watch_in_a_dry_run(tools: FakeTools, wheel: Path) -> None:
    printed = dry_run(tools, "watch", *SLICE, *RUN, "--wheel", wheel)
    assert printed[0] == DESCRIBE and printed[-2:] == [DELETE, CREATE]
    assert len(printed) == 9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create",), "--accelerator-type is missing"),
        (("create", "--accelerator-type", "v5e-16"), "called v5litepod-16"),
        (("create", "--accelerator-type", "v9-8"), "no runtime version is known for 'v9-8'; give --runtime-version"),
        (("install",), "--wheel or --git is missing"),
        (("install", "--wheel", "none.whl"), "no such file"),
        (("run", "--workdir", "gs://b/r"), "--config is missing"),
        (("run", "--config", "none.yaml"), "no such file"),
        (("run", "--config", CONFIG, "--workdir", "runs/r"), "gs://bucket/path"),
        (("run", *RUN, "--max-restarts", "x"), "--max-restarts is a number"),
        (("delete", "--poll", "x"), "--poll is a number"),
        (("sing",), "unknown command 'sing'"),
    ],
)
def test_tpu_checks_its_arguments_before_it_calls_gcloud(
    tools: FakeTools, arguments: tuple[object, ...], said: str
) -> None:
    tools.fake("gcloud")
    done = tools.run("tpu_vm.sh", *arguments, *FLAGS)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert tools.calls == []


@pytest.mark.parametrize("missing", ["project", "zone", "name"])
def test_tpu_needs_project_zone_and_name(tools: FakeTools, missing: str) -> None:
    flags = {"project": "p", "zone": "z", "name": "n"}
    del flags[missing]
    done = tools.run("tpu_vm.sh", "delete", *(word for key in flags for word in (f"--{key}", flags[key])))
    assert done.returncode == 2 and done.stderr.startswith(f"tpu_vm.sh: --{missing} is missing")


def test_tpu_run_on_a_worker(tools: FakeTools) -> None:
    """Runs the command line that is sent to the workers, as the shell of a worker would."""
    [_, start] = dry_run(tools, "run", *RUN, "a.b=it's 1", "--max-restarts", "3")
    worker = tools.root / "transllm"
    (worker / "venv" / "bin").mkdir(parents=True)
    shutil.copy(LAUNCH / "supervise.sh", worker)
    tools.fake("transllm", f"touch up; {UNTIL_SIGTERM}")
    (tools.bin / "transllm").rename(worker / "venv" / "bin" / "transllm")
    for _ in range(2):  # the second call does not disturb the first run
        done = subprocess.run(
            ["bash", "-c", option_value(start, "--command")],
            env=tools.environment(),
            cwd=tools.root,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (0, "running\n"), done.stderr
    eventually((worker / "up").exists)
    assert tools.calls == [
        ["transllm", "run", "demo.yaml", "a.b=it's 1", "--workdir", "gs://bucket/run", "--distributed", "auto"]
    ]
    [stop] = commands_of(tools.run("tpu_vm.sh", "stop", *FLAGS, "--dry-run").stdout)
    subprocess.run(["bash", "-c", option_value(stop, "--command")], env=tools.environment(), cwd=tools.root, check=True)
    ask = option_value(commands_of(tools.run("tpu_vm.sh", "status", *FLAGS, "--dry-run").stdout)[1], "--command")

    def answer() -> str:
        asked = subprocess.run(
            ["bash", "-c", ask], env=tools.environment(), cwd=tools.root, capture_output=True, text=True, check=True
        )
        return asked.stdout

    eventually(lambda: answer().endswith(" exit 75\n"))
    assert answer().startswith("transllm-state ")
    shutil.rmtree(worker)
    assert answer().endswith(" absent\n")
