"""slurm.sh: what it starts, and what it does on each exit code and at the time limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_scripts import CONFIG, LAUNCH, UNTIL_SIGTERM, VALID, FakeTools, commands_of, eventually


@pytest.fixture
def tools(tmp_path: Path) -> FakeTools:
    return FakeTools(tmp_path)


def test_slurm_needs_a_job(tools: FakeTools) -> None:
    done = tools.run("slurm.sh", *VALID["slurm.sh"])
    assert done.returncode == 2 and "sbatch" in done.stderr and done.stderr.count("\n") == 1


SRUN = 'while [[ $1 != transllm ]]; do shift; done; exec "$@"'


def slurm(tools: FakeTools, *codes: int, restarts: int = 1, scontrol: str = "") -> tuple[int, list[list[str]]]:
    """The exit code of a job whose runs exit with these codes in turn, and the calls that are not of srun."""
    tools.queue("codes", *codes)
    tools.fake("srun", SRUN)
    tools.fake("scontrol", scontrol)
    tools.fake("transllm", "exit $(next codes)")
    done = tools.run(
        "slurm.sh",
        *(*VALID["slurm.sh"], "--max-restarts", restarts, "a=b c"),
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="2",
    )
    return done.returncode, [called for called in tools.calls if called[0] != "srun"]


@pytest.mark.parametrize("given", [{}, {"TRANSLLM_SECRET": "mine"}])
def test_all_tasks_of_a_slurm_job_share_a_secret(tools: FakeTools, given: dict[str, str]) -> None:
    tools.queue("codes", 1, 0)
    tools.fake("srun", SRUN)
    tools.fake("scontrol")
    tools.fake("transllm", 'echo "$TRANSLLM_SECRET" >>"$HOME/secrets"; exit $(next codes)')
    assert [tools.run("slurm.sh", *VALID["slurm.sh"], SLURM_JOB_ID="7", **given).returncode] == [0]
    first, second = (tools.root / "secrets").read_text().splitlines()
    assert first == second and (first == "mine" if given else len(first) == 36)


def test_slurm_dry_run(tools: FakeTools) -> None:
    for tool in ("srun", "scontrol", "transllm"):
        tools.fake(tool)
    done = tools.run(
        "slurm.sh",
        *(*VALID["slurm.sh"], "a=b c", "--dry-run"),
        SLURM_JOB_NUM_NODES="4",
        SLURM_CPUS_PER_TASK="16",
        SLURM_GPUS_ON_NODE="4",
    )
    assert done.returncode == 0 and tools.calls == []
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


def test_slurm_directives_precede_the_first_command() -> None:
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
def test_slurm_requeues_by_exit_code(
    tools: FakeTools, codes: tuple[int, ...], last: int, runs: int, requeued: bool
) -> None:
    code, called = slurm(tools, *codes)
    run = ["transllm", "run", str(CONFIG), "a=b c", "--workdir", "run", "--distributed", "auto"]
    assert (code, called) == (last, [run] * runs + [REQUEUE] * requeued)


def test_slurm_keeps_the_exit_code_if_it_cannot_requeue(tools: FakeTools) -> None:
    assert slurm(tools, 75, scontrol="exit 1")[0] == 75


@pytest.mark.parametrize("last", [75, 1])
def test_slurm_passes_sigterm_on_and_requeues(tools: FakeTools, last: int) -> None:
    """At the time limit the run saves a checkpoint or fails to; the job is requeued in both cases."""
    tools.fake("srun", SRUN)
    tools.fake("scontrol")
    tools.fake("transllm", UNTIL_SIGTERM.replace("exit 75", f"exit {last}"))
    job = tools.start("slurm.sh", *VALID["slurm.sh"], SLURM_JOB_ID="7")
    eventually((tools.root / "up").exists)
    job.terminate()
    printed, _ = job.communicate(timeout=20)
    assert job.returncode == last and "\nsaved\n" in printed
    assert tools.calls[-1] == REQUEUE and len(tools.calls) == 3
