"""How often the loops of a compiled program run.

XLA's CPU compiler writes `known_trip_count` beside a loop; its TPU compiler drops it, so the count is worked out: where
the loop's variable starts, by how much the body moves it, and what the condition compares it with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transllm_jax.preflight.program.hlo_text import Computation, Instruction, Module

_KNOWN = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
# Operations that leave a number as it is.
_SAME = frozenset({"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"})
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclass(frozen=True)
class _Linear:
    """A number: an element of the tuple that the computation is given (or none) plus an offset."""

    element: int | None
    offset: int


# What a parameter of a fusion is in the computation around it.
_Arguments = Callable[[int], _Linear | None] | None


class Loops:
    """Trip counts of the whiles of a module."""

    def __init__(self, module: Module) -> None:
        self.module = module

    def trips(self, around: Computation, loop: Instruction, known: Mapping[int, int]) -> int | None:
        """How often the body of `loop` runs, a while in `around`; None where it cannot be told.

        `known` holds the elements of the tuple that `around` is given (itself a body) which are constant.
        """
        if match := _KNOWN.search(loop.attributes):
            return int(match[1])
        condition, body = self._parts(loop)
        root, given = condition.root, None
        while root.opcode == "fusion":
            given, condition, root = self._inside(condition, root, given)
        if root.opcode != "compare":
            return None
        sides = [self._linear(condition, condition.instructions[name], given) for name in root.operands]
        left, right = sides
        direction = root.value("direction") or ""
        if left is None or right is None or direction not in _FLIPPED:
            return None
        constants = self.constants(around, loop, known)
        left, right = (self._fill(side, constants) for side in (left, right))
        if left.element is None:
            left, right, direction = right, left, _FLIPPED[direction]
        if left.element is None or right.element is not None:
            return None
        start = self._start(around, loop, left.element, known)
        moved = self._moved(body, left.element, constants)
        if start is None or moved is None or moved.element != left.element or not moved.offset:
            return None
        return _steps(start + left.offset, right.offset, moved.offset, direction)

    def constants(self, around: Computation, loop: Instruction, known: Mapping[int, int]) -> dict[int, int]:
        """The elements of the loop's tuple that hold one known number in every round."""
        _, body = self._parts(loop)
        if body.root.opcode != "tuple":
            return {}
        found = {}
        for element in range(len(body.root.operands)):
            if self._moved(body, element) == _Linear(element, 0):
                start = self._start(around, loop, element, known)
                if start is not None:
                    found[element] = start
        return found

    def _parts(self, loop: Instruction) -> tuple[Computation, Computation]:
        names = (loop.value("condition") or "", loop.value("body") or "")
        condition, body = (self.module.computations[name.lstrip("%")] for name in names)
        return condition, body

    def _start(self, around: Computation, loop: Instruction, element: int, known: Mapping[int, int]) -> int | None:
        initial = around.instructions[loop.operands[0]]
        if initial.opcode != "tuple":
            return None
        value = self._linear(around, around.instructions[initial.operands[element]], None)
        if value is None:
            return None
        value = self._fill(value, known)
        return value.offset if value.element is None else None

    def _moved(self, body: Computation, element: int, constants: Mapping[int, int] | None = None) -> _Linear | None:
        """What an element is after one round of the body, with the elements that are constant."""
        if body.root.opcode != "tuple" or element >= len(body.root.operands):
            return None
        return self._linear(body, body.instructions[body.root.operands[element]], None, constants)

    @staticmethod
    def _fill(value: _Linear, known: Mapping[int, int]) -> _Linear:
        if value.element is None or value.element not in known:
            return value
        return _Linear(None, value.offset + known[value.element])

    def _inside(
        self, around: Computation, fusion: Instruction, given: _Arguments, constants: Mapping[int, int] | None = None
    ) -> tuple[_Arguments, Computation, Instruction]:
        called = self.module.called(fusion)
        names = fusion.operands

        def argument(number: int) -> _Linear | None:
            return self._linear(around, around.instructions[names[number]], given, constants)

        return argument, called, called.root

    def _linear(
        self,
        around: Computation,
        found: Instruction,
        given: _Arguments,
        constants: Mapping[int, int] | None = None,
    ) -> _Linear | None:
        if found.shapes and found.shapes[0].dims not in ((), (1,)):
            return None
        if found.opcode == "constant":
            return _Linear(None, int(found.inside)) if re.fullmatch(r"-?\d+", found.inside) else None
        operands = [around.instructions[name] for name in found.operands]
        if found.opcode in _SAME:
            return self._linear(around, operands[0], given, constants)
        if found.opcode == "parameter":
            return given(int(found.inside)) if given else None
        if found.opcode == "get-tuple-element" and operands[0].opcode == "parameter" and given is None:
            element = _Linear(int(found.value("index") or 0), 0)
            return self._fill(element, constants or {})
        if found.opcode == "fusion":
            inner, called, root = self._inside(around, found, given, constants)
            return self._linear(called, root, inner)
        if found.opcode in ("add", "subtract"):
            return self._sum(found.opcode, [self._linear(around, operand, given, constants) for operand in operands])
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


def _steps(start: int, limit: int, step: int, direction: str) -> int | None:
    """Rounds of `for (i = start; i DIRECTION limit; i += step)`; None where it does not end."""
    if direction in ("LE", "GE"):
        limit += 1 if direction == "LE" else -1
    if direction == "NE":
        whole, rest = divmod(limit - start, step)
        return whole if not rest and whole >= 0 else None
    if (step > 0) != (direction in ("LT", "LE")):
        return None
    return max(0, -((start - limit) // step))
