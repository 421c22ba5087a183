"""A compiled program's memory by kind, FLOPs, traffic, and an estimate of its seconds."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import partial

import jax

from transllm_jax.model.splash import kernel_bytes, kernel_flops
from transllm_jax.preflight.program.chips import Topology
from transllm_jax.preflight.program.hlo import Counts, CustomCall, count_hlo
from transllm_jax.preflight.program.roofline import Estimate, estimate_step
from transllm_jax.preflight.programs import Program

# Shares of the peak FLOP/s that the best published run and an ordinary one imply; see preflight/program/roofline.py.
BEST, ORDINARY = 0.93, 0.83


@dataclass(frozen=True)
class Measured:
    """A program compiled for a slice. Bytes are on one device.

    needed: bytes of arguments, temporaries and results; if the program does not fit, what the compiler's error says.
    seconds: of the compilation. counts and the estimates (at the `BEST` and the `ORDINARY` share of the peak) are None
    if it does not fit.
    """

    program: Program
    topology: Topology
    needed: float
    temporary: float
    counts: Counts | None
    best: Estimate | None
    ordinary: Estimate | None
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the program fits a chip's memory."""
        return self.counts is not None and self.needed <= self.topology.chip.usable_hbm_bytes

    @property
    def kept(self) -> int:
        """Bytes of the residuals kept for the backward pass."""
        return sum(kept.bytes for kept in self.program.kept)

    @property
    def executed(self) -> float:
        """Executed FLOPs divided by the model's FLOPs."""
        assert self.counts is not None
        return self.counts.flops * self.program.layout.size() / self.program.model_flops

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of the whole slice, by the best estimate."""
        assert self.best is not None
        return self.program.tokens / self.best.seconds

    def buffers(self, number: int = 6) -> list[tuple[str, float]]:
        """Name and bytes on one device of the `number` largest arrays that have a name."""
        found: list[tuple[str, float]] = list(self.program.buffers.items())
        found += [(str(kept), kept.bytes) for kept in self.program.kept]
        return sorted(found, key=lambda item: -item[1])[:number]


def measure(program: Program, topology: Topology) -> Measured:
    """Compile a program and count its work. Takes minutes for a large model."""
    started = time.monotonic()
    arguments = float(sum(program.arguments.values()))
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _bytes_wanted(str(error))
        if needed is None:
            raise
        temporary = max(needed - arguments, 0.0)
        return Measured(program, topology, needed, temporary, None, None, None, time.monotonic() - started)
    memory = compiled.memory_analysis()
    # A donated array (alias) is both an argument and a result.
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    counts = count_hlo(compiled.as_text(), partial(_explain, program.window), program.rounds)
    mesh = program.layout.mesh
    assert mesh is not None
    coordinates = [device.coords for device in mesh.devices.flat]
    best, ordinary = (
        estimate_step(counts, topology, dict(mesh.shape), coordinates, program.model_flops, efficiency=share)
        for share in (BEST, ORDINARY)
    )
    spent = time.monotonic() - started
    return Measured(program, topology, needed, memory.temp_size_in_bytes, counts, best, ordinary, spent)


def _bytes_wanted(message: str) -> float | None:
    """The bytes that a program needs by the compiler's out-of-memory error; None for another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in (r"HLO temporaries \(([\d.]+)([KMGT])\)", r"Used ([\d.]+)([KMGT]) of", r"([\d.]+)([KMGT])"):
        if match := re.search(pattern, message):
            return float(match[1]) * 2 ** (10 * ("KMGT".index(match[2]) + 1))
    return None


def _explain(window: int | None, call: CustomCall) -> tuple[float, float | None] | None:
    """FLOPs and bytes of a splash attention kernel whose queries attend to at most `window` keys; None for others."""
    shapes, name = [operand.dims for operand in call.operands], call.kernel or call.op_name
    # q is the first floating-point operand.
    itemsize = next((4 if operand.dtype == "f32" else 2 for operand in call.operands if "f" in operand.dtype), 2)
    flops = kernel_flops(name, shapes, window=window, itemsize=itemsize)
    return None if flops is None else (flops, kernel_bytes(name, shapes, window=window, itemsize=itemsize))
