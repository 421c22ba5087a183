"""How many bytes of main memory (HBM) an instruction of a compiled program moves.

Operands and results each once, as far as they lie in main memory (the layouts of TPU programs name the space). What
only a slice is taken of counts as the slice, an update in place as the update, also inside a fusion; a buffer that an
asynchronous collective carries through a fusion does not count. That a product may read an operand several times, tile
by tile, is not in it.
"""

from __future__ import annotations

import re

from transllm_jax.preflight.program.hlo_text import Computation, Instruction, Module

# Calls of the compiler's own that compute nothing and move nothing.
INTERNAL = frozenset(
    {
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "AsyncCollectiveDone",
        "AsyncCollectiveStart",
        "ConcatBitcast",
        "GatherScatterIndicesBitpacked",
        "Sharding",
        "SPMDFullToShardShape",
        "SPMDShardToFullShape",
        "annotate_device_placement",
    }
)
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# Instructions that name a value and do not touch memory.
FREE = frozenset(
    {
        "after-all",
        "add-dependency",
        "bitcast",
        "constant",
        "domain",
        "get-tuple-element",
        "opt-barrier",
        "optimization-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "reshape",
        "tuple",
    }
)
# Inside a fusion these read of their operand only what is read of them.
_ELEMENTWISE = frozenset({"bitcast", "reshape", "convert", "copy", "transpose", "negate"})
_SLICES = frozenset({"dynamic-slice", "slice", "slice-start", "gather"})


def collective_kind(instruction: Instruction) -> str | None:
    """The kind of a collective or of the start of one; None for others, and for the end of one."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def target(instruction: Instruction) -> str:
    """Which function a custom call calls; "" for other instructions."""
    return (instruction.value("custom_call_target") or "") if instruction.opcode == "custom-call" else ""


class Traffic:
    """Bytes of the instructions of a module."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._touched: dict[tuple[str, str], float] = {}
        # Collectives that run as a start, pieces inside other fusions, and an end: what the start says of them.
        self._started = {
            key
            for computation in module.computations.values()
            if self.starts(computation)
            for found in computation
            if (key := self._key(found))
        }

    @staticmethod
    def starts(computation: Computation) -> bool:
        """Whether a fused computation is the start of an asynchronous collective."""
        return any(target(found) == "AsyncCollectiveStart" for found in computation)

    @staticmethod
    def ends(computation: Computation) -> bool:
        return any(target(found) == "AsyncCollectiveDone" for found in computation)

    @staticmethod
    def _key(found: Instruction) -> tuple[str, str] | None:
        kind = collective_kind(found)
        return (kind, found.value("channel_id") or found.name) if kind else None

    def carried(self, computation: Computation, found: Instruction) -> bool:
        """Whether a collective inside a fusion is a piece or the end of one that another fusion starts."""
        return self._key(found) in self._started and not self.starts(computation)

    def bytes(self, around: Computation, found: Instruction) -> float:
        """Bytes that an instruction outside fusions moves to and from main memory, once."""
        if found.opcode in FREE or target(found) in INTERNAL or found.opcode.endswith(("-done", "-update")):
            return 0.0
        if found.opcode == "fusion":
            called = self.module.called(found)
            if self.ends(called):
                return 0.0
            if self.starts(called):
                # The result is a tuple of the operand, the buffer that is filled, and flags.
                read = around.instructions[found.operands[0]].shapes[0]
                return read.hbm() + found.shapes[1].hbm()
            return self._reads(around, found) + self._written(called, called.root, found)
        return self._reads(around, found) + self._stored(around, found)

    def _reads(self, around: Computation, found: Instruction) -> float:
        total = 0.0
        for position, shapes in enumerate(around.shapes(found)):
            for shape in shapes:
                if not shape.space:
                    total += shape.hbm(self._read(around, found, position, shape.elements))
        return total

    def _read(self, around: Computation, found: Instruction, position: int, elements: float) -> float:
        """How many elements of an operand an instruction reads."""
        if found.opcode in _SLICES and position == 0:
            return (found.shapes[1] if found.opcode == "slice-start" else found.shapes[0]).elements
        if found.opcode == "dynamic-update-slice" and position == 0:
            return 0
        if found.opcode == "scatter" and position < len(found.shapes):
            return around.shapes(found)[-1][0].elements
        if found.opcode == "fusion":
            called = self.module.called(found)
            return self._touch(called, called.parameters[position])
        if found.opcode == "tuple" or target(found) in INTERNAL or self._carries(around, found):
            return 0
        return elements

    def _carries(self, around: Computation, found: Instruction) -> bool:
        return collective_kind(found) is not None and self.carried(around, found)

    def _touch(self, computation: Computation, value: Instruction) -> float:
        """How many elements of a value inside a fusion are read."""
        key = (computation.name, value.name)
        if key not in self._touched:
            full = float(value.shapes[0].elements) if value.shapes else 0.0
            if value.name == computation.root_name:
                self._touched[key] = 0.0 if value.opcode == "parameter" else full
            else:
                total = 0.0
                for user, position in computation.users[value.name]:
                    if user.opcode in _ELEMENTWISE:
                        total += self._touch(computation, user)
                    else:
                        total += self._read(computation, user, position, full)
                self._touched[key] = min(full, total)
        return self._touched[key]

    def _written(self, computation: Computation, value: Instruction, result: Instruction) -> float:
        """Bytes that a fusion writes of its result, whose shapes say where they lie."""
        if value.opcode == "tuple":
            parts = [computation.instructions[name] for name in value.operands]
            if len(parts) == len(result.shapes):
                return sum(
                    shape.hbm(self._fresh(computation, part))
                    for part, shape in zip(parts, result.shapes, strict=True)
                    if not shape.space
                )
        if value.opcode == "fusion" and len(value.shapes) > 1:
            called = self.module.called(value)
            return self._written(called, called.root, result)
        return sum(shape.hbm(self._fresh(computation, value)) for shape in result.shapes)

    def _fresh(self, computation: Computation, value: Instruction) -> float:
        """How many elements of a value at the end of a fusion are new, not a buffer that was there before."""
        if value.opcode == "bitcast":
            return self._fresh(computation, computation.instructions[value.operands[0]])
        if value.opcode == "parameter" or self._carries(computation, value):
            return 0
        if value.opcode == "dynamic-update-slice":
            return computation.instructions[value.operands[1]].shapes[0].elements
        if value.opcode == "scatter":
            return computation.instructions[value.operands[-1]].shapes[0].elements
        if value.opcode == "fusion":
            called = self.module.called(value)
            return self._fresh(called, called.root)
        return max((shape.elements for shape in value.shapes), default=0)

    def _stored(self, around: Computation, found: Instruction) -> float:
        if found.opcode == "dynamic-update-slice":
            return found.shapes[0].hbm(around.shapes(found)[1][0].elements)
        if found.opcode == "scatter":
            return sum(shape.hbm(around.shapes(found)[-1][0].elements) for shape in found.shapes)
        if found.opcode == "copy-start":
            return found.shapes[0].hbm()
        if found.opcode == "slice-start" or re.fullmatch(r"(all-gather|collective-permute)-start", found.opcode):
            return found.shapes[1].hbm()
        return sum(shape.hbm() for shape in found.shapes)
