"""A roofline estimate of a step's seconds from the counts of its program, with every assumption spelled out.

A chip computes at a share of its peak, moves HBM at its published bandwidth, and sends over the links of its torus.
Instructions run in sequence, each for the longer of its products and its bytes; collectives that the program starts and
awaits later overlap with them, and other collectives with nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from transllm_jax.preflight.program.chips import Chip, Topology
from transllm_jax.preflight.program.hlo import Collective, Counts

# Share of the peak that products reach while they run, from the fastest published run on v5e: MaxText's 32B on v5e-256
# with full rematerialisation, 4 x 2,048 tokens a chip, at 66.9 % MFU (MaxText/configs/v5e). A model of that size and
# batch, compiled for that slice, executes 1.26 times the model's FLOPs, and this estimate gives it 66.8 % at a share of
# 0.92 and 67.4 % at 0.93: with less, the estimate would call that run impossible. The 16B of the same table, 61.1 %,
# needs only 0.83, so the estimate of an ordinary run is up to a tenth too good.
EFFICIENCY = 0.93
EFFICIENCY_SOURCE = (
    "what this estimate needs to reach the 66.9 % MFU that MaxText measured with 32B on v5e-256; "
    "its 16B, 61.1 %, needs 83% only"
)

Coordinates = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Estimate:
    """Estimated seconds of one execution of a program, and their parts.

    `compute`, `memory`: of all products and of all HBM bytes, each as if alone. `network`: of collectives, by the mesh
    axes that they run over ("fsdp", "data+fsdp"). `exposed`: network time that overlaps with nothing. `bound`: what
    `seconds` depend on most: compute, memory or network. `mfu`, `hfu`: model FLOPs and executed FLOPs divided by peak
    times `seconds`.
    """

    seconds: float
    compute: float
    memory: float
    network: dict[str, float]
    exposed: float
    bound: str
    mfu: float
    hfu: float
    assumptions: list[str]


def estimate_step(
    counts: Counts,
    topology: Topology,
    mesh: Mapping[str, int],
    coordinates: Coordinates,
    model_flops: float,
    *,
    efficiency: float = EFFICIENCY,
) -> Estimate:
    """Estimate one execution of a program from its counts on one device.

    `mesh`: sizes of the axes, outermost first. `coordinates`: of the devices in the torus, in the mesh's order
    (`[device.coords for device in mesh.devices.flat]`). `model_flops`: of the whole step on all devices, without
    rematerialisation.
    """
    if len(coordinates) != prod(mesh.values()):
        raise ValueError(f"{len(coordinates)} coordinates for a mesh of {prod(mesh.values())} devices")
    chip = topology.chip
    rate = chip.peak_flops * efficiency
    compute, memory = counts.flops / rate, counts.hbm_bytes / chip.hbm_bandwidth
    products, moving = _sequence(counts, rate, chip.hbm_bandwidth)
    blocking = _network(counts, topology, mesh, coordinates, asynchronous=False)
    overlapped = _network(counts, topology, mesh, coordinates, asynchronous=True)
    network = {axes: blocking.get(axes, 0.0) + overlapped.get(axes, 0.0) for axes in {**blocking, **overlapped}}
    # Different axes use different links, so overlapped collectives run on all axes at once.
    hidden = max(overlapped.values(), default=0.0)
    overhang = max(0.0, hidden - products - moving)
    exposed = sum(blocking.values()) + overhang
    seconds = products + moving + exposed
    shares = {"compute": products, "memory": moving, "network": exposed}
    return Estimate(
        seconds=seconds,
        compute=compute,
        memory=memory,
        network=network,
        exposed=exposed,
        # Links that are busy longer than all else set the pace, also where most of their time is hidden.
        bound="network" if overhang else max(shares, key=lambda name: shares[name]),
        mfu=model_flops / (topology.devices * chip.peak_flops * seconds) if seconds else 0.0,
        hfu=counts.flops / (chip.peak_flops * seconds) if seconds else 0.0,
        assumptions=[*_assumptions(topology, efficiency), *counts.unexplained],
    )


def _sequence(counts: Counts, rate: float, bandwidth: float) -> tuple[float, float]:
    """Seconds of the instructions that are bound by products, and of those bound by bytes, run in sequence."""
    products = moving = 0.0
    for work in counts.work.values():
        if work.kind != "compute":
            continue
        computing, loading = work.flops / rate, work.hbm_bytes / bandwidth
        if computing >= loading:
            products += work.executions * computing
        else:
            moving += work.executions * loading
    return products, moving


def _network(
    counts: Counts, topology: Topology, mesh: Mapping[str, int], coordinates: Coordinates, *, asynchronous: bool
) -> dict[str, float]:
    """Seconds of the collectives, by the mesh axes that they run over.

    A permute uses a ring's links in one direction; permutes in opposite directions run at the same time.
    """
    seconds: dict[str, float] = defaultdict(float)
    permutes: dict[str, dict[bool, float]] = defaultdict(lambda: {True: 0.0, False: 0.0})
    for collective in counts.collectives.values():
        if collective.asynchronous is not asynchronous or not collective.link_bytes:
            continue
        axes = "+".join(axes_of(max(collective.groups, key=len), mesh)) or "none"
        taken = collective.executions * collective_seconds(collective, topology, coordinates)
        if collective.pairs:
            permutes[axes][_goes_forward(collective)] += taken
        else:
            seconds[axes] += taken
    for axes, both in permutes.items():
        seconds[axes] += max(both.values())
    return dict(seconds)


def axes_of(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ. The group holds positions in the mesh's order."""
    places = [_place(device, mesh) for device in group]
    return tuple(name for index, name in enumerate(mesh) if len({place[index] for place in places}) > 1)


