"""The counter on hand-written programs: convolutions, fusions, VMEM and collectives."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hlo_by_hand import module

from transllm_jax.preflight.program.hlo import count_hlo


@pytest.mark.parametrize(
    ("left", "right", "window", "labels", "result"),
    [
        ((1, 5, 3), (3, 3, 4), "size=3 pad=1_1", "b0f_0io->b0f", (1, 5, 4)),
        ((2, 9, 3), (3, 3, 4), "size=3 stride=2 pad=1_2", "b0f_0io->b0f", (2, 5, 4)),
        ((2, 4, 3), (3, 3, 4), "size=3 pad=2_2 lhs_dilate=3 rhs_dilate=2", "b0f_0io->b0f", (2, 10, 4)),
        ((2, 4, 5, 3), (2, 4, 3, 6), "size=2x4 stride=1x3 lhs_dilate=2x4", "01bf_01io->01bf", (2, 4, 5, 6)),
        ((2, 7, 3), (4, 2, 3), "size=2 pad=3_0 rhs_reversal=1", "b0f_o0i->b0f", (2, 9, 4)),
    ],
)
def test_flops_of_a_convolution_leave_out_the_padding(
    left: tuple[int, ...], right: tuple[int, ...], window: str, labels: str, result: tuple[int, ...]
) -> None:
    """Compared with a count of every triple of output, kernel and input place."""
    options: dict[str, list[int]] = {}
    for part in window.split():
        key, _, value = part.partition("=")
        options[key] = [int(number.split("_")[0]) for number in value.split("x")]
    of_left, of_right, of_result = re.split(r"_|->", labels)
    products = 1
    for dim in range(len(left) - 2):
        digit = str(dim)
        size, kernel, out = (
            dims[where.index(digit)] for dims, where in ((left, of_left), (right, of_right), (result, of_result))
        )

        def option(key: str, default: int, dim: int = dim) -> int:
            return options[key][dim] if key in options else default

        stride, dilate, spread = option("stride", 1), option("lhs_dilate", 1), option("rhs_dilate", 1)
        products *= sum(
            o * stride + k * spread - option("pad", 0) == i * dilate
            for o, k, i in product(range(out), range(kernel), range(size))
        )
    batch, features, kinds = left[of_left.index("b")], left[of_left.index("f")], right[of_right.index("o")]
    shapes = [",".join(map(str, dims)) for dims in (left, right, result)]
    counts = count_hlo(
        module(f"""%a = bf16[{shapes[0]}] parameter(0)
%b = bf16[{shapes[1]}] parameter(1)
ROOT %c = f32[{shapes[2]}] convolution(%a, %b), window={{{window}}}, dim_labels={labels}""")
    )
    assert counts.flops == 2 * batch * features * kinds * products
    assert counts.flops_by_dtype == {"bf16": counts.flops}


FUSED = """
%fused (p: f32[100,8], q: f32[8], i: s32[], r: f32[100,8]) -> f32[100,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %r = f32[100,8]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %wide = f64[100,8]{1,0} convert(%p)
  %row = f64[1,8]{1,0} dynamic-slice(%wide, %i, %zero), dynamic_slice_sizes={1,8}
  %thin = f32[1,8]{1,0} convert(%row)
  %one = f32[1,8]{1,0} bitcast(%q)
  %new = f32[1,8]{1,0} add(%thin, %one)
  ROOT %out = f32[100,8]{1,0} dynamic-update-slice(%r, %new, %i, %zero)
}
"""


def test_slices_and_updates_in_a_fusion_count_what_they_touch() -> None:
    entry = """%p = f32[100,8]{1,0} parameter(0)
%q = f32[8]{0} parameter(1)
%i = s32[] parameter(2)
%r = f32[100,8]{1,0} parameter(3)
ROOT %f = f32[100,8]{1,0} fusion(%p, %q, %i, %r), kind=kLoop, calls=%fused"""
    # It reads a row of p, q and the index, and writes a row; r is updated in place.
    assert count_hlo(module(entry, FUSED)).hbm_bytes == 4 * (8 + 8 + 1 + 8)


def test_vmem_and_bitcasts_move_nothing() -> None:
    entry = """%a = f32[64]{0} parameter(0)
%s = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%a)
%d = f32[64]{0:S(1)} copy-done(%s)
%b = f32[8,8]{1,0:S(1)} bitcast(%d)
%c = f32[8,8]{1,0:S(1)} add(%b, %b)
%e = f32[8,8]{1,0} multiply(%c, %c)
%g = f32[2,8]{1,0} slice(%e), slice={[0:2], [0:8]}
%n = f32[8,8]{1,0} dynamic-update-slice(%e, %g, %z, %z)
%z = s32[]{:S(6)} constant(0)
ROOT %t = (f32[8,8]{1,0}) tuple(%n)"""
    counts = count_hlo(module(entry))
    # Read into VMEM; the product written; a slice read and written; an update read and written.
    assert counts.hbm_bytes == 4 * (64 + 64 + 2 * 16 + 2 * 16)
    assert [work.kind for work in counts.work.values()] == ["copy", "compute", "compute", "compute"]


def test_an_all_reduce_that_a_fusion_slices_is_a_reduce_scatter() -> None:
    fused = """
