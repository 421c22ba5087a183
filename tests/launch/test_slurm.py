"""slurm.sh: what it starts, and what it does about each exit code and at the time limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_scripts import CONFIG, LAUNCH, RIGHT, RUNS, Bench, commands_of, eventually


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_slurm_outside_of_a_job(bench: Bench) -> None:
    done = bench.run("slurm.sh", *RIGHT["slurm.sh"])
    assert done.returncode == 2 and "sbatch" in done.stderr and done.stderr.count("\n") == 1


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
