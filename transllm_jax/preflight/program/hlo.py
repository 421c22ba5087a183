"""Counts what a compiled program does in one execution on one device: FLOPs, collectives, traffic to main memory.

The counts come from the text of the compiled module; they follow fusions, calls, loops with their trip counts, and
asynchronous wrappers. A conditional counts as its branch with the most work (FLOPs, then bytes). Only products (dots
and convolutions) have FLOPs, two for each multiplication and addition; elementwise work shows in the bytes.

These forms of the TPU compiler are understood: products as convolutions over padded or dilated windows; collectives
that start in one fusion, continue inside others and end in a third (counted at the start); all-reduce and slice in one
fusion (a reduce-scatter). The FLOPs of a Pallas kernel, a custom call, cannot be seen: the caller gives them
(`Explain`). Calls without an explanation and loops without a known trip count are listed in `Counts.unexplained`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd, prod

from transllm_jax.preflight.program.hlo_text import (
    Computation,
    Groups,
    Instruction,
    Module,
    Shape,
    parse_groups,
    parse_hlo,
    parse_pairs,
)
from transllm_jax.preflight.program.loops import Loops
from transllm_jax.preflight.program.traffic import FREE, INTERNAL, Traffic, collective_kind, target

# Their FLOPs are not counted, so `Counts.unexplained` names them.
_UNCOUNTED = frozenset({"ragged-dot", "scaled-dot", "triangular-solve", "cholesky", "fft"})


@dataclass(frozen=True)
class CustomCall:
    """A call that is opaque to the compiler. `kernel`: name of a Pallas kernel. `executions`: how often it runs."""

    name: str
    target: str
    kernel: str
    op_name: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    attributes: str
    executions: int = 1


# Returns FLOPs and bytes of main memory of one execution, or None if unknown. Bytes None: operands and results once.
Explain = Callable[[CustomCall], tuple[float, float | None] | None]
Rounds = Callable[[str], int | None]


@dataclass(frozen=True)
class Collective:
    """A collective. Bytes are those of one execution on one device.

    `link_bytes`: what a device sends, and receives, in a ring of n devices: (n-1)/n of the result of an all-gather or
    of the operand of a reduce-scatter or all-to-all, twice (n-1)/n of the operand of an all-reduce, all of the operand
    of a permute. `groups`: sets of devices, as positions in the program's device order. `pairs`: a permute's sources
    and targets. `asynchronous`: whether the program computes while it runs.
    """

    name: str
    kind: str
    op_name: str
    executions: int
    operand_bytes: float
    result_bytes: float
    link_bytes: float
    groups: Groups
    pairs: Groups
    asynchronous: bool


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of main memory of one execution of an instruction.

    `kind`: compute (runs in sequence), copy (asynchronous), or collective.
    """

    name: str
    kind: str
    op_name: str
    executions: int
    flops: float
    hbm_bytes: float


@dataclass
class Counts:
    """All that a program does in one execution on one device, by the names of the instructions."""

    work: dict[str, Work] = field(default_factory=dict)
    collectives: dict[str, Collective] = field(default_factory=dict)
    custom_calls: dict[str, CustomCall] = field(default_factory=dict)
    flops_by_dtype: dict[str, float] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)

    @property
    def flops(self) -> float:
        return sum(work.executions * work.flops for work in self.work.values())

    @property
    def hbm_bytes(self) -> float:
        return sum(work.executions * work.hbm_bytes for work in self.work.values())

    @property
    def link_bytes(self) -> float:
        return sum(collective.executions * collective.link_bytes for collective in self.collectives.values())

    def by_kind(self) -> dict[str, tuple[int, float, float]]:
        """Executions, bytes of results and bytes over links for each kind of collective."""
        sums: dict[str, tuple[int, float, float]] = {}
        for collective in self.collectives.values():
            times, results, links = sums.get(collective.kind, (0, 0.0, 0.0))
            sums[collective.kind] = (
                times + collective.executions,
                results + collective.executions * collective.result_bytes,
                links + collective.executions * collective.link_bytes,
            )
        return sums

    def add(self, other: Counts) -> None:
        self.work |= other.work
        self.collectives |= other.collectives
        self.custom_calls |= other.custom_calls
        for dtype, flops in other.flops_by_dtype.items():
            self.flops_by_dtype[dtype] = self.flops_by_dtype.get(dtype, 0.0) + flops
        self.unexplained += [line for line in other.unexplained if line not in self.unexplained]


def count_hlo(text: str, explain: Explain | None = None, rounds: Rounds | None = None) -> Counts:
    """Counts a program from `compiled.as_text()`. Raises ValueError if that is no HLO text.

    rounds: the rounds of a loop that depend on data, from its `op_name`; None for a loop that it does not know.
    """
    module = parse_hlo(text)
    counter = _Counter(module, explain, rounds)
    counter.walk(module.entry, 1, {}, "")
    return counter.counts


