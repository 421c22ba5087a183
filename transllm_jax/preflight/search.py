"""Which meshes, batches and rematerialisation to try first: candidates, ordered by a speed estimated from shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transllm_jax.choices import Remat
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.mesh import make_layout
from transllm_jax.preflight.measure import BEST
from transllm_jax.preflight.program.chips import Topology
from transllm_jax.preflight.program.roofline import group_bandwidth
from transllm_jax.preflight.programs import ModelShapes, Program, training_program

# Rematerialisation policies worth trying, with executed FLOPs divided by the model's as counted in compiled steps of
# LLaMA-2-7B. `none` keeps more than `projections` and saves no FLOPs.
_EXECUTED: dict[Remat, float] = {
    "projections": 1.02,
    "queries": 1.06,
    "feed_forward": 1.14,
    "attention": 1.23,
    "full": 1.40,
}
# With more tensor parallelism each product crosses slow links.
_MOST_TENSOR = 8


@dataclass(frozen=True)
class Candidate:
    """A way to run a step. memory: estimated bytes on a device. seconds: estimated, for a token of the whole slice."""

    mesh: tuple[int, int, int]
    remat: Remat
    batch_size: int
    accumulate: int
    program: Program
    memory: float
    seconds: float


def candidates(
    model: ModelShapes, stage: str, topology: Topology, devices: list[Any], batch_size: int, length: int
) -> list[Candidate]:
    """Candidates that are estimated to fit, fastest first. Steps have at least `batch_size` rows, in equal parts."""
    found = []
    for mesh in _meshes(topology.devices):
        layout = make_layout(mesh, model.config.attention, devices)
        for remat in _EXECUTED:
            for rows in (1, 2, 4, 8, 16, 32, 64):
                at_once = rows * layout.batch_parts
                accumulate = max(1, -(-batch_size // at_once))
                if rows > 1 and at_once > max(batch_size, layout.batch_parts):
                    break
                try:
                    program = training_program(
                        model,
                        stage,
                        layout,
                        remat=remat,
                        batch_size=at_once * accumulate,
                        accumulate=accumulate,
                        length=length,
                    )
                except UserError:
                    continue  # the mesh does not divide the model
                memory = _memory(program, model.shape, rows * length)
                if memory <= topology.chip.usable_hbm_bytes:
                    seconds = _seconds(program, model, topology, mesh, remat, accumulate)
                    found.append(Candidate(mesh, remat, at_once * accumulate, accumulate, program, memory, seconds))
    return sorted(found, key=lambda candidate: candidate.seconds)


def _meshes(devices: int) -> Iterator[tuple[int, int, int]]:
    tensor = 1
    while tensor <= min(devices, _MOST_TENSOR):
        for data in (1, 2, 4, 8, 16):
            if devices % (data * tensor) == 0 and devices // (data * tensor) >= 1:
                yield data, devices // (data * tensor), tensor
        tensor *= 2


def _memory(program: Program, shape: LlamaConfig, tokens: int) -> float:
    # Activations of one layer, the gathered weights of two, and the vocabulary's tables for the loss.
    d, f = shape.hidden_size, shape.intermediate_size
    layer = 4 * d * d + 3 * d * f
    tables = 3 * shape.vocab_size * d
    working = 2.0 * (tokens * (12 * f + 16 * d) / program.layout.size("tensor") + 2 * layer + tables)
    return sum(program.arguments.values()) + sum(kept.bytes for kept in program.kept) + working


def _seconds(
    program: Program, model: ModelShapes, topology: Topology, mesh: tuple[int, int, int], remat: Remat, accumulate: int
) -> float:
    chip, (data, fsdp, tensor) = topology.chip, mesh
    compute = program.model_flops * _EXECUTED[remat] / topology.devices / (chip.peak_flops * BEST)
    device_mesh = program.layout.mesh
    assert device_mesh is not None
    group = [device.coords for device in device_mesh.devices[0, :, 0]]
    weights = program.arguments["frozen"] * fsdp
    gathers = 2 * accumulate * weights * (fsdp - 1) / fsdp / group_bandwidth(group, topology) if fsdp > 1 else 0.0
    # Each layer gathers and sums its states over `tensor`: forward, backward, and in the recomputed forward pass.
    states = 12 * model.shape.num_hidden_layers * 2 * model.shape.hidden_size * program.tokens / (data * fsdp)
    sums = states * (tensor - 1) / tensor / (2 * chip.link_bandwidth) if tensor > 1 else 0.0
    return (max(compute, gathers) + sums) / program.tokens