def _place(device: int, mesh: Mapping[str, int]) -> list[int]:
    place: list[int] = []
    for size in reversed(list(mesh.values())):
        device, rest = divmod(device, size)
        place.insert(0, rest)
    return place


def _goes_forward(collective: Collective) -> bool:
    """Whether the shorter way of a permute goes up its ring."""
    source, target = next(pair for pair in collective.pairs if pair[0] != pair[1])
    group = next(group for group in collective.groups if source in group)
    return (group.index(target) - group.index(source)) % len(group) * 2 <= len(group)


def collective_seconds(collective: Collective, topology: Topology, coordinates: Coordinates) -> float:
    """Seconds of one execution, in the slowest of its groups.

    Gathers and reductions: a device's bytes divided by the bandwidth of its group (`group_bandwidth`). All-to-alls: the
    bytes that cross the middle of the longest dimension. Permutes: the bytes over one link in one direction, times the
    hops of the longest route.
    """
    link = topology.chip.link_bandwidth
    if collective.pairs:
        hops = max(_hops(coordinates[source], coordinates[target], topology) for source, target in collective.pairs)
        return collective.link_bytes * hops / link
    worst = 0.0
    for group in collective.groups:
        if len(group) < 2:
            continue
        where = [coordinates[device] for device in group]
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            worst = max(worst, _crossing(collective.operand_bytes, where, topology))
        else:
            worst = max(worst, collective.link_bytes / group_bandwidth(where, topology))
    return worst


def group_bandwidth(where: Coordinates, topology: Topology) -> float:
    """Bytes/s that each device of a group at these coordinates can receive while all such groups communicate.

    A dimension that the group spans gives two links if it is a ring, else one: the end of a line has no more. A group
    with gaps shares its links with the groups in the gaps.
    """
    links, room = 0, 1
    for dim, size in enumerate(topology.dims):
        places = sorted({place[dim] for place in where})
        if len(places) < 2:
            continue
        gap = min(after - before for before, after in pairwise(places))
        ring = topology.wraps[dim] and len(places) * gap == size
        links += 2 if ring else 1
        room *= size if ring else places[-1] - places[0] + 1
    return links * topology.chip.link_bandwidth * len(where) / room


def _crossing(operand: float, where: Coordinates, topology: Topology) -> float:
    """Seconds of an all-to-all. In a line of n devices, half the bytes of n / 2 devices cross the middle link: n / 4
    operands. A ring has two links there."""
    seconds = 0.0
    for dim, size in enumerate(topology.dims):
        places = {place[dim] for place in where}
        ring = topology.wraps[dim] and len(places) == size
        if len(places) > 1:
            seconds = max(seconds, operand * len(places) / ((8 if ring else 4) * topology.chip.link_bandwidth))
    return seconds


def _hops(source: Sequence[int], target: Sequence[int], topology: Topology) -> int:
    hops = 0
    for dim, size in enumerate(topology.dims):
        apart = abs(source[dim] - target[dim])
        hops += min(apart, size - apart) if topology.wraps[dim] else apart
    return hops


def _assumptions(topology: Topology, efficiency: float) -> list[str]:
    chip: Chip = topology.chip
    rings = [str(size) for size, wraps in zip(topology.dims, topology.wraps, strict=True) if wraps]
    shape = f"rings of {' and '.join(rings)}" if rings else "no dimension of this slice is a ring"
    source = EFFICIENCY_SOURCE if efficiency == EFFICIENCY else "given by the caller"
    other = "" if chip.name == "v5e" or efficiency != EFFICIENCY else f"; nothing as close is published for {chip.name}"
    return [
        f"Products run at {efficiency:.0%} of {chip.peak_flops / 1e12:.0f} TFLOP/s bfloat16 a chip ({source}{other}).",
        f"HBM moves {chip.hbm_bandwidth / 1e9:.0f} GB/s, and every operand and result outside VMEM once.",
        f"A link moves {chip.link_bandwidth / 1e9:.0f} GB/s each way ({chip.sources}); {shape}.",
        "A collective uses the links of every dimension that its devices span, a ring's in both directions.",
        "Instructions run one after the other; each takes the longer of its products and its bytes.",
        "Collectives that the program starts and awaits later overlap with that, on all axes at once; others stop it.",
        "Latency, start-up, input and the hosts cost 0 s.",
    ]
