"""The compiled step on a mesh: what is gathered, what is summed, and how much a device computes."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from meshes import LORA, NEW, PLAIN, VOCAB, Case, Shape, layout_of, prepare

from transllm_jax.model.layout import SINGLE, sum_scattered
from transllm_jax.model.parameters import abstract, count_parameters
from transllm_jax.preflight.program.hlo import Counts, count_hlo
from transllm_jax.preflight.program.hlo_text import parse_hlo
from transllm_jax.training.logits import CHUNK

# Tokens of a device are no size of the model, nor a multiple of one.
LENGTH = 40
LAYERS, D, HEADS, FEED = PLAIN.num_hidden_layers, PLAIN.hidden_size, 64, PLAIN.intermediate_size
KERNELS = {"q": D * HEADS, "k": D * HEADS, "v": D * HEADS, "o": HEADS * D} | dict.fromkeys(
    ("gate", "up", "down"), D * FEED
)
CUT: Shape = (1, 8, 1)
BOTH: Shape = (2, 2, 2)


@cache
def text(shape: Shape | None, *, full: bool = False) -> str:
    """The step's program for a mesh, or for one device."""
    case = Case(lora=None, full=True) if full else Case()
    step, state, split, cut = prepare(case, SINGLE if shape is None else layout_of(shape), LENGTH)
    lowered: Any = step
    return str(lowered.lower(state, split.frozen, cut(0)).compile().as_text())


@cache
def counts(shape: Shape | None) -> Counts:
    found = count_hlo(text(shape))
    assert not found.unexplained
    return found


def elements(program: str, *kinds: str) -> Counter[int]:
    """The numbers of elements of all arrays that collectives of these kinds take or give."""
    module = parse_hlo(program)
    found: Counter[int] = Counter()
    for computation in module.computations.values():
        for instruction in computation:
            if instruction.opcode.removesuffix("-start") in kinds:
                shapes = list(instruction.shapes)
                for name in instruction.operands:
                    shapes += computation.instructions[name].shapes
                found.update(shape.elements for shape in shapes)
    return found


def kernel_sizes(shape: Shape) -> set[int]:
    """The elements of kernels: of one layer or of all, whole or cut by any of the mesh's axes."""
    cuts = {1, shape[1], shape[2], shape[1] * shape[2]}
    return {size * layers // cut for size in KERNELS.values() for layers in (1, LAYERS) for cut in cuts}


SUMS = ("all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.mark.parametrize("shape", [CUT, BOTH])
def test_frozen_kernels_are_gathered_and_never_summed(shape: Shape) -> None:
    program = text(shape)
    sums = elements(program, *SUMS)
    assert sums and not sums.keys() & kernel_sizes(shape)
    # Gathered over fsdp: what is left is a device's part of the heads, or of the feed-forward part.
    gathered = elements(program, "all-gather")
    assert gathered.keys() >= {size // shape[2] for size in KERNELS.values()}


def test_the_search_finds_the_sums_of_kernels_that_train() -> None:
    assert elements(text(CUT, full=True), *SUMS).keys() >= set(KERNELS.values())


@pytest.mark.parametrize("shape", [CUT, BOTH])
def test_no_sum_of_whole_tables_is_on_every_device(shape: Shape) -> None:
    sums = elements(text(shape), "all-reduce", "reduce-scatter")
    assert not sums.keys() & {rows * D for rows in (NEW, VOCAB, NEW + VOCAB)}


def test_gradients_pass_each_link_once() -> None:
    """By a ring: of eight parts of an array a device sends seven, and nowhere is it whole."""
    adapters = abstract(PLAIN, LORA, 0).trainable
    passed: Counter[bool] = Counter()
    for found in counts(CUT).collectives.values():
        if found.kind == "collective-permute":
            # The loss has its gradients, those of the new output rows, in the forward pass.
            passed["transpose(" in found.op_name] += int(found.executions * found.operand_bytes)
    assert passed == {False: 7 * (NEW * D // 8) * 4, True: 7 * (count_parameters(adapters) // 8) * 4}


def test_layers_are_gathered_one_at_a_time() -> None:
    gathers = [found for found in counts(CUT).collectives.values() if found.kind == "all-gather"]
    # Nothing is larger than a layer's largest array, in the loops over the layers or before them.
    assert max(found.result_bytes for found in gathers) == 4 * max(KERNELS.values())
    kernels: Counter[float] = Counter()
    for found in gathers:
        kernels[found.result_bytes / 4] += found.executions
    # Once forwards and once backwards, layer by layer. The base's two tables: one is gathered for the loss.
    for size in set(KERNELS.values()):
        assert kernels[size] == 2 * LAYERS * list(KERNELS.values()).count(size)
    assert kernels[VOCAB * D] == kernels[NEW * D] == 1
    inside = [found for found in counts(CUT).collectives.values() if found.executions % LAYERS == 0]
    arrays = {*KERNELS.values(), *(size * LORA.rank for size in (D, HEADS, FEED))}
    assert {found.result_bytes / 4 for found in inside if found.kind == "all-gather"} == arrays
    # What is not gathered there are the adapters' gradients on their way; over data, of size 1, nothing goes.
    assert {found.kind for found in inside} <= {"all-gather", "collective-permute", "all-reduce"}
    assert not any(found.link_bytes for found in inside if found.kind == "all-reduce")


def test_a_device_computes_its_part_and_no_more() -> None:
    """An eighth, to the FLOP, and the vocabulary's products are in it."""
    # Two products a token with the base's rows, and three with the new ones, whose gradient is the third. One device
    # fills its last chunk of tokens up; eight have a smaller chunk each.
    vocabulary, filled = 2 * D * (2 * VOCAB + 3 * NEW), -8 * LENGTH % CHUNK
    assert counts(CUT).flops == (counts(None).flops - filled * vocabulary) / 8


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((1, devices, 1), ("fsdp",)) for devices in range(2, 9)]
    + [((2, 2, 2), ("fsdp", "tensor")), ((1, 2, 4), ("fsdp", "tensor")), ((2, 3, 1), ("data", "fsdp"))],
)
@pytest.mark.parametrize("unroll", [True, False], ids=["round by round", "a loop"])
def test_sums_by_a_ring_are_those_of_psum_scatter(shape: Shape, axes: tuple[str, ...], unroll: bool) -> None:
    layout = layout_of(shape)
    devices, everyone = layout.size(*axes), int(np.prod(shape))
    rng = np.random.default_rng(0)
    # Whole numbers: their sums are exact. Odd numbers of rows, a single one, and even ones.
    given = [
        jnp.asarray(rng.integers(-99, 99, (everyone, devices, *rest)), jnp.float32) for rest in ((5, 3), (1, 2), (4,))
    ]

    def both(arrays: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        arrays = [array[0] for array in arrays]
        wanted = [jax.lax.psum_scatter(array, axes) for array in arrays]
        return [sum_scattered(array, axes, unroll=unroll)[None] for array in arrays], [own[None] for own in wanted]

    each = PartitionSpec(("data", "fsdp", "tensor"))
    run = jax.shard_map(both, mesh=layout.mesh, in_specs=each, out_specs=each, check_vma=False)
    ours, wanted = jax.jit(run)(given)
    for found, expected, array in zip(ours, wanted, given, strict=True):
        assert found.shape == (everyone, *array.shape[2:])
        np.testing.assert_array_equal(found, expected)
        assert np.asarray(found).any()
