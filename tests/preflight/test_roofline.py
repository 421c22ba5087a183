"""Chips, slices and the roofline: hand-worked numbers, and runs that were measured elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from transllm_jax.errors import UserError
from transllm_jax.preflight.program import roofline
from transllm_jax.preflight.program.chips import CHIPS, FLAT, parse_topology, topology_devices
from transllm_jax.preflight.program.hlo import Collective, Counts, Work
from transllm_jax.preflight.program.roofline import axes_of, collective_seconds, estimate_step, group_bandwidth
from transllm_jax.training.flops import PEAK

LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "wraps", "accelerator"),
    [
        ("v5e:1x1", 1, 1, (False, False), "v5litepod-1"),
        ("v5e:2x4", 8, 1, (False, False), "v5litepod-8"),
        ("v5e:4x4", 16, 4, (False, False), "v5litepod-16"),
        ("v5e:8x16", 128, 32, (False, True), "v5litepod-128"),
        ("v5e:16x16", 256, 64, (True, True), "v5litepod-256"),
        ("v6e:2x2", 4, 1, (False, False), "v6e-4"),
        ("v4:2x2x1", 4, 1, (False, False, False), "v4-8"),
        ("v4:2x2x4", 16, 4, (False, False, False), "v4-32"),
        ("v4:4x4x8", 128, 32, (True, True, True), "v4-256"),
        ("v5p:2x2x1", 4, 1, (False, False, False), "v5p-8"),
        ("v5p:4x4x4", 64, 16, (True, True, True), "v5p-128"),
    ],
)
def test_slices(name: str, chips: int, hosts: int, wraps: tuple[bool, ...], accelerator: str) -> None:
    found = parse_topology(name)
    assert (found.name, found.chips, found.devices, found.hosts) == (name, chips, chips, hosts)
    assert found.chips_per_host * hosts == chips
    assert found.wraps == wraps and found.accelerator_type == accelerator


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("v5e", "v5e:4x4"),
        ("v5e:", "v5e:4x4"),
        ("v5e:4X4", "v5e:4x4"),
        ("v3:4x4", "v4, v5e, v5p, v6e"),
        ("v5e:4x2", "2x4"),
        ("v5e:3x3", "2x2"),
        ("v5e:32x32", "16x16"),
        ("v6e:2x2x1", "2x2"),
        ("v4:2x2", "2x2x1"),
        ("v4:4x2x2", "2x2x4"),
        ("v4:4x4x6", "4x4x8"),
        ("v4:0x4x4", "4x4x8"),
        ("v4:16x16x20", "4096 chips"),
        ("v5p:16x20x28", "6144 chips"),
    ],
)
def test_what_is_no_slice_is_refused(name: str, part: str) -> None:
    with pytest.raises(UserError, match=f"--topology {name}: ") as caught:
        parse_topology(name)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_the_table_of_chips() -> None:
    for name, chip in CHIPS.items():
        assert chip.name == name and chip.peak_flops == PEAK[chip.device_kind]
        assert f": {chip.peak_flops / 1e12:.0f} TFLOP/s" in chip.sources
        assert chip.usable_hbm_bytes <= chip.hbm_bytes
        assert f"docs.cloud.google.com/tpu/docs/{name}" in chip.sources
    assert all(parse_topology(f"v5e:{shape}") for shape in FLAT)


ASK = """
import json, sys
from transllm_jax.preflight.program.chips import parse_topology, topology_devices
found = {}
for name in sys.argv[1:]:
    devices = topology_devices(name)
    found[name] = [devices[0].device_kind, len(devices), len({device.process_index for device in devices}),
                   [list(device.coords) for device in devices]]