class _Counter:
    def __init__(self, module: Module, explain: Explain | None, rounds: Rounds | None = None) -> None:
        self.module = module
        self.explain = explain
        self.rounds = rounds
        self.loops = Loops(module)
        self.traffic = Traffic(module)
        self.counts = Counts()
        self._fused = {name for held in module.computations.values() for name in _fused_by(held)}
        self._bytes: dict[str, float] = {}

    def walk(
        self, computation: Computation, times: int, known: Mapping[int, int], path: str, wrapped: bool = False
    ) -> None:
        """Counts a computation that is not a fusion's and runs `times` times.

        `known`: elements of its argument tuple that are constant. `wrapped`: it is inside an asynchronous wrapper.
        """
        for instruction in computation:
            if instruction.opcode in FREE:
                continue
            if instruction.opcode == "while":
                self._while(computation, instruction, times, known, path)
            elif instruction.opcode == "conditional":
                self._conditional(instruction, times, path)
            elif instruction.opcode == "call" or instruction.opcode == "async-start":
                self.walk(
                    self.module.called(instruction),
                    times,
                    {},
                    f"{path}{instruction.name}/",
                    instruction.opcode != "call",
                )
            else:
                self._add_work(computation, instruction, times, path + instruction.name, wrapped)

    def _while(
        self, computation: Computation, loop: Instruction, times: int, known: Mapping[int, int], path: str
    ) -> None:
        trips = self.loops.trip_count(computation, loop, known)
        if trips is None and self.rounds is not None:
            trips = self.rounds(loop.op_name)
        if trips is None:
            self.counts.unexplained.append(f"while {loop.name} ({loop.op_name}): rounds unknown, counted once")
            trips = 1
        constants = self.loops.constants(computation, loop, known)
        body = self.module.computations[(loop.value("body") or "").lstrip("%")]
        self.walk(body, times * trips, constants, f"{path}{loop.name}/")

    def _conditional(self, instruction: Instruction, times: int, path: str) -> None:
        before, branches = self.counts, []
        for name in instruction.called():
            self.counts = Counts()
            self.walk(self.module.computations[name], times, {}, f"{path}{instruction.name}/")
            branches.append(self.counts)
        self.counts = before
        self.counts.add(max(branches, key=lambda branch: (branch.flops, branch.hbm_bytes, branch.link_bytes)))

    def _add_work(
        self, computation: Computation, instruction: Instruction, times: int, name: str, wrapped: bool
    ) -> None:
        flops = self._flops(computation, instruction, times, name, wrapped)
        moved = self._bytes.get(name, self.traffic.bytes(computation, instruction))
        if flops or moved:
            kind = "collective" if self._is_collective(instruction) else "compute"
            if wrapped or instruction.opcode.endswith("-start"):
                kind = "collective" if kind == "collective" else "copy"
            self.counts.work[name] = Work(name, kind, instruction.op_name, times, flops, moved)

    def _is_collective(self, instruction: Instruction) -> bool:
        if instruction.opcode != "fusion":
            return collective_kind(instruction) is not None
        called = self.module.called(instruction)
        return self.traffic.starts_collective(called) or any(self._is_reduce_scatter(called, inner) for inner in called)

    def _flops(self, computation: Computation, instruction: Instruction, times: int, name: str, wrapped: bool) -> float:
        """FLOPs of one execution; also records collectives and custom calls."""
        if instruction.opcode == "fusion":
            called = self.module.called(instruction)
            return sum(self._flops(called, inner, times, f"{name}/{inner.name}", wrapped) for inner in called)
        if instruction.opcode in ("dot", "convolution"):
            left, right = (shapes[0] for shapes in computation.shapes(instruction))
            flops = (
                _dot_flops(instruction, left)
                if instruction.opcode == "dot"
                else _convolution_flops(instruction, left, right)
            )
            dtype = max(left, right, key=lambda shape: shape.item_bytes).dtype
            self.counts.flops_by_dtype[dtype] = self.counts.flops_by_dtype.get(dtype, 0.0) + times * flops
            return flops
        if collective_kind(instruction) is not None:
            self._collective(computation, instruction, times, name, wrapped)
        elif instruction.opcode == "custom-call" and target(instruction) not in INTERNAL:
            return self._custom_call(computation, instruction, times, name)
        elif instruction.opcode in _UNCOUNTED:
            self.counts.unexplained.append(f"{instruction.opcode} {name} ({instruction.op_name}): FLOPs not counted")
        return 0.0

    def _custom_call(self, computation: Computation, instruction: Instruction, times: int, name: str) -> float:
        operands = tuple(shape for shapes in computation.shapes(instruction) for shape in shapes)
        kernel = re.search(r"([^/]+)/pallas_call", instruction.op_name)
        title = kernel[1] if kernel else re.sub(r"\.\d+$", "", instruction.name)
        call = CustomCall(
            name,
            target(instruction),
            title,
            instruction.op_name,
            operands,
            instruction.shapes,
            instruction.attributes,
            times,
        )
        self.counts.custom_calls[name] = call
        answer = self.explain(call) if self.explain else None
        if answer is None:
            self.counts.unexplained.append(
                f"custom call {call.target} {title} ({instruction.op_name}): FLOPs not known"
            )
            return 0.0
        if answer[1] is not None:
            self._bytes[name] = answer[1]
        return answer[0]

    def _collective(
        self, computation: Computation, instruction: Instruction, times: int, name: str, wrapped: bool
    ) -> None:
        kind = collective_kind(instruction)
        assert kind is not None
        if self.traffic.continues_collective(computation, instruction):
            return
        if self._is_reduce_scatter(computation, instruction):
            kind = "reduce-scatter"
        groups = parse_groups(instruction.attributes, self.module.devices)
        pairs = parse_pairs(instruction.attributes)
        size = max(map(len, groups))
        operand = sum(shape.bytes for shapes in computation.shapes(instruction) for shape in shapes)
        results = {"all-gather": operand * size, "reduce-scatter": operand / size}
        result = results.get(kind, operand)
        share = (size - 1) / size
        links = {"all-gather": result * share, "all-reduce": 2 * operand * share}
        if kind in ("collective-permute", "collective-broadcast"):
            link = operand if size > 1 else 0.0
        else:
            link = links.get(kind, operand * share)
        asynchronous = wrapped or instruction.opcode.endswith("-start") or self.traffic.starts_collective(computation)
        self.counts.collectives[name] = Collective(
            name, kind, instruction.op_name, times, operand, result, link, groups, pairs, asynchronous
        )

    def _is_reduce_scatter(self, computation: Computation, instruction: Instruction) -> bool:
        """Whether this is an all-reduce in a fusion that keeps only slices of it: the TPU compiler's reduce-scatter."""
        if (
            instruction.opcode != "all-reduce"
            or computation.name not in self._fused
            or instruction.name == computation.root_name
        ):
            return False
        users = [user for user, _ in computation.users[instruction.name]]
        while any(user.opcode in ("bitcast", "reshape", "convert", "copy") for user in users):
            users = [after for user in users for after in _slice_or_users(computation, user)]
        return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _slice_or_users(computation: Computation, instruction: Instruction) -> list[Instruction]:
    if instruction.opcode == "dynamic-slice":
        return [instruction]
    return [user for user, _ in computation.users[instruction.name]]


