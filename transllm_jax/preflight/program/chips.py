"""TPU chips and the slices that can be rented: speeds, links, names, and devices to compile for without a TPU.

Sources: Google Cloud's pages docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (peak FLOPs, HBM, shapes,
accelerator types), and the tables of "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus (links, rings).
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from transllm_jax.errors import UserError
from transllm_jax.training.flops import PEAK

if TYPE_CHECKING:
    import jax

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One TPU generation. Numbers are for one chip, which JAX shows as one device (two TensorCores form a "megacore").

    `hbm_bytes`: by the data sheet; `usable_hbm_bytes`: what the compiler lets a program use. `hbm_bandwidth`: bytes/s.
    `link_bandwidth`: bytes/s of one link in one direction, from the book, a tenth below the pages' round numbers.
    `torus`: dimensions of the network, with two links each.
    """

    name: str
    device_kind: str
    hbm_bytes: float
    usable_hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    torus: int
    cores: int
    accelerator: str
    # The number in the accelerator's name counts cores (v4, v5p) or chips (v5e, v6e).
    named_by_cores: bool
    # Chips of the largest slice.
    largest: int
    sources: str

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAK[self.device_kind]


_BOOK = "How to Scale Your Model, part 2"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            device_kind="TPU v4",
            hbm_bytes=32 * GIB,
            usable_hbm_bytes=30.75 * GIB,
            hbm_bandwidth=1.2e12,
            link_bandwidth=4.5e10,
            torus=3,
            cores=2,
            accelerator="v4",
            named_by_cores=True,
            largest=4096,
            sources=f"docs.cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s; {_BOOK}: 45 GB/s a link",
        ),
        Chip(
            name="v5e",
            device_kind="TPU v5 lite",
            hbm_bytes=16 * GIB,
            usable_hbm_bytes=15.75 * GIB,
            hbm_bandwidth=8.19e11,
            link_bandwidth=4.5e10,
            torus=2,
            cores=1,
            accelerator="v5litepod",
            named_by_cores=False,
            largest=256,
            sources="docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, 400 GB/s over 4 ports both "
            f"ways; {_BOOK}: 45 GB/s a link",
        ),
        Chip(
            name="v5p",
            device_kind="TPU v5",
            hbm_bytes=95 * GIB,
            usable_hbm_bytes=95 * GIB,  # the compiler would allow 95.74 GiB
            hbm_bandwidth=2.765e12,
            link_bandwidth=9e10,
            torus=3,
            cores=2,
            accelerator="v5p",
            named_by_cores=True,
            largest=6144,
            sources="docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2765 GB/s, 1200 GB/s over 6 ports both "
            f"ways; {_BOOK}: 90 GB/s a link",
        ),
        Chip(
            name="v6e",
            device_kind="TPU v6 lite",
            hbm_bytes=32 * GIB,
            usable_hbm_bytes=31.25 * GIB,
            hbm_bandwidth=1.638e12,
            link_bandwidth=9e10,
            torus=2,
            cores=1,
            accelerator="v6e",
            named_by_cores=False,
            largest=256,
            sources="docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1638 GB/s, 800 GB/s over 4 ports both "
            f"ways; {_BOOK}: 90 GB/s a link",
        ),
    )
}

# The shapes of v5e and v6e slices; those of v4 and v5p follow a rule, see `parse_topology`.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


@dataclass(frozen=True)
class Topology:
    """A slice: `dims` chips along each dimension of the network."""

    chip: Chip
    dims: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}"

    @property
    def chips(self) -> int:
        return prod(self.dims)

    @property
    def devices(self) -> int:
        """How many devices JAX shows: one for each chip, in all generations."""
        return self.chips

    @property
    def hosts(self) -> int:
        """How many hosts: each has 4 chips, except that up to 8 chips of v5e and v6e are on one host."""
        return 1 if self.chip.torus == 2 and self.chips <= 8 else self.chips // 4

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions are rings: those of 16 in v5e and v6e, all in v4 and v5p slices of whole 4x4x4 cubes."""
        if self.chip.torus == 2:
            return tuple(size == 16 for size in self.dims)
        return (all(size % 4 == 0 for size in self.dims),) * len(self.dims)

    @property
    def accelerator_type(self) -> str:
        """The name in Google Cloud: v5litepod-16, v6e-4; v4-32 and v5p-8 count TensorCores."""
        return f"{self.chip.accelerator}-{self.chips * (self.chip.cores if self.chip.named_by_cores else 1)}"


def parse_topology(name: str) -> Topology:
    """The slice of a name such as `v5e:4x4`. Raises UserError for a chip or shape that cannot be rented."""
    form = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if form is None:
        raise UserError(f"--topology {name}: write CHIP:SHAPE, for example v5e:4x4, v4:2x2x4, v5p:2x2x1 or v6e:2x2")
    if form[1] not in CHIPS:
        raise UserError(f"--topology {name}: {form[1]} is not known; use one of {', '.join(CHIPS)}")
    chip, dims = CHIPS[form[1]], tuple(map(int, form[2].split("x")))
    if chip.torus == 2:
        if form[2] not in FLAT:
            raise UserError(f"--topology {name}: no slice of {chip.name} has this shape; use one of {', '.join(FLAT)}")
    elif not _is_cubic(dims) or prod(dims) > chip.largest:
        raise UserError(
            f"--topology {name}: no slice of {chip.name} has this shape; use 2x2x1, 2x2x2, 2x2x4, 2x4x4, or rising "
            f"multiples of 4 such as 4x4x8, up to {chip.largest} chips"
        )
    return Topology(chip, dims)


def _is_cubic(dims: tuple[int, ...]) -> bool:
    if dims == (2, 2, 1):
        return True
    small, cubes = all(size in (2, 4) for size in dims), all(size and size % 4 == 0 for size in dims)
    return len(dims) == 3 and list(dims) == sorted(dims) and (small or cubes)


def topology_devices(name: str) -> list[jax.Device]:
    """Devices of a slice to compile for without a TPU, ordered by id (x varies fastest), with `coords`.

    libtpu reads its environment once, when it is loaded; variables that it needs are set here unless they are set
    already. It then gives every generation and shape in the same process, whatever TPU_ACCELERATOR_TYPE says. Unless a
    platform is chosen, JAX is set to the CPU, so that it does not look for TPUs. Raises UserError without libtpu.
    """
    topology = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {name}: the TPU compiler is not installed: pip install 'transllm-jax[tpu]'")
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask the metadata server, which only a TPU VM has
        "TPU_ACCELERATOR_TYPE": topology.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so several processes may compile at once
    }
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    import jax
    from jax.experimental import topologies

    if not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")
    options: dict[str, object] = {"chips_per_host_bounds": _host_shape(topology)}
    if topology.chip.name == "v4":
        # Otherwise libtpu gives each core of a v4 chip as a device with half the memory; JAX on a v4 does not.
        options["chip_config_name"] = "megacore"
    found: Any = topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    devices = sorted(found, key=lambda device: device.id)
    if len(devices) != topology.devices:
        raise RuntimeError(f"libtpu gives {len(devices)} devices for {name}, not {topology.devices}")
    return devices


def _host_shape(topology: Topology) -> list[int]:
    if topology.hosts == 1:
        return [*topology.dims, 1][:3]
    return [2, 2, 1]
