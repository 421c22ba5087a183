"""The first screen: on a machine without a TPU, libtpu is not loaded, and nothing is printed that is not ours."""

from __future__ import annotations

import glob
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLES

from transllm_jax.cli import devices

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
no_accelerator = pytest.mark.skipif(
    any(map(glob.glob, (*devices._TPUS, "/dev/nvidia[0-9]*"))), reason="this machine has an accelerator"
)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user who has chosen no platform."""
    # Tests of preflight leave variables of libtpu in this process, which silence it.
    theirs = ("JAX_PLATFORMS", "TPU_", "LIBTPU_")
    without = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=without | environment, capture_output=True, text=True, timeout=300
    )


@needs_libtpu
@no_accelerator
@pytest.mark.slow
def test_libtpu_is_loaded_only_if_it_is_asked_for() -> None:
    code = "from transllm_jax.cli.devices import prepare_jax; prepare_jax(); import jax; print(jax.default_backend())"
    loaded = "; print('libtpu.so' in open('/proc/self/maps').read())"
    done = run("-c", code + loaded)
    assert (done.stdout.split(), done.stderr) == (["cpu", "False"], "")
    # What jax does without us (0.10 with ten lines of errors, 0.12 in silence): if it no longer loads libtpu, there is
    # nothing to do.
    alone = run("-c", "import jax; print(jax.default_backend())" + loaded)
    assert alone.stdout.split() == ["cpu", "True"]
    # preflight asks libtpu for a topology.
    asked = (
        "; from transllm_jax.preflight.program.chips import topology_devices; print(len(topology_devices('v5e:2x2')))"
    )
    assert run("-c", code + asked).stdout.split() == ["cpu", "4"]
    # A user's choice is tried, and fails as jax says.
    chosen = run("-c", code, JAX_PLATFORMS="tpu")
    assert chosen.returncode == 1 and "Unable to initialize backend 'tpu'" in chosen.stderr


@pytest.mark.parametrize(
    ("platforms", "node", "passed_over"), [("", "", True), ("", "accel0", False), ("tpu,cpu", "", False)]
)
def test_a_tpu_is_not_passed_over(tmp_path: Path, platforms: str, node: str, passed_over: bool) -> None:
    """Neither one that has a device file, nor one that jax saw by itself or the user asked for."""
    if node:
        (tmp_path / node).touch()
    code = f"""
import jax, jax.extend.backend
from transllm_jax.cli import devices
jax.config.update("jax_platforms", {platforms or None!r})
asked = []
jax.extend.backend.register_backend_factory = lambda name, *rest, **options: asked.append(name)
devices._TPUS = ({str(tmp_path / "accel[0-9]*")!r},)
devices.prepare_jax()
print(asked)
"""
    done = run("-c", code)
    assert done.stdout.strip() == (str(["tpu"]) if passed_over else "[]"), done.stderr


@no_accelerator
@pytest.mark.slow
def test_nothing_is_printed_that_is_not_ours(tiny_model: Path) -> None:
    transllm = ("-m", "transllm_jax.cli.main")
    for command in (
        ("chat", tiny_model, "hello", "--max-new-tokens", "3"),
        ("convert", "verify", tiny_model, tiny_model),
        ("tokenizer", "report", tiny_model, EXAMPLES / "text.heldout.txt"),
    ):
        done = run(*transllm, *command)
        # Three tokens do not end an answer, which is said.
        ours = "the answer was cut off; --max-new-tokens sets the limit\n" if command[0] == "chat" else ""
        assert (done.returncode, done.stderr) == (0, ours)
        assert done.stdout


@no_accelerator
@pytest.mark.slow
def test_a_run_prints_nothing_that_is_not_ours(tiny_config_file: Path) -> None:
    done = run("-m", "transllm_jax.cli.main", "run", tiny_config_file)
    assert (done.returncode, done.stderr) == (0, "")
