"""Arguments of tpu_vm.sh, the calls of gcloud that it makes with them, and a fake cloud that answers these."""

from __future__ import annotations

from collections.abc import Sequence

from launch_scripts import CONFIG, FakeTools, commands_of

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


def dry_run(tools: FakeTools, *arguments: object, **more: str) -> list[list[str]]:
    """The commands that `tpu_vm.sh ARGUMENTS` would run."""
    tools.fake("gcloud")
    done = tools.run("tpu_vm.sh", *arguments, *FLAGS, "--dry-run", **more)
    assert done.returncode == 0, done.stderr
    assert tools.calls == [], "a dry run runs nothing"
    return commands_of(done.stdout)


# Answers from queues. `states`: the state of the queued resource; `workers`: the state of the run on both workers, as
# `a/b`; `nodes`: the state of the node; `codes`: the exit code of any other call.
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


def purpose(called: Sequence[str]) -> str:
    """The purpose of a call of gcloud, in one word; empty for calls that the tests do not compare."""
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