%both (x: f32[30,8]) -> f32[8,8] {
  %x = f32[30,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %pad = f32[32,8]{1,0} pad(%x, %zero), padding=0_2x0_0
  %r = f32[32,8]{1,0} all-reduce(%pad), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%sum
  %i = u32[] partition-id()
  %none = u32[] constant(0)
  ROOT %s = f32[8,8]{1,0} dynamic-slice(%r, %i, %none), dynamic_slice_sizes={8,8}
}
"""
    entry = """%x = f32[30,8]{1,0} parameter(0)
%f = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%both
ROOT %y = f32[8,8]{1,0} all-reduce(%f), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum"""
    counts = count_hlo(module(entry, fused))
    assert counts.by_kind() == {
        "reduce-scatter": (1, 4 * 64, 4 * 32 * 8 * 3 / 4),
        "all-reduce": (1, 4 * 64, 4 * 64),
    }
    assert all(work.kind == "collective" for work in counts.work.values())
    assert counts.hbm_bytes == 4 * (240 + 64 + 64 + 64)


def test_wrapped_asynchronous_collectives_are_counted() -> None:
    wrapped = """
%wrapped (x: f32[32]) -> f32[8] {
  %x = f32[32]{0} parameter(0)
  ROOT %r = f32[8]{0} reduce-scatter(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
}, execution_thread="async"
"""
    entry = """%x = f32[32]{0} parameter(0)
%g = (f32[8]{0}, f32[64]{0}) all-gather-start(%y), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
%y = f32[8]{0} parameter(1)
%a = ((f32[32]{0}), f32[8]{0}, u32[]) async-start(%x), calls=%wrapped
%m = f32[8]{0} all-reduce(%y), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%sum
%d = f32[8]{0} async-done(%a)
ROOT %e = f32[64]{0} all-gather-done(%g)"""
    counts = count_hlo(module(entry, wrapped))
    assert counts.by_kind() == {
        "all-gather": (1, 256.0, 224.0),
        "reduce-scatter": (1, 32.0, 96.0),
        "all-reduce": (1, 32.0, 0.0),
    }
    assert {found.kind: found.asynchronous for found in counts.collectives.values()} == {
        "all-gather": True,
        "reduce-scatter": True,
        "all-reduce": False,
    }


def test_an_asynchronous_collective_fusion_counts_once() -> None:
    """The TPU compiler writes it in three parts: a start, a piece beside a product, an end."""
    tuple_of = "(f32[8,8]{1,0}, f32[32,8]{1,0}, u32[]{:S(2)})"
    carried = "(f32[8,8]{1,0}, f32[8,8]{1,0}, f32[32,8]{1,0}, f32[32,8]{1,0}, u32[]{:S(2)})"
    gather = "all-gather(%x), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}"
    fused = f"""
%start (x: f32[8,8]) -> (f32[8,8], f32[32,8], u32[]) {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %g = f32[32,8]{{1,0}} {gather}
  ROOT %c = {tuple_of} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}
%piece (x: f32[8,8], f: f32[32,8], u: u32[], m: f32[8,8]) -> (f32[8,8], f32[8,8], f32[32,8], f32[32,8], u32[]) {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %f = f32[32,8]{{1,0}} parameter(1)
  %u = u32[]{{:S(2)}} parameter(2)
  %m = f32[8,8]{{1,0}} parameter(3)
  %d = f32[8,8]{{1,0}} dot(%m, %m), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %g = f32[32,8]{{1,0}} {gather}
  ROOT %t = {carried} tuple(%d, %x, %f, %g, %u)
}}
%end (x: f32[8,8], f: f32[32,8], u: u32[]) -> f32[32,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %f = f32[32,8]{{1,0}} parameter(1)
  %u = u32[]{{:S(2)}} parameter(2)
  %g = f32[32,8]{{1,0}} {gather}
  ROOT %c = f32[32,8]{{1,0}} custom-call(%x, %f, %g, %u), custom_call_target="AsyncCollectiveDone"
}}
"""
    entry = f"""%x = f32[8,8]{{1,0}} parameter(0)
%m = f32[8,8]{{1,0}} parameter(1)
%s = {tuple_of} fusion(%x), kind=kCustom, calls=%start
%a = f32[8,8]{{1,0}} get-tuple-element(%s), index=0
%b = f32[32,8]{{1,0}} get-tuple-element(%s), index=1
%c = u32[]{{:S(2)}} get-tuple-element(%s), index=2
%p = {carried} fusion(%a, %b, %c, %m), calls=%piece
ROOT %e = f32[32,8]{{1,0}} fusion(%a, %b, %c), kind=kCustom, calls=%end"""
    counts = count_hlo(module(entry, fused))
    assert counts.by_kind() == {"all-gather": (1, 1024.0, 768.0)}
    assert next(iter(counts.collectives.values())).asynchronous
    assert counts.flops == 2 * 8**3
    # The gather reads its part and writes the whole; the product reads one matrix and writes one.
    assert {work.kind: work.hbm_bytes for work in counts.work.values()} == {"collective": 4 * 320, "compute": 4 * 128}


def test_what_is_not_counted_is_listed() -> None:
    entry = """%x = f32[8,8]{1,0} parameter(0)
%a = f32[8,8]{1,0} custom-call(%x), custom_call_target="AllocateBuffer"
ROOT %y = f32[8,8]{1,0} cholesky(%a), lower=true"""
    counts = count_hlo(module(entry))
    assert len(counts.unexplained) == 1 and "cholesky" in counts.unexplained[0]


def test_a_large_program_is_read_in_seconds() -> None:
    """It is not timed: a quadratic reader would not end."""
    rows = "\n".join(f"%v{index} = f32[8]{{0}} add(%v{index - 1}, %v{index - 1})" for index in range(1, 100_000))
    counts = count_hlo(module(f"%v0 = f32[8]{{0}} parameter(0)\n{rows}"))
    assert counts.hbm_bytes == 99_999 * 3 * 32
