"""Parses the text of a compiled HLO module (`compiled.as_text()`) into computations and instructions.

It parses only what counting needs: names, shapes with their memory space, operands, and attributes on demand. It is
written for the text of XLA's CPU and TPU compilers in jax 0.10 to 0.12. An instruction may have several lines (the
metadata of a Pallas kernel does).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod

import numpy as np

Groups = tuple[tuple[int, ...], ...]

# Bytes of an element, for types whose name does not give its bits.
_SIZES = {"pred": 1.0, "token": 0.0, "opaque": 0.0, "c64": 8.0, "c128": 16.0}
_LEAF = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"[a-z]+(\d+)")
_OPCODE = re.compile(r" ([a-z][a-z0-9_-]*)\(")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_COMMENT = re.compile(r"/\*.*?\*/")
_DEVICES = re.compile(r"(num_partitions|replica_count)=(\d+)")
_GROUPS = re.compile(
    r"replica_groups=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
    r"|mesh\[[^\]]*\](?:, device_ids=\(\[[\d,]+\](?:T\([\d,]+\))?\))? \{[^}]*\})"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\])(?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_AXIS = re.compile(r"'?([^',=:]+?)'?(?::\((\d+)\)(\d+))?(?:,|$)")


@dataclass(frozen=True)
class Shape:
    """An array: its type, dimensions and memory space (0 is main memory, 1 is VMEM, others are smaller)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @cached_property
    def elements(self) -> int:
        return prod(self.dims)

    @cached_property
    def item_bytes(self) -> float:
        """Bytes of one element: half a byte for the four-bit types."""
        if self.dtype in _SIZES:
            return _SIZES[self.dtype]
        match = _BITS.match(self.dtype)
        if match is None:
            raise ValueError(f"the type {self.dtype} has no size that is known")
        return int(match[1]) / 8

    @property
    def bytes(self) -> float:
        return self.elements * self.item_bytes

    def hbm(self, elements: float | None = None) -> float:
        """Bytes of `elements` (None: all) of its elements in main memory; 0 if the array is in VMEM or SMEM."""
        if self.space:
            return 0.0
        return self.item_bytes * (self.elements if elements is None else min(elements, self.elements))


