"""What a compiled program does in one run on one device: FLOPs, collectives, traffic to main memory.

Counted from the text of the compiled module, with the rounds of its loops, through fusions, calls, whiles and
asynchronous wrappers. Of a conditional the branch with the most work counts (FLOPs, then bytes). FLOPs are those of
products (dots and convolutions): two a multiplication and addition; elementwise work is in the bytes.

Forms of the TPU compiler that are understood: products that became convolutions over padded or dilated windows;
collectives that start in one fusion, go on inside others and end in a third (counted at the start); all-reduce and
slice in one fusion (a reduce-scatter). A Pallas kernel is a custom call whose FLOPs cannot be seen: the caller explains
it (`Explain`), and what nobody explains is listed in `Counts.unexplained`, as are loops whose rounds are not known.
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

# Not counted, so named where they occur.
_UNCOUNTED = frozenset({"ragged-dot", "scaled-dot", "triangular-solve", "cholesky", "fft"})


@dataclass(frozen=True)
class CustomCall:
    """A call that the compiler cannot see into. `kernel` is a Pallas kernel's name, `executions` how often it runs."""

    name: str
    target: str
    kernel: str
    op_name: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    attributes: str
    executions: int = 1


# Gives (FLOPs, bytes of main memory) of one execution; bytes None means operands and results once; None: not known.
Explain = Callable[[CustomCall], tuple[float, float | None] | None]


@dataclass(frozen=True)
class Collective:
    """A collective. Bytes are of one execution on one device.

    `link_bytes` is what a device has to send, and to receive, in a ring: of n devices (n-1)/n of an all-gather's
    result, of a reduce-scatter's and an all-to-all's operand, twice that for an all-reduce, all of a permute's operand.
    `groups` are the sets of devices, by their places in the program's device order; `pairs` a permute's routes.
    `asynchronous`: the program computes on while it runs.
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

    `kind` is compute (one after the other), copy (asynchronous), or collective.
    """

    name: str
    kind: str
    op_name: str
    executions: int
    flops: float
    hbm_bytes: float


@dataclass
class Counts:
    """All that a program does in one run on one device, by the name of the instruction."""

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
        return sum(found.executions * found.link_bytes for found in self.collectives.values())

    def by_kind(self) -> dict[str, tuple[int, float, float]]:
        """Of each kind of collective: executions, bytes of results, bytes over links."""
        sums: dict[str, tuple[int, float, float]] = {}
        for found in self.collectives.values():
            times, results, links = sums.get(found.kind, (0, 0.0, 0.0))
            sums[found.kind] = (
                times + found.executions,
                results + found.executions * found.result_bytes,
                links + found.executions * found.link_bytes,
            )
        return sums

    def add(self, other: Counts) -> None:
        self.work |= other.work
        self.collectives |= other.collectives
        self.custom_calls |= other.custom_calls
        for dtype, flops in other.flops_by_dtype.items():
            self.flops_by_dtype[dtype] = self.flops_by_dtype.get(dtype, 0.0) + flops
        self.unexplained += [line for line in other.unexplained if line not in self.unexplained]


def count_hlo(text: str, explain: Explain | None = None) -> Counts:
    """Counts a program from `compiled.as_text()`. ValueError for what is no HLO text."""
    module = parse_hlo(text)
    counter = _Counter(module, explain)
    counter.walk(module.entry, 1, {}, "")
    return counter.counts