print(json.dumps(found))
"""


@LIBTPU
def test_one_process_gets_devices_of_every_generation() -> None:
    names = ["v5e:4x4", "v4:2x2x4", "v5p:2x2x1", "v6e:2x2", "v5e:1x1", "v6e:2x4", "v4:2x2x1", "v5e:16x16", "v5p:4x4x8"]
    inherited = ("TPU_", "JAX_PLATFORMS", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(inherited)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", ASK, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        topology = parse_topology(name)
        kind, devices, hosts, coordinates = answers[name]
        assert (kind, devices, hosts) == (topology.chip.device_kind, topology.devices, topology.hosts), name
        first = [1, 0, 0] if topology.dims[0] > 1 else [0, 0, 0]
        assert coordinates[0] == [0, 0, 0] and (devices == 1 or coordinates[1] == first)
        assert [max(place[dim] for place in coordinates) + 1 for dim in range(len(topology.dims))] == [*topology.dims]


def test_without_libtpu_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'transllm-jax\[tpu\]'"):
        topology_devices("v5e:4x4")


# The roofline.


def places(*dims: int) -> list[tuple[int, ...]]:
    """Coordinates of a slice's devices, the last dimension fastest, as a mesh over them in this order."""
    found: list[tuple[int, ...]] = [()]
    for size in dims:
        found = [(*place, number) for place in found for number in range(size)]
    return found


def collective(
    kind: str,
    link_bytes: float,
    groups: tuple[tuple[int, ...], ...],
    *,
    name: str = "c",
    operand: float = 0.0,
    pairs: tuple[tuple[int, int], ...] = (),
    asynchronous: bool = True,
    executions: int = 1,
) -> Collective:
    return Collective(name, kind, "", executions, operand, 0.0, link_bytes, groups, pairs, asynchronous)


def program(*collectives: Collective, flops: float = 0.0, hbm: float = 0.0, kind: str = "compute") -> Counts:
    work = {"w": Work("w", kind, "", 1, flops, hbm)} if flops or hbm else {}
    return Counts(work=work, collectives={found.name: found for found in collectives})


@pytest.mark.parametrize(
    ("name", "group", "links"),
    [
        ("v5e:4x4", [(0, y) for y in range(4)], 1),  # the end of a line has one link
        ("v5e:4x4", places(4, 4), 2),
        ("v5e:16x16", [(3, y) for y in range(16)], 2),
        ("v5e:16x16", places(16, 16), 4),
        ("v5e:8x16", places(8, 16), 3),
        ("v5e:16x16", [(3, y) for y in range(4)], 1),  # a part of a ring is a line
        ("v5e:16x16", [(3, y) for y in range(0, 16, 4)], 2 / 4),  # four groups share a ring
        ("v5e:4x4", [(0, 0), (0, 2)], 2 / 3),  # a gap: three chips in the way of two
        ("v5p:2x2x1", places(2, 2, 1), 2),
        ("v5p:4x4x4", places(4, 4, 4), 6),
    ],
)
def test_the_links_that_a_group_has(name: str, group: list[tuple[int, ...]], links: float) -> None:
    topology = parse_topology(name)
    assert group_bandwidth(group, topology) == pytest.approx(links * topology.chip.link_bandwidth, rel=1e-12)


def test_a_gather_takes_what_the_book_works_out() -> None:
    """How to Scale Your Model, part 2, question 6: 15 GB to a corner of a v5e 4x4 over two links of 45 GB/s: 167 ms."""
    found = collective("all-gather", 15e9, (tuple(range(16)),))
    assert collective_seconds(found, parse_topology("v5e:4x4"), places(4, 4)) == pytest.approx(15e9 / 9e10)


def test_an_all_to_all_on_a_ring_takes_a_quarter_of_the_gather() -> None:
    """Part 3 of the book: on a bidirectional ring."""
    topology, where = parse_topology("v5e:16x16"), places(16, 16)
    groups, operand = (tuple(range(16)),), 1e9
    swapped = collective("all-to-all", operand * 15 / 16, groups, operand=operand)
    # The gather of the same array, whose whole is 16 parts.
    gathered = collective("all-gather", 16 * operand * 15 / 16, groups)
    ratio = collective_seconds(swapped, topology, where) / collective_seconds(gathered, topology, where)
    assert ratio == pytest.approx(0.25 * 16 / 15)
    line = parse_topology("v5e:4x4")
    four = collective("all-to-all", operand * 3 / 4, ((0, 1, 2, 3),), operand=operand)
    assert collective_seconds(four, line, places(4, 4)) == pytest.approx(operand * 4 / 4 / 4.5e10)