def _fused_by(computation: Computation) -> list[str]:
    return [name for instruction in computation if instruction.opcode == "fusion" for name in instruction.called()]


def _dot_flops(instruction: Instruction, left: Shape) -> float:
    contracted = prod(left.dims[dim] for dim in instruction.numbers("lhs_contracting_dims"))
    return 2.0 * instruction.shapes[0].elements * contracted


def _convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> float:
    """Two FLOPs for each product of an input element and a weight, none for padding and gaps from dilation."""
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.value("dim_labels") or "")
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {instruction.name}")
    of_left, of_right, of_result = labels.groups()
    window = _window(instruction)
    products = 1
    for number in range(len(of_left) - 2):
        digit = str(number)
        sizes = (
            left.dims[of_left.index(digit)],
            right.dims[of_right.index(digit)],
            instruction.shapes[0].dims[of_result.index(digit)],
        )
        options = [int(part[number].split("_")[0]) if part else default for part, default in window]
        products *= _valid_products(*sizes, *options)
    batch = left.dims[of_left.index("b")] // int(instruction.value("batch_group_count") or 1)
    features = right.dims[of_right.index("i")]
    return 2.0 * features * instruction.shapes[0].dims[of_result.index("f")] * batch * products


def _window(instruction: Instruction) -> list[tuple[list[str], int]]:
    """Sizes and default of each of: stride, low padding, dilation of the input, dilation of the weights."""
    text = instruction.value("window") or ""
    parts = dict(part.split("=") for part in text.strip("{}").split())
    defaults = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    return [(parts[key].split("x") if key in parts else [], default) for key, default in defaults.items()]


@lru_cache(maxsize=4096)
def _valid_products(size: int, kernel: int, out: int, stride: int, pad: int, dilate: int, spread: int) -> int:
    """Number of pairs of an output o and a weight k whose input (o stride + k spread - pad) / dilate exists."""
    common = gcd(stride, dilate)
    step = dilate // common
    inverse = pow(stride // common, -1, step) if step > 1 else 0
    total = 0
    for weight in range(kernel):
        shift = pad - weight * spread
        if shift % common:
            continue
        low = max(0, -(-shift // stride))
        high = min(out - 1, (shift + (size - 1) * dilate) // stride)
        first = low + (shift // common * inverse - low) % step
        total += max(0, (high - first) // step + 1)
    return total
