"""The launch scripts in a directory that is all of PATH, where gcloud, kubectl, srun, scontrol and transllm are fakes.

The fakes record how they were called.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

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
# Runs until SIGTERM, and then saves itself: says so and ends with 75.
RUNS = 'trap "echo saved; exit 75" TERM; echo up; touch up; for ((i = 0; i < 600; i++)); do sleep 0.1; done; exit 9'