def test_a_permute_pays_for_every_hop_and_two_directions_run_at_once() -> None:
    topology, where = parse_topology("v5e:4x4"), places(4, 4)
    mesh = {"data": 4, "fsdp": 4}
    group = ((0, 1, 2, 3),)
    up = collective("collective-permute", 9e10, group, pairs=((0, 1), (1, 2), (2, 3)), name="up")
    down = collective("collective-permute", 4.5e10, group, pairs=((1, 0), (2, 1), (3, 2)), name="down")
    around = collective("collective-permute", 9e10, group, pairs=((0, 1), (1, 2), (2, 3), (3, 0)))
    assert collective_seconds(up, topology, where) == pytest.approx(2.0)
    assert collective_seconds(around, topology, where) == pytest.approx(6.0)  # the way back has three hops
    rings = parse_topology("v5e:16x16")
    back = collective("collective-permute", 9e10, (tuple(range(16)),), pairs=((15, 0),))
    assert collective_seconds(back, rings, places(16, 16)) == pytest.approx(2.0)
    estimate = estimate_step(program(up, down), topology, mesh, where, 0.0)
    assert estimate.network == {"fsdp": pytest.approx(2.0)}


def test_the_axes_of_a_group() -> None:
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    assert axes_of((0, 1), mesh) == ("tensor",)
    assert axes_of((0, 2, 4, 6), mesh) == ("fsdp",)
    assert axes_of((0, 8), mesh) == ("data",)
    assert axes_of((1, 3, 5, 7, 9, 11, 13, 15), mesh) == ("data", "fsdp")
    assert axes_of((5,), mesh) == ()


MESH = {"data": 4, "fsdp": 4}


def test_a_step_that_products_bound() -> None:
    topology = parse_topology("v5e:4x4")
    # Two seconds of products at half the peak, one second of HBM in the same instruction, one of network beside it.
    counts = program(collective("all-gather", 4.5e10, ((0, 1, 2, 3),)), flops=197e12, hbm=8.19e11)
    estimate = estimate_step(counts, topology, MESH, places(4, 4), 16 * 197e12 * 0.8, efficiency=0.5)
    assert estimate.compute == pytest.approx(2.0) and estimate.memory == pytest.approx(1.0)
    assert estimate.network == {"fsdp": pytest.approx(1.0)} and estimate.exposed == 0.0
    assert estimate.seconds == pytest.approx(2.0)
    assert estimate.bound == "compute"
    assert estimate.mfu == pytest.approx(0.4) and estimate.hfu == pytest.approx(0.5)


def test_a_collective_that_the_program_waits_for_adds_its_time() -> None:
    topology = parse_topology("v5e:4x4")
    waited = collective("all-reduce", 4.5e10 * 3, ((0, 1, 2, 3),), asynchronous=False)
    estimate = estimate_step(program(waited, flops=197e12), topology, MESH, places(4, 4), 0.0, efficiency=0.5)
    assert estimate.seconds == pytest.approx(5.0) and estimate.exposed == pytest.approx(3.0)
    assert estimate.bound == "network"


def test_what_runs_beside_the_computation_costs_only_what_is_longer() -> None:
    topology = parse_topology("v5e:4x4")
    fsdp = collective("all-gather", 4.5e10 * 5, ((0, 1, 2, 3),), name="a")
    data = collective("all-gather", 4.5e10 * 4, ((0, 4, 8, 12),), name="b")
    estimate = estimate_step(program(fsdp, data, flops=197e12), topology, MESH, places(4, 4), 0.0, efficiency=0.5)
    # Two axes are different links; five seconds of the longer one, of which two are hidden.
    assert estimate.network == {"fsdp": pytest.approx(5.0), "data": pytest.approx(4.0)}
    assert estimate.seconds == pytest.approx(5.0) and estimate.exposed == pytest.approx(3.0)
    # With fewer bytes most of it is hidden, and the links are still what the step waits for.
    fsdp = collective("all-gather", 4.5e10 * 3, ((0, 1, 2, 3),), name="a")
    estimate = estimate_step(program(fsdp, flops=197e12), topology, MESH, places(4, 4), 0.0, efficiency=0.5)
    assert estimate.seconds == pytest.approx(3.0) and estimate.exposed == pytest.approx(1.0)
    assert estimate.bound == "network"