class _Counter:
    def __init__(self, module: Module, explain: Explain | None) -> None:
        self.module = module
        self.explain = explain
        self.loops = Loops(module)
        self.traffic = Traffic(module)
        self.counts = Counts()
        self._fused = {name for held in module.computations.values() for name in _fused_by(held)}
        self._bytes: dict[str, float] = {}

    def walk(
        self, computation: Computation, times: int, known: Mapping[int, int], path: str, wrapped: bool = False
    ) -> None:
        """Counts a computation outside fusions that runs `times` times. `wrapped`: inside an asynchronous wrapper."""
        for found in computation:
            if found.opcode in FREE:
                continue
            if found.opcode == "while":
                self._while(computation, found, times, known, path)
            elif found.opcode == "conditional":
                self._conditional(found, times, path)
            elif found.opcode == "call" or found.opcode == "async-start":
                self.walk(self.module.called(found), times, {}, f"{path}{found.name}/", found.opcode != "call")
            else:
                self._instruction(computation, found, times, path + found.name, wrapped)

    def _while(self, around: Computation, loop: Instruction, times: int, known: Mapping[int, int], path: str) -> None:
        trips = self.loops.trips(around, loop, known)
        if trips is None:
            self.counts.unexplained.append(f"while {loop.name} ({loop.op_name}): rounds unknown, counted once")
            trips = 1
        constants = self.loops.constants(around, loop, known)
        body = self.module.computations[(loop.value("body") or "").lstrip("%")]
        self.walk(body, times * trips, constants, f"{path}{loop.name}/")

    def _conditional(self, found: Instruction, times: int, path: str) -> None:
        before, branches = self.counts, []
        for name in found.called():
            self.counts = Counts()
            self.walk(self.module.computations[name], times, {}, f"{path}{found.name}/")
            branches.append(self.counts)
        self.counts = before
        self.counts.add(max(branches, key=lambda branch: (branch.flops, branch.hbm_bytes, branch.link_bytes)))

    def _instruction(self, around: Computation, found: Instruction, times: int, name: str, wrapped: bool) -> None:
        flops = self._flops(around, found, times, name, wrapped)
        moved = self._bytes.get(name, self.traffic.bytes(around, found))
        if flops or moved:
            kind = "collective" if self._is_collective(found) else "compute"
            if wrapped or found.opcode.endswith("-start"):
                kind = "collective" if kind == "collective" else "copy"
            self.counts.work[name] = Work(name, kind, found.op_name, times, flops, moved)

    def _is_collective(self, found: Instruction) -> bool:
        if found.opcode != "fusion":
            return collective_kind(found) is not None
        called = self.module.called(found)
        return self.traffic.starts(called) or any(self._scattered(called, inner) for inner in called)

    def _flops(self, around: Computation, found: Instruction, times: int, name: str, wrapped: bool) -> float:
        """FLOPs of one execution; notes collectives and custom calls on the way."""
        if found.opcode == "fusion":
            called = self.module.called(found)
            return sum(self._flops(called, inner, times, f"{name}/{inner.name}", wrapped) for inner in called)
        if found.opcode in ("dot", "convolution"):
            left, right = (shapes[0] for shapes in around.shapes(found))
            flops = _dot_flops(found, left) if found.opcode == "dot" else _convolution_flops(found, left, right)
            dtype = max(left, right, key=lambda shape: shape.item).dtype
            self.counts.flops_by_dtype[dtype] = self.counts.flops_by_dtype.get(dtype, 0.0) + times * flops
            return flops
        if collective_kind(found) is not None:
            self._collective(around, found, times, name, wrapped)
        elif found.opcode == "custom-call" and target(found) not in INTERNAL:
            return self._custom(around, found, times, name)
        elif found.opcode in _UNCOUNTED:
            self.counts.unexplained.append(f"{found.opcode} {name} ({found.op_name}): FLOPs not counted")
        return 0.0

    def _custom(self, around: Computation, found: Instruction, times: int, name: str) -> float:
        operands = tuple(shape for shapes in around.shapes(found) for shape in shapes)
        kernel = re.search(r"([^/]+)/pallas_call", found.op_name)
        title = kernel[1] if kernel else re.sub(r"\.\d+$", "", found.name)
        call = CustomCall(name, target(found), title, found.op_name, operands, found.shapes, found.attributes, times)
        self.counts.custom_calls[name] = call
        answer = self.explain(call) if self.explain else None
        if answer is None:
            self.counts.unexplained.append(f"custom call {call.target} {title} ({found.op_name}): FLOPs not known")
            return 0.0
        if answer[1] is not None:
            self._bytes[name] = answer[1]
        return answer[0]

    def _collective(self, around: Computation, found: Instruction, times: int, name: str, wrapped: bool) -> None:
        kind = collective_kind(found)
        assert kind is not None
        if self.traffic.carried(around, found):
            return
        if self._scattered(around, found):
            kind = "reduce-scatter"
        groups = parse_groups(found.attributes, self.module.devices)
        pairs = parse_pairs(found.attributes)
        size = max(map(len, groups))
        operand = sum(shape.bytes for shapes in around.shapes(found) for shape in shapes)
        results = {"all-gather": operand * size, "reduce-scatter": operand / size}
        result = results.get(kind, operand)
        share = (size - 1) / size
        links = {"all-gather": result * share, "all-reduce": 2 * operand * share}
        if kind in ("collective-permute", "collective-broadcast"):
            link = operand if size > 1 else 0.0
        else:
            link = links.get(kind, operand * share)
        asynchronous = wrapped or found.opcode.endswith("-start") or self.traffic.starts(around)
        self.counts.collectives[name] = Collective(
            name, kind, found.op_name, times, operand, result, link, groups, pairs, asynchronous
        )

    def _scattered(self, around: Computation, found: Instruction) -> bool:
        """Whether an all-reduce stands in a fusion that keeps slices of it: a reduce-scatter in a TPU program."""
        if found.opcode != "all-reduce" or around.name not in self._fused or found.name == around.root_name:
            return False
        users = [user for user, _ in around.users[found.name]]
        while any(user.opcode in ("bitcast", "reshape", "convert", "copy") for user in users):
            users = [
                after
                for user in users
                for after in (
                    [user] if user.opcode == "dynamic-slice" else [next_ for next_, _ in around.users[user.name]]
                )
            ]
        return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _fused_by(computation: Computation) -> list[str]:
    return [name for found in computation if found.opcode == "fusion" for name in found.called()]


