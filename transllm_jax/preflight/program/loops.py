"""Trip counts of the loops in a compiled program.

XLA's CPU compiler writes a loop's `known_trip_count`. Its TPU compiler does not, so the count is derived from the loop
variable's initial value, its change in the body, and the value that the condition compares it with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transllm_jax.preflight.program.hlo_text import Computation, Instruction, Module

_KNOWN = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
# Operations that do not change a number.
_SAME = frozenset({"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"})
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclass(frozen=True)
class _Linear:
    """A number: an element of the computation's argument tuple (None: no element, a constant) plus an offset."""

    element: int | None
    offset: int


# Gives the value of a fusion's parameter in terms of the computation that contains the fusion.
_Arguments = Callable[[int], _Linear | None] | None


class Loops:
    """Trip counts of the whiles of a module."""

    def __init__(self, module: Module) -> None:
        self.module = module

    def trip_count(self, computation: Computation, loop: Instruction, known: Mapping[int, int]) -> int | None:
        """How often the body of `loop`, a while in `computation`, runs; None if that cannot be derived.

        `known`: constant elements of the argument tuple of `computation`, which may itself be a loop's body.
        """
        if match := _KNOWN.search(loop.attributes):
            return int(match[1])
        condition, body = self._condition_and_body(loop)
        root, given = condition.root, None
        while root.opcode == "fusion":
            given, condition, root = self._enter_fusion(condition, root, given)
        if root.opcode != "compare":
            return None
        sides = [self._linear(condition, condition.instructions[name], given) for name in root.operands]
        left, right = sides
        direction = root.value("direction") or ""
        if left is None or right is None or direction not in _FLIPPED:
            return None
        constants = self.constants(computation, loop, known)
        left, right = (self._substitute(side, constants) for side in (left, right))
        if left.element is None:
            left, right, direction = right, left, _FLIPPED[direction]
        if left.element is None or right.element is not None:
            return None
        start = self._initial(computation, loop, left.element, known)
        moved = self._after_round(body, left.element, constants)
        if start is None or moved is None or moved.element != left.element or not moved.offset:
            return None
        return _rounds(start + left.offset, right.offset, moved.offset, direction)

    def constants(self, computation: Computation, loop: Instruction, known: Mapping[int, int]) -> dict[int, int]:
        """The elements of the loop's tuple that have the same known number in every round."""
        _, body = self._condition_and_body(loop)
        if body.root.opcode != "tuple":
            return {}
        values = {}
        for element in range(len(body.root.operands)):
            if self._after_round(body, element) == _Linear(element, 0):
                start = self._initial(computation, loop, element, known)
                if start is not None:
                    values[element] = start
        return values

    def _condition_and_body(self, loop: Instruction) -> tuple[Computation, Computation]:
        names = (loop.value("condition") or "", loop.value("body") or "")
        condition, body = (self.module.computations[name.lstrip("%")] for name in names)
        return condition, body

    def _initial(
        self, computation: Computation, loop: Instruction, element: int, known: Mapping[int, int]
    ) -> int | None:
        initial = computation.instructions[loop.operands[0]]
        if initial.opcode != "tuple":
            return None
        value = self._linear(computation, computation.instructions[initial.operands[element]], None)
        if value is None:
            return None
        value = self._substitute(value, known)
        return value.offset if value.element is None else None

    def _after_round(
        self, body: Computation, element: int, constants: Mapping[int, int] | None = None
    ) -> _Linear | None:
        """The value of an element after one round of the body, given the constant elements."""
        if body.root.opcode != "tuple" or element >= len(body.root.operands):
            return None
        return self._linear(body, body.instructions[body.root.operands[element]], None, constants)

    @staticmethod
    def _substitute(value: _Linear, known: Mapping[int, int]) -> _Linear:
        if value.element is None or value.element not in known:
            return value
        return _Linear(None, value.offset + known[value.element])

    def _enter_fusion(
        self,
        computation: Computation,
        fusion: Instruction,
        given: _Arguments,
        constants: Mapping[int, int] | None = None,
    ) -> tuple[_Arguments, Computation, Instruction]:
        called = self.module.called(fusion)
        names = fusion.operands

        def argument(number: int) -> _Linear | None:
            return self._linear(computation, computation.instructions[names[number]], given, constants)

        return argument, called, called.root

    def _linear(
        self,
        computation: Computation,
        instruction: Instruction,
        given: _Arguments,
        constants: Mapping[int, int] | None = None,
    ) -> _Linear | None:
        if instruction.shapes and instruction.shapes[0].dims not in ((), (1,)):
            return None
        if instruction.opcode == "constant":
            return _Linear(None, int(instruction.inside)) if re.fullmatch(r"-?\d+", instruction.inside) else None
        operands = [computation.instructions[name] for name in instruction.operands]
        if instruction.opcode in _SAME:
            return self._linear(computation, operands[0], given, constants)
        if instruction.opcode == "parameter":
            return given(int(instruction.inside)) if given else None
        if instruction.opcode == "get-tuple-element" and operands[0].opcode == "parameter" and given is None:
            element = _Linear(int(instruction.value("index") or 0), 0)
            return self._substitute(element, constants or {})
        if instruction.opcode == "fusion":
            inner, called, root = self._enter_fusion(computation, instruction, given, constants)
            return self._linear(called, root, inner)
        if instruction.opcode in ("add", "subtract"):
            return self._sum(
                instruction.opcode, [self._linear(computation, operand, given, constants) for operand in operands]
            )
        return None

    @staticmethod
    def _sum(opcode: str, values: Sequence[_Linear | None]) -> _Linear | None:
        left, right = values
        if left is None or right is None:
            return None
        if opcode == "subtract":
            return _Linear(left.element, left.offset - right.offset) if right.element is None else None
        if left.element is not None and right.element is not None:
            return None
        element = left.element if right.element is None else right.element
        return _Linear(element, left.offset + right.offset)


def _rounds(start: int, limit: int, step: int, direction: str) -> int | None:
    """Rounds of `for (i = start; i DIRECTION limit; i += step)`; None if it does not end."""
    if direction in ("LE", "GE"):
        limit += 1 if direction == "LE" else -1
    if direction == "NE":
        whole, rest = divmod(limit - start, step)
        return whole if not rest and whole >= 0 else None
    if (step > 0) != (direction in ("LT", "LE")):
        return None
    return max(0, -((start - limit) // step))
