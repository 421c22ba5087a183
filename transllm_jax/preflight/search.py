"""Which mesh, batch and rematerialisation to try first: guesses from shapes, in the order of their guessed speed."""

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
from transllm_jax.preflight.programs import Model, Program, training

# Executed FLOPs over the model's, as counted in compiled steps of LLaMA-2-7B, and the policies worth trying: `none`
# keeps more than `projections`, for nothing.
_EXECUTED: dict[Remat, float] = {
    "projections": 1.02,
    "queries": 1.06,
    "feed_forward": 1.14,
    "attention": 1.23,
    "full": 1.40,
}
# Tensor parallelism beyond this crosses slow links for every product.
_MOST_TENSOR = 8


@dataclass(frozen=True)
class Candidate:
    """A way to run a step: its program, guessed bytes on a device, and guessed seconds a token of a device."""

    mesh: tuple[int, int, int]
    remat: Remat
    batch_size: int
    accumulate: int
    program: Program
    memory: float
    seconds: float


def candidates(
    model: Model, stage: str, topology: Topology, devices: list[Any], batch_size: int, length: int
) -> list[Candidate]:
    """All that are guessed to fit, the fastest first. A step has at least `batch_size` rows, in whole parts."""
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
                    program = training(
                        model,
                        stage,
                        layout,
                        remat=remat,
                        batch_size=at_once * accumulate,
                        accumulate=accumulate,
                        length=length,
                    )
                except UserError:
                    continue  # a mesh that does not divide the model
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
    # What a layer at work takes, two layers' gathered weights, and the tables of the vocabulary for the loss.
    d, f = shape.hidden_size, shape.intermediate_size
    layer = 4 * d * d + 3 * d * f
    tables = 3 * shape.vocab_size * d
    working = 2.0 * (tokens * (12 * f + 16 * d) / program.layout.size("tensor") + 2 * layer + tables)
    return sum(program.arguments.values()) + sum(kept.bytes for kept in program.kept) + working


def _seconds(
    program: Program, model: Model, topology: Topology, mesh: tuple[int, int, int], remat: Remat, accumulate: int
) -> float:
    chip, (_, fsdp, tensor) = topology.chip, mesh
    compute = program.model_flops * _EXECUTED[remat] / topology.devices / (chip.peak_flops * BEST)
    laid = program.layout.mesh
    assert laid is not None
    group = [device.coords for device in laid.devices[0, :, 0]]
    kernels = program.arguments["frozen"] * fsdp
    gathers = 2 * accumulate * kernels * (fsdp - 1) / fsdp / group_bandwidth(group, topology) if fsdp > 1 else 0.0
    # Between the layers' parts states are gathered and summed over `tensor`, forward, backward and again.
    states = 12 * model.shape.num_hidden_layers * 2 * model.shape.hidden_size * program.tokens / (mesh[0] * fsdp)
    sums = states * (tensor - 1) / tensor / (2 * chip.link_bandwidth) if tensor > 1 else 0.0
    return (max(compute, gathers) + sums) / program.tokens