@cache
def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type such as `(f32[2]{0:T(128)S(1)}, s32[])`, nested tuples flattened."""
    shapes = []
    for match in _LEAF.finditer(text):
        space = _SPACE.search(match[3]) if match[3] else None
        dims = tuple(int(size.lstrip("<=")) for size in match[2].split(",") if size)
        shapes.append(Shape(match[1], dims, int(space[1]) if space else 0))
    return tuple(shapes)


@dataclass
class Instruction:
    """One instruction: `%name = shapes opcode(operands), attributes`. `inside` is the text between the parentheses."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    inside: str
    attributes: str

    @cached_property
    def operands(self) -> tuple[str, ...]:
        if self.opcode in ("constant", "parameter", "iota"):
            return ()
        return tuple(part.rpartition(" ")[2].lstrip("%") for part in _split(_COMMENT.sub("", self.inside)))

    def value(self, key: str) -> str | None:
        """The value of an attribute such as `key={..}` or `key=word`, without commas outside quotes and braces."""
        match = re.search(rf"(?:^|[ ,]){key}=(\{{[^}}]*\}}|\"[^\"]*\"|[^,\s]+)", self.attributes)
        return match[1].strip('"') if match else None

    def numbers(self, key: str) -> tuple[int, ...]:
        """The numbers of an attribute `key={1,2}`; () if it is absent."""
        return tuple(int(number) for number in re.findall(r"\d+", self.value(key) or ""))

    def called(self) -> tuple[str, ...]:
        """The computations that a fusion, call, async wrapper, while or conditional runs. Reducers are not included."""
        keys = "calls|body|condition|true_computation|false_computation|branch_computations"
        if self.opcode == "call":
            keys += "|to_apply"
        return tuple(
            name.lstrip("%")
            for match in re.finditer(rf"(?:^|[ ,])(?:{keys})=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
            for name in re.findall(r"[\w.\-]+", match[1])
        )

    @cached_property
    def op_name(self) -> str:
        match = re.search(r'metadata=\{[^}]*?op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclass
class Computation:
    """Instructions by name, in the order of the text, and the root's name."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root_name: str = ""

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        return self.instructions[self.root_name]

    def shapes(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        """The shapes of each operand."""
        return [self.instructions[name].shapes for name in instruction.operands]

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(instruction.inside): instruction for instruction in self if instruction.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """For each value the instructions that use it, with the operand's position."""
        users: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
        for user in self:
            for position, name in enumerate(user.operands):
                users[name].append((user, position))
        return users


@dataclass
class Module:
    """The computations by name, the entry computation, and the number of devices that run the module."""

    computations: dict[str, Computation]
    entry: Computation
    devices: int

    def called(self, instruction: Instruction) -> Computation:
        """The computation of a fusion, call or async wrapper."""
        return self.computations[instruction.called()[0]]


def parse_hlo(text: str) -> Module:
    """Parses the text of a module. Raises ValueError if it is not one."""
    lines = text.splitlines()
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    current: Computation | None = None
    parts: list[str] = []

    def finish() -> None:
        if parts and current is not None:
            _add(current, "\n".join(parts))
        parts.clear()

    for line in lines:
        if current is None:
            match = _COMPUTATION.match(line)
            if match:
                current = computations[match[2]] = Computation(match[2])
                entry = current if match[1] else entry
        elif line == "}" or line.startswith("}, execution_thread="):
            finish()
            current = None
        elif _INSTRUCTION.match(line):
            finish()
            parts.append(line)
        else:
            parts.append(line)
    if entry is None:
        raise ValueError("this is no text of an HLO module: it has no ENTRY computation")
    return Module(computations, entry, prod(int(number) for _, number in _DEVICES.findall(lines[0])))


def _add(computation: Computation, text: str) -> None:
    head = _INSTRUCTION.match(text)
    opcode = _OPCODE.search(text, head.end() - 1 if head else 0)
    if head is None or opcode is None:
        raise ValueError(f"this line of HLO is not understood: {text.strip()[:200]}")
    end = _closing(text, opcode.end())
    computation.instructions[head[2]] = Instruction(
        head[2],
        opcode[1],
        parse_shapes(text[head.end() : opcode.start()]),
        text[opcode.end() : end],
        text[end + 1 :],
    )
    if head[1] or not computation.root_name:
        computation.root_name = head[2]


def _closing(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one opened just before `start`."""
    end = text.index(")", start)
    seen, opened = start, 0
    while True:
        opened += text.count("(", seen, end)
        if not opened:
            return end
        opened, seen = opened - 1, end + 1
        end = text.index(")", seen)


def _split(text: str) -> list[str]:
    """The parts between commas that are outside all brackets."""
    if "{" not in text and "(" not in text and "[" not in text:
        return [part.strip() for part in text.split(",") if part.strip()]
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append(text[start:place].strip())
            start = place + 1
    return [part for part in [*parts, text[start:].strip()] if part]


def parse_groups(text: str, devices: int) -> Groups:
    """The groups of devices in a collective's attributes, as positions in the program's device order.

    `replica_groups` is a list `{{0,1},{2,3}}` (`{}` is all devices), an iota `[2,2]<=[2,2]T(1,0)`, or names axes of a
    mesh `mesh['data'=2,'fsdp'=4] {'fsdp'}`. A part of an axis is `'fsdp':(1)2` (the size to its left, its own size).
    The mesh may give the order of its devices: `device_ids=([2,1,0])` or `device_ids=([4,2]T(1,0))`. Without groups,
    devices that `source_target_pairs` connect are a group. Raises ValueError if there is neither.
    """
    match = _GROUPS.search(text)
    if match is None:
        pairs = parse_pairs(text)
        if not pairs:
            raise ValueError(f"a collective without groups that are understood: {text[:200]}")
        return _connected(pairs)
    value = match[1]
    if value == "{}":
        return (tuple(range(devices)),)
    if value.startswith("{"):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", value))
    if iota := _IOTA.fullmatch(value):
        dims, shape, order = (tuple(map(int, part.split(","))) if part else None for part in iota.groups())
        assert dims is not None and shape is not None
        return _rows(np.arange(prod(shape)).reshape(shape).transpose(order).reshape(dims))
    return _mesh_groups(value)


def parse_pairs(text: str) -> Groups:
    """The (source, target) pairs in a collective-permute's attributes; () if there are none."""
    match = _PAIRS.search(text)
    return _ints(re.findall(r"\{(\d+),(\d+)\}", match[1])) if match else ()


def _ints(rows: list[tuple[str, str]]) -> Groups:
    return tuple((int(source), int(target)) for source, target in rows)


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(int(place) for place in row) for row in array.reshape(-1, array.shape[-1]))


def _mesh_groups(value: str) -> Groups:
    match = _MESH.fullmatch(value)
    assert match is not None
    sizes = {}
    for part in match[1].split(","):
        name, _, size = part.strip().rpartition("=")
        sizes[name.strip("'")] = int(size)
    count = prod(sizes.values())
    ids = [int(place) for place in re.findall(r"\d+", match[2])] if match[2] else list(range(count))
    # With T(...) the numbers are the shape of an iota that is transposed; without it, they are the devices.
    permutation = tuple(map(int, match[3].split(","))) if match[3] else None
    order = np.arange(count).reshape(ids).transpose(permutation).reshape(-1) if permutation else np.array(ids)
    # Split every axis into (left, size, right), so that a part of an axis is a dimension too.
    chosen: dict[str, tuple[int, int]] = {}
    names = []
    for axis in _AXIS.finditer(match[4]):
        chosen[axis[1]] = (int(axis[2] or 1), int(axis[3] or sizes[axis[1]]))
        names.append(axis[1])
    shape: list[int] = []
    place: dict[str, int] = {}
    for name, size in sizes.items():
        before, inner = chosen.get(name, (1, 1))
        place[name] = len(shape) + 1
        shape += [before, inner, size // (before * inner)]
    array = order.reshape(shape)
    grouped = [place[name] for name in names]
    rest = [dim for dim in range(len(shape)) if dim not in grouped]
    return _rows(array.transpose([*rest, *grouped]).reshape(-1, prod(shape[dim] for dim in grouped)))


def _connected(pairs: Groups) -> Groups:
    """The connected components of the pairs, each in ascending order."""
    leader: dict[int, int] = {}

    def find(device: int) -> int:
        while leader.setdefault(device, device) != device:
            device = leader[device]
        return device

    for source, target in pairs:
        first, second = sorted((find(source), find(target)))
        leader[second] = first
    sets: dict[int, list[int]] = defaultdict(list)
    for device in sorted(leader):
        sets[find(device)].append(device)
    return tuple(tuple(members) for members in sets.values())
