"""How many bytes of main memory (HBM) an instruction of a compiled program moves.

Operands and results count once each if they are in main memory (the layouts of TPU programs name the space). If only a
slice of an operand is read, the slice counts; for an update in place the update counts; both also inside a fusion. A
buffer that an asynchronous collective carries through a fusion does not count. Not included: a product may read an
operand several times, tile by tile.
"""

from __future__ import annotations

import re

from transllm_jax.preflight.program.hlo_text import Computation, Instruction, Module

# The compiler's own custom calls, which compute and move nothing.
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
# Instructions that do not touch memory.
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
# Inside a fusion, these read only those elements of their operand that are read of their result.
_ELEMENTWISE = frozenset({"bitcast", "reshape", "convert", "copy", "transpose", "negate"})
_SLICES = frozenset({"dynamic-slice", "slice", "slice-start", "gather"})


def collective_kind(instruction: Instruction) -> str | None:
    """The kind of a collective or of its start; None for its end and for other instructions."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def target(instruction: Instruction) -> str:
    """The function that a custom call calls; "" for other instructions."""
    return (instruction.value("custom_call_target") or "") if instruction.opcode == "custom-call" else ""


class Traffic:
    """Bytes of main memory that the instructions of a module move."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._used: dict[tuple[str, str], float] = {}
        # Keys of collectives that are split into a start, pieces inside other fusions, and an end.
        self._started = {
            key
            for computation in module.computations.values()
            if self.starts_collective(computation)
            for instruction in computation
            if (key := self._key(instruction))
        }

    @staticmethod
    def starts_collective(computation: Computation) -> bool:
        """Whether a fused computation is the start of an asynchronous collective."""
        return any(target(instruction) == "AsyncCollectiveStart" for instruction in computation)

    @staticmethod
    def ends_collective(computation: Computation) -> bool:
        return any(target(instruction) == "AsyncCollectiveDone" for instruction in computation)

    @staticmethod
    def _key(instruction: Instruction) -> tuple[str, str] | None:
        kind = collective_kind(instruction)
        return (kind, instruction.value("channel_id") or instruction.name) if kind else None

    def continues_collective(self, computation: Computation, instruction: Instruction) -> bool:
        """Whether a collective inside a fusion is a piece or the end of one that another fusion started."""
        return self._key(instruction) in self._started and not self.starts_collective(computation)

    def bytes(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that one execution of an instruction outside fusions moves to and from main memory."""
        if (
            instruction.opcode in FREE
            or target(instruction) in INTERNAL
            or instruction.opcode.endswith(("-done", "-update"))
        ):
            return 0.0
        if instruction.opcode == "fusion":
            called = self.module.called(instruction)
            if self.ends_collective(called):
                return 0.0
            if self.starts_collective(called):
                # The result is a tuple of the operand, the buffer to fill, and flags.
                read = computation.instructions[instruction.operands[0]].shapes[0]
                return read.hbm() + instruction.shapes[1].hbm()
            return self._bytes_read(computation, instruction) + self._fusion_bytes_written(
                called, called.root, instruction
            )
        return self._bytes_read(computation, instruction) + self._bytes_written(computation, instruction)

    def _bytes_read(self, computation: Computation, instruction: Instruction) -> float:
        total = 0.0
        for position, shapes in enumerate(computation.shapes(instruction)):
            for shape in shapes:
                if not shape.space:
                    total += shape.hbm(self._elements_read(computation, instruction, position, shape.elements))
        return total

    def _elements_read(
        self, computation: Computation, instruction: Instruction, position: int, elements: float
    ) -> float:
        """How many elements of the operand at `position`, which has `elements`, an instruction reads."""
        if instruction.opcode in _SLICES and position == 0:
            return (instruction.shapes[1] if instruction.opcode == "slice-start" else instruction.shapes[0]).elements
        if instruction.opcode == "dynamic-update-slice" and position == 0:
            return 0
        if instruction.opcode == "scatter" and position < len(instruction.shapes):
            return computation.shapes(instruction)[-1][0].elements
        if instruction.opcode == "fusion":
            called = self.module.called(instruction)
            return self._elements_used(called, called.parameters[position])
        if (
            instruction.opcode == "tuple"
            or target(instruction) in INTERNAL
            or self._is_continued_collective(computation, instruction)
        ):
            return 0
        return elements

    def _is_continued_collective(self, computation: Computation, instruction: Instruction) -> bool:
        return collective_kind(instruction) is not None and self.continues_collective(computation, instruction)

    def _elements_used(self, computation: Computation, value: Instruction) -> float:
        """How many elements of a value inside a fusion are read."""
        key = (computation.name, value.name)
        if key not in self._used:
            full = float(value.shapes[0].elements) if value.shapes else 0.0
            if value.name == computation.root_name:
                self._used[key] = 0.0 if value.opcode == "parameter" else full
            else:
                total = 0.0
                for user, position in computation.users[value.name]:
                    if user.opcode in _ELEMENTWISE:
                        total += self._elements_used(computation, user)
                    else:
                        total += self._elements_read(computation, user, position, full)
                self._used[key] = min(full, total)
        return self._used[key]

    def _fusion_bytes_written(self, computation: Computation, value: Instruction, result: Instruction) -> float:
        """Bytes of main memory that a fusion writes of `result`, of which `value` is the root."""
        if value.opcode == "tuple":
            parts = [computation.instructions[name] for name in value.operands]
            if len(parts) == len(result.shapes):
                return sum(
                    shape.hbm(self._elements_written(computation, part))
                    for part, shape in zip(parts, result.shapes, strict=True)
                    if not shape.space
                )
        if value.opcode == "fusion" and len(value.shapes) > 1:
            called = self.module.called(value)
            return self._fusion_bytes_written(called, called.root, result)
        return sum(shape.hbm(self._elements_written(computation, value)) for shape in result.shapes)

    def _elements_written(self, computation: Computation, value: Instruction) -> float:
        """How many elements of a value that a fusion returns it writes, and does not pass on in an existing buffer."""
        if value.opcode == "bitcast":
            return self._elements_written(computation, computation.instructions[value.operands[0]])
        if value.opcode == "parameter" or self._is_continued_collective(computation, value):
            return 0
        if value.opcode == "dynamic-update-slice":
            return computation.instructions[value.operands[1]].shapes[0].elements
        if value.opcode == "scatter":
            return computation.instructions[value.operands[-1]].shapes[0].elements
        if value.opcode == "fusion":
            called = self.module.called(value)
            return self._elements_written(called, called.root)
        return max((shape.elements for shape in value.shapes), default=0)

    def _bytes_written(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.opcode == "dynamic-update-slice":
            return instruction.shapes[0].hbm(computation.shapes(instruction)[1][0].elements)
        if instruction.opcode == "scatter":
            return sum(shape.hbm(computation.shapes(instruction)[-1][0].elements) for shape in instruction.shapes)
        if instruction.opcode == "copy-start":
            return instruction.shapes[0].hbm()
        if instruction.opcode == "slice-start" or re.fullmatch(
            r"(all-gather|collective-permute)-start", instruction.opcode
        ):
            return instruction.shapes[1].hbm()
        return sum(shape.hbm() for shape in instruction.shapes)
