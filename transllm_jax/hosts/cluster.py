"""What the cluster (TPU VM, GKE, SLURM, Open MPI) says of the run. jax detects it; host lists are read here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transllm_jax.errors import PeerLost, UserError
from transllm_jax.hosts.names import format_address, parse_address, slurm_hosts, worker_hosts

_BY_HAND = "give --coordinator HOST:PORT, --processes and --process"
# By jax's name of the cluster: variables that hold whole numbers, and those that are equal only within one run.
_NUMBERS = {
    "slurm": ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "ompi": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "gketpu": ("TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"),
    "gcetpu": ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"),
    "k8s": ("JOB_COMPLETION_INDEX",),
}
_RUN = {"slurm": ("SLURM_JOB_ID", "SLURM_STEP_ID"), "ompi": ("OMPI_MCA_orte_hnp_uri",)}
_MEGASCALE = "MEGASCALE_COORDINATOR_ADDRESS"


@dataclass(frozen=True)
class ClusterPlace:
    """This process is `number` of `count`, which connect at host:port. `devices`: its local devices; None for all.

    `run`: identifies the run within the cluster; "" if the cluster has nothing that does.
    """

    host: str
    port: int
    count: int
    number: int
    devices: tuple[int, ...] | None
    run: str


def detect_cluster(patience: float) -> ClusterPlace:
    """This process's place as the cluster gives it. `patience`: seconds until the name of its first host resolves.

    Raises UserError if there is no cluster or its variables cannot be read, PeerLost if its first host is not found.
    """
    # jax has no public API for this. Here all clusters are detected the same way.
    from jax._src.clusters import ClusterEnv

    kind: Any = None
    try:
        kinds = (env for env in ClusterEnv._cluster_types if not env.opt_in_only_method)
        kind = next((env for env in kinds if env.is_env_present()), None)
        if kind is None:
            raise UserError(f"--distributed auto finds no TPU VM, GKE, SLURM or Open MPI here: {_BY_HAND}")
        for name in ("JAX_COORDINATOR_PORT", *_NUMBERS.get(kind.name, ())):
            _require_number(name)
        coordinator = _slurm_coordinator(kind) if kind.name == "slurm" else None
        if kind.name == "gketpu":
            _clean_worker_lists()
        place = kind.auto_detect_unset_distributed_params(coordinator, None, None, None, kind.name, int(patience))
    except (RuntimeError, OSError) as error:
        raise PeerLost(f"--distributed auto: there is a cluster, but its first process is not found: {error}") from None
    except (ValueError, KeyError, IndexError) as error:
        who = kind.name if kind else "the cluster"
        raise UserError(f"--distributed auto cannot read what {who} says ({error!r}): {_BY_HAND}") from error
    where, count, number, devices = place
    if where is None or count is None or number is None:
        raise UserError(f"--distributed auto finds no TPU VM, GKE, SLURM or Open MPI here: {_BY_HAND}")
    host, _, port = where.rpartition(":")
    with _read("the coordinator's address", where):
        host, port = parse_address(format_address(host.strip().strip("[]"), port))
    if not 0 <= number < count:
        raise UserError(f"--distributed auto: {kind.name} says process {number} of {count}: {_BY_HAND}")
    # A process that is alone on its SLURM node may use all of the node's devices.
    if os.environ.get("SLURM_STEP_NUM_NODES") == str(count):
        devices = None
    run = " ".join(os.environ.get(name, "") for name in _RUN.get(kind.name, ())).strip()
    return ClusterPlace(host, port, count, number, None if devices is None else tuple(devices), run)


def _require_number(name: str) -> None:
    value = os.environ.get(name, "").strip()
    if value and not (value.isascii() and value.isdigit()):
        raise UserError(f"{name} is a whole number, not {value!r}: {_BY_HAND}")


def _slurm_coordinator(kind: Any) -> str:
    """HOST:PORT of process 0, on the step's first node. jax itself reads only lists whose names end in one bracket."""
    nodes = os.environ["SLURM_STEP_NODELIST"].strip()
    with _read("SLURM_STEP_NODELIST", nodes):
        first = slurm_hosts(nodes)[0]
    here = os.environ.get("SLURMD_NODENAME")
    if here and int(os.environ["SLURM_PROCID"]) == 0 and here != first:
        raise UserError(
            f"process 0 is on node {here}, and not on {first}, the first one of SLURM_STEP_NODELIST: {_BY_HAND}"
        )
    known = kind.get_coordinator_address(timeout_secs=None, override_coordinator_port=None)
    return format_address(first, int(os.environ.get("JAX_COORDINATOR_PORT") or known.rpartition(":")[2]))


def _clean_worker_lists() -> None:
    """Remove spaces from the host lists of a TPU slice: neither jax nor libtpu expects them."""
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", _MEGASCALE):
        if given := os.environ.get(name, "").strip():
            with _read(name, given):
                hosts = worker_hosts(given)
                if name == _MEGASCALE and len(hosts) > 1:
                    raise ValueError("it is one address")
            os.environ[name] = ",".join(hosts)
        elif name != _MEGASCALE:
            # jax would take an empty variable for a list of one host without a name.
            os.environ.pop(name, None)


@contextmanager
def _read(name: str, value: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"{name} cannot be read: {value[:200]!r} ({error}): {_BY_HAND}") from None