def _dot_flops(found: Instruction, left: Shape) -> float:
    contracted = prod(left.dims[dim] for dim in found.numbers("lhs_contracting_dims"))
    return 2.0 * found.shapes[0].elements * contracted


def _convolution_flops(found: Instruction, left: Shape, right: Shape) -> float:
    """Two FLOPs for every product of an input element with a weight; what falls on padding or between is none."""
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", found.value("dim_labels") or "")
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {found.name}")
    of_left, of_right, of_result = labels.groups()
    window = _window(found)
    products = 1
    for number in range(len(of_left) - 2):
        digit = str(number)
        sizes = (
            left.dims[of_left.index(digit)],
            right.dims[of_right.index(digit)],
            found.shapes[0].dims[of_result.index(digit)],
        )
        options = [int(part[number].split("_")[0]) if part else default for part, default in window]
        products *= _valid_products(*sizes, *options)
    batch = left.dims[of_left.index("b")] // int(found.value("batch_group_count") or 1)
    features = right.dims[of_right.index("i")]
    return 2.0 * features * found.shapes[0].dims[of_result.index("f")] * batch * products


def _window(found: Instruction) -> list[tuple[list[str], int]]:
    """Stride, low padding, dilation of the input and of the weights, with what each is where it is not written."""
    text = found.value("window") or ""
    parts = dict(part.split("=") for part in text.strip("{}").split())
    defaults = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    return [(parts[key].split("x") if key in parts else [], default) for key, default in defaults.items()]


@lru_cache(maxsize=4096)
def _valid_products(size: int, kernel: int, out: int, stride: int, pad: int, dilate: int, spread: int) -> int:
    """Pairs of a result place o and a weight k whose input place (o stride + k spread - pad) / dilate exists."""
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
