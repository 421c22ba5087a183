"""Hand-written programs: groups, shapes, instructions and the rounds of loops."""

from __future__ import annotations

import pytest
from hlo_by_hand import module

from transllm_jax.preflight.program.hlo import count_hlo
from transllm_jax.preflight.program.hlo_text import parse_groups, parse_hlo, parse_pairs, parse_shapes


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups={}, to_apply=%sum", (tuple(range(8)),)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x={}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh[data=2,fsdp=2] {data,fsdp}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=([3,2,1,0]) {'y'}, dimensions={1}", ((3, 2), (1, 0))),
        ("replica_groups=mesh['x'=2,'y'=3], device_ids=([3,2]T(1,0)) {'y'}, dimensions={1}", ((0, 2, 4), (1, 3, 5))),
        ("channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", ((0, 1), (2, 3))),
    ],
)
def test_groups_are_read_in_every_notation(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert parse_groups(f", channel_id=1, {text}", 8) == groups


def test_unknown_groups_raise() -> None:
    with pytest.raises(ValueError, match="without groups"):
        parse_groups("replica_groups=something, dimensions={0}", 8)
    assert parse_pairs("replica_groups={{0,1}}") == ()


def test_shapes_are_read() -> None:
    shapes = parse_shapes("(bf16[2,256]{1,0:T(8,128)(2,1)S(1)}, (s4[3]{0}, pred[]), f8e4m3fn[<=5], token[])")
    assert [(shape.dtype, shape.dims, shape.space, shape.bytes) for shape in shapes] == [
        ("bf16", (2, 256), 1, 1024.0),
        ("s4", (3,), 0, 1.5),
        ("pred", (), 0, 1.0),
        ("f8e4m3fn", (5,), 0, 5.0),
        ("token", (), 0, 0.0),
    ]
    assert [shape.hbm() for shape in shapes] == [0.0, 1.5, 1.0, 5.0, 0.0]


def test_a_text_without_a_module_raises() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_hlo("HloModule empty\n")
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_hlo("")


def test_an_instruction_over_several_lines_is_read() -> None:
    text = module(
        """%a = f32[4]{0} parameter(0)
%call = (f32[4]{0}, f32[2]{0}) custom-call(%a, /*index=1*/%a), custom_call_target="tpu_custom_call", x={y={
"z":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(f)/my_kernel/pallas_call" id=1}
ROOT %b = f32[4]{0} get-tuple-element(%call), index=0"""
    ).replace("  }}, metadata", "}}, metadata")
    counts = count_hlo(text)
    (call,) = counts.custom_calls.values()
    assert call.kernel == "my_kernel" and [shape.dims for shape in call.operands] == [(4,), (4,)]
    assert counts.hbm_bytes == 4 * (4 + 4 + 4 + 2)
    assert len(counts.unexplained) == 1


def loop(start: int, step: int, limit: int, compare: str, *, opcode: str = "add", wide: bool = False) -> str:
    """A loop over an 8x8 product; if `wide`, limit and step are elements of the loop's tuple."""
    kind = "(s32[], f32[8,8], s32[], s32[])"
    typed = "(s32[], f32[8,8]{1,0}, s32[], s32[])"
    step_line = "get-tuple-element(%p), index=2" if wide else f"constant({step})"
    limit_line = "get-tuple-element(%q), index=3" if wide else f"constant({limit})"
    body = f"""
%body (p: {kind}) -> {kind} {{
  %p = {typed} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{{1,0}} get-tuple-element(%p), index=1
  %k2 = s32[] get-tuple-element(%p), index=2
  %k3 = s32[] get-tuple-element(%p), index=3
  %step = s32[] {step_line}
  %j = s32[]{{:S(6)}} copy(%i)
  %next = s32[] {opcode}(%j, %step)
  %y = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = {typed} tuple(%next, %y, %k2, %k3)
}}
%test (u: s32[], v: s32[]) -> pred[] {{
  %u = s32[] parameter(0)
  %v = s32[] parameter(1)
  ROOT %less = pred[] compare(%u, %v), direction={compare}
}}
%condition (q: {kind}) -> pred[] {{
  %q = {typed} parameter(0)
  %limit = s32[] {limit_line}
  %n = s32[] get-tuple-element(%q), index=0
  ROOT %go = pred[] fusion(%n, %limit), kind=kLoop, calls=%test
}}"""
    return module(
        f"""%z = s32[] constant({start})
%c = s32[] copy(%z)
%x = f32[8,8]{{1,0}} parameter(0)
%s = s32[] constant({step})
%l = s32[] constant({limit})
%in = {typed} tuple(%c, %x, %s, %l)
ROOT %w = {typed} while(%in), condition=%condition, body=%body""",
        body,
    )


@pytest.mark.parametrize(
    ("text", "rounds"),
    [
        (loop(0, 1, 5, "LT"), 5),
        (loop(0, 2, 5, "LT"), 3),
        (loop(2, 2, 8, "LE"), 4),
        (loop(7, -1, 0, "GE"), 8),
        (loop(7, 2, 0, "GT", opcode="subtract"), 4),
        (loop(0, 1, 9, "NE"), 9),
        (loop(5, 1, 5, "LT"), 0),
        (loop(0, 1, 6, "LT", wide=True), 6),
        (loop(0, 1, 5, "LT").replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'), 3),
    ],
)
def test_rounds_of_a_loop_are_counted(text: str, rounds: int) -> None:
    counts = count_hlo(text)
    assert counts.unexplained == []
    assert counts.flops == rounds * 2 * 8**3


@pytest.mark.parametrize(
    "text",
    [
        loop(0, -1, 5, "LT"),  # does not end
        loop(0, 1, 5, "LT").replace("copy(%z)", "add(%z, %z), x=1").replace("constant(0)", "parameter(1)"),
        loop(0, 1, 5, "LT").replace("add(%j, %step)", "multiply(%j, %step)"),
    ],
)
def test_a_loop_of_unknown_rounds_is_listed(text: str) -> None:
    counts = count_hlo(text)
    assert counts.flops == 2 * 8**3
    assert len(counts.unexplained) == 1 and "rounds unknown" in counts.unexplained[0]


def test_loops_in_loops_multiply() -> None:
    text = loop(0, 1, 5, "LT")
    inner = text[text.index("%body") : text.index("ENTRY")].replace("%body", "%inner").replace("%condition", "%until")
    outer = text.replace(
        "%y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}", ""
    ).replace(
        "  ROOT %t = (s32[], f32[8,8]{1,0}, s32[], s32[]) tuple(%next, %y, %k2, %k3)",
        """  %zero = s32[] constant(0)
  %in = (s32[], f32[8,8]{1,0}, s32[], s32[]) tuple(%zero, %x, %k2, %k3)
  %w = (s32[], f32[8,8]{1,0}, s32[], s32[]) while(%in), condition=%until, body=%inner
  %y = f32[8,8]{1,0} get-tuple-element(%w), index=1
  ROOT %t = (s32[], f32[8,8]{1,0}, s32[], s32[]) tuple(%next, %y, %k2, %k3)""",
    )
    inner = inner.replace("%test", "%test2")
    assert count_hlo(outer.replace("ENTRY", inner + "\nENTRY")).flops == 25 * 2 * 8**3
