"""Runs the launch scripts with fakes of gcloud, kubectl, srun, scontrol and transllm that record their arguments."""

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
# The real tools that the scripts may use, and those that the fakes and a TPU worker use as well.
COMMON = tuple(
    ["bash", "env", "sed", "dirname", "basename", "mkdir", "mv", "cat", "sleep", "date", "tail", "grep", "sort", "tr"]
)
MORE = ("touch", "true", "flock", "setsid", "nohup", "hostname", "python3")


class FakeTools:
    """A directory that is the whole PATH: the usual tools, and fakes that append their arguments to `calls`."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.log = root, root / "bin", root / "calls"
        self.bin.mkdir()
        for tool in (*COMMON, *MORE):
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)

    def fake(self, name: str, body: str = "") -> None:
        """Adds a fake that records its arguments and then runs `body`, in bash."""
        path = self.bin / name
        # One write a call, so that the lines of concurrent calls do not mix.
        path.write_text(
            f'#!/usr/bin/env bash\nprintf -v line "%q " {name} "$@"; echo "$line" >>"{self.log}"\n{body}\n',
            encoding="utf-8",
        )
        path.chmod(0o755)

    def queue(self, name: str, *answers: object) -> None:
        """Sets the answers that a fake gets from `$(next NAME)`, one a call; the last one is repeated."""
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


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds; fails after 20 seconds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen in 20 seconds"
        time.sleep(0.02)


def commands_of(printed: str) -> list[list[str]]:
    """The commands that a dry run prints; its comments begin with a number sign."""
    return [shlex.split(line) for line in printed.splitlines() if not line.startswith("#")]


def option_value(command: Sequence[str], name: str) -> str:
    [value] = [word.removeprefix(f"{name}=") for word in command if word.startswith(f"{name}=")]
    return value


# Arguments that each script accepts.
VALID: dict[str, tuple[object, ...]] = {
    "tpu_vm.sh": ("delete", "--project", "p", "--zone", "z", "--name", "n"),
    "local.sh": ("--config", CONFIG, "--workdir", "run"),
    "slurm.sh": ("--config", CONFIG, "--workdir", "run"),
    "supervise.sh": ("--dir", "run"),
    "gke_jobset.py": (
        *("--name", "n", "--topology", "v5e:4x4", "--image", "i"),
        *("--workdir", "gs://b/run", "--config", CONFIG),
    ),
}
# Runs until SIGTERM; then prints "saved", as a run that saves a checkpoint, and exits with 75.
UNTIL_SIGTERM = (
    'trap "echo saved; exit 75" TERM; echo up; touch up; for ((i = 0; i < 600; i++)); do sleep 0.1; done; exit 9'
)
