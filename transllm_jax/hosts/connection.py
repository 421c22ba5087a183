"""This process's number in the run and the coordinator's address: from flags, the environment or the cluster."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from transllm_jax.errors import UserError
from transllm_jax.hosts.cluster import detect_cluster
from transllm_jax.hosts.names import parse_address

# Seconds within which all processes have to connect. Machines of a pod start minutes apart.
PATIENCE = 300.0


@dataclass(frozen=True)
class ConnectionOptions:
    """The flags --distributed, --coordinator, --processes and --process, as given."""

    distributed: str | None = None
    coordinator: str | None = None
    processes: int | str | None = None
    process: int | str | None = None


@dataclass(frozen=True)
class Connection:
    """This is process `number` of `count`. The processes connect at host:port, on the host of process 0.

    `devices`: the local devices that this process may use; None for all. `key`: signs their messages, see `sign`.
    """

    host: str
    port: int
    count: int
    number: int
    devices: tuple[int, ...] | None = None
    key: bytes = field(default=b"", compare=False, repr=False)


def connection_from(options: ConnectionOptions, environ: Mapping[str, str]) -> Connection | None:
    """The connection that the flags give, or else the environment (TRANSLLM_DISTRIBUTED, TRANSLLM_COORDINATOR, ...).

    TRANSLLM_SECRET, which has no flag, is the same for all processes of a run and keeps others out.
    None if this process is the whole run. Raises UserError for incomplete or invalid values.
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
    secret = environ.get("TRANSLLM_SECRET", "").strip()
    if auto:
        here = detect_cluster(PATIENCE)
        key = _key(secret, here.host, here.port, here.run)
        return Connection(here.host, here.port, here.count, here.number, here.devices, key)
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
    return Connection(host, port, count, number, key=_key(secret, host, port))


def _key(secret: str, host: str, port: int, run: str = "") -> bytes:
    """The key that all processes of a run share. Without a secret it can be guessed from the address."""
    return hashlib.sha256(json.dumps([secret, host.lower(), port, run]).encode()).digest()


def _number(given: dict[str, str], name: str) -> int:
    try:
        return int(given[name])
    except ValueError:
        raise UserError(f"--{name} (TRANSLLM_{name.upper()}) is a whole number, not {given[name]!r}") from None


def _address(text: str) -> tuple[str, int]:
    try:
        return parse_address(text)
    except ValueError as error:
        raise UserError(
            f"--coordinator (TRANSLLM_COORDINATOR) is HOST:PORT, such as 10.0.0.2:8482, not {text!r}: {error}"
        ) from None