def test_instructions_do_not_overlap_and_copies_do() -> None:
    topology = parse_topology("v5e:4x4")
    counts = Counts(
        work={
            "product": Work("product", "compute", "", 2, 197e12 / 4, 8.19e11 / 10),
            "norm": Work("norm", "compute", "", 3, 0.0, 8.19e11),
            "copy": Work("copy", "copy", "", 1, 0.0, 8.19e11 / 2),
        }
    )
    estimate = estimate_step(counts, topology, MESH, places(4, 4), 0.0, efficiency=0.5)
    assert estimate.seconds == pytest.approx(2 * 0.5 + 3 * 1.0)
    assert estimate.compute == pytest.approx(1.0) and estimate.memory == pytest.approx(0.2 + 3.0 + 0.5)
    assert estimate.bound == "memory"


def test_every_assumption_is_said_with_its_number() -> None:
    counts = program(flops=1.0)
    counts.unexplained.append("custom call f: FLOPs not known")
    said = estimate_step(counts, parse_topology("v5e:8x16"), {"data": 128}, places(8, 16), 0.0).assumptions
    assert all(line for line in said) and said[-1] == "custom call f: FLOPs not known"
    assert "93% of 197 TFLOP/s" in said[0] and "66.9 % MFU" in said[0]
    assert "819 GB/s" in said[1] and "45 GB/s" in said[2] and "rings of 16" in said[2]
    other = estimate_step(counts, parse_topology("v4:2x2x1"), {"data": 4}, places(2, 2, 1), 0.0, efficiency=0.6)
    assert "60% of 275 TFLOP/s" in other.assumptions[0] and "given by the caller" in other.assumptions[0]
    assert (
        "nothing as close is published for v6e"
        in estimate_step(counts, parse_topology("v6e:2x2"), {"data": 4}, places(2, 2), 0.0).assumptions[0]
    )


def test_a_mesh_of_another_size_is_a_defect() -> None:
    with pytest.raises(ValueError, match="16 coordinates for a mesh of 8"):
        estimate_step(Counts(), parse_topology("v5e:4x4"), {"data": 8}, places(4, 4), 0.0)


@pytest.mark.parametrize(
    ("name", "parameters", "tokens", "executed", "measured"),
    [
        # MaxText/configs/v5e: one slice, full rematerialisation, batches of 6 and 4 rows of 2,048 a chip. Models of
        # these sizes, compiled for it, execute 1.26 times the model's FLOPs.
        ("v5e:16x16", 16e9, 6 * 2048, 1.26, 0.6110),
        ("v5e:16x16", 32e9, 4 * 2048, 1.26, 0.6686),
        # MaxText/configs/v5p: 32B on v5p-128, batches of 7, little is computed twice.
        ("v5p:4x4x4", 32e9, 7 * 2048, 1.0, 0.7147),
        # MaxText on v4-128: 22B; batch and rematerialisation are assumed.
        ("v4:4x4x4", 22e9, 8 * 2048, 1.26, 0.567),
    ],
)
def test_what_others_measured_is_not_called_impossible(
    name: str, parameters: float, tokens: int, executed: float, measured: float
) -> None:
    """Dense models sharded over all chips: the weights are gathered for three passes, the gradients scattered once."""
    topology = parse_topology(name)
    everyone = (tuple(range(topology.devices)),)
    model = 6 * parameters * tokens
    share = (topology.devices - 1) / topology.devices
    gathers = collective("all-gather", 2 * parameters * share, everyone, executions=3, name="gather")
    scatters = collective("reduce-scatter", 2 * parameters * share, everyone, name="scatter")
    # Weights are read from HBM in every pass.
    counts = program(gathers, scatters, flops=model * executed, hbm=2 * parameters * 4)
    estimate = estimate_step(
        counts, topology, {"fsdp": topology.devices}, places(*topology.dims), model * topology.devices
    )
    assert measured <= estimate.mfu <= roofline.EFFICIENCY / executed + 1e-9
    assert estimate.bound == "compute"
    assert estimate.hfu == pytest.approx(estimate.mfu * executed)
