"""Where this process stands among those of a run: flags, the environment, or what the cluster says of itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from transllm_jax.errors import PeerLost, UserError

# Seconds until all processes have to be there. Machines of a pod start minutes apart.
PATIENCE = 300.0


@dataclass(frozen=True)
class Options:
    """The flags --distributed, --coordinator, --processes and --process, as given."""

    distributed: str | None = None
    coordinator: str | None = None
    processes: int | str | None = None
    process: int | str | None = None


@dataclass(frozen=True)
class Connection:
    """This process's place: process `number` of `count`; they meet at HOST:PORT, on the host of process 0.

    `devices`: the local devices that this process may use; None is all of them.
    """

    host: str
    port: int
    count: int
    number: int
    devices: tuple[int, ...] | None = None


def connection_from(options: Options, environ: Mapping[str, str]) -> Connection | None:
    """Where the flags or the environment (TRANSLLM_DISTRIBUTED, TRANSLLM_COORDINATOR, ...) place this process.

    None: this process is the whole run. UserError: half of it is given, or it cannot be.
    """
    given: dict[str, str] = {}
    for name in ("distributed", "coordinator", "processes", "process"):
        value = getattr(options, name)
        value = environ.get(f"TRANSLLM_{name.upper()}") if value is None else value
        if value not in (None, ""):
            given[name] = str(value).strip()
    auto = given.pop("distributed", None)
    if auto not in (None, "auto"):
        raise UserError(f"--distributed (TRANSLLM_DISTRIBUTED) can be 'auto' or left out, not {auto!r}")
    if auto and given:
        raise UserError(f"--distributed auto finds the processes by itself: leave --{', --'.join(given)} out")
    if auto:
        return _detected()
    if not given:
        return None
    if missing := [name for name in ("coordinator", "processes", "process") if name not in given]:
        raise UserError(
            f"--{' and --'.join(given)} (TRANSLLM_{', TRANSLLM_'.join(given).upper()}) given without "
            f"--{' and --'.join(missing)}: all three are needed, or none"
        )
    host, port = _address(given["coordinator"])
    count, number = _number(given, "processes"), _number(given, "process")
    if count < 1:
        raise UserError(f"--processes is the number of processes, from 1, not {count}")
    if not 0 <= number < count:
        raise UserError(f"--process is from 0 to {count - 1} with --processes {count}, not {number}")
    return Connection(host, port, count, number)


def _number(given: dict[str, str], name: str) -> int:
    try:
        return int(given[name])
    except ValueError:
        raise UserError(f"--{name} (TRANSLLM_{name.upper()}) is a whole number, not {given[name]!r}") from None


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator (TRANSLLM_COORDINATOR) is HOST:PORT, such as 10.0.0.2:8482, not {text!r}")
    return host.strip("[]"), int(port)


def _detected() -> Connection:
    """What jax knows of the cluster that this process is in: TPU VM, GKE, SLURM, Open MPI."""
    # jax has no public name for it. What it finds goes to jax.distributed.initialize the same way for all clusters.
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(PATIENCE))
    except (RuntimeError, OSError) as error:
        raise PeerLost(f"--distributed auto: the cluster is there, its first process is not found: {error}") from None
    address, count, number, devices = found
    if address is None or count is None or number is None:
        raise UserError(
            "--distributed auto finds no TPU VM, GKE, SLURM or Open MPI here: give --coordinator HOST:PORT, "
            "--processes and --process"
        )
    host, port = _address(address)
    # A process alone on its SLURM node has all devices of it.
    if os.environ.get("SLURM_STEP_NUM_NODES") == str(count):
        devices = None
    return Connection(host, port, count, number, None if devices is None else tuple(devices))
