"""The counter of compiled programs: known answers from XLA's compilers for the CPU and, with libtpu, for TPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from transllm_jax.preflight.program.hlo import Counts, CustomCall, count_hlo
from transllm_jax.preflight.program.hlo_text import parse_groups, parse_hlo, parse_pairs, parse_shapes

# Rows, inner sizes, rounds of the loops, and the shape of the step: layers, width, feed-forward, vocabulary, length.
M, K, N, ROUNDS, INNER = 256, 512, 1024, 6, 3
LAYERS, D, F, V, T = 8, 512, 1024, 2048, 256
ROWS = 2  # sequences a device
LINKS = 4  # devices along fsdp


def compile_programs(platform: str, out: Path) -> None:
    """Writes the text of every program, compiled for 8 CPU devices or for a slice. Runs in a process of its own."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from transllm_jax.preflight.program.chips import topology_devices

    devices = jax.devices() if platform == "cpu" else topology_devices(platform)
    count = len(devices)
    mesh = Mesh(np.array(devices).reshape(count // LINKS, LINKS), ("data", "fsdp"))
    alone = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    both = ("data", "fsdp")

    # XLA's CPU compiler widens bfloat16, and its TPU compiler narrows float32 that products round anyway.
    usual = jnp.float32 if platform == "cpu" else jnp.bfloat16

    def array(*shape: int, spec: PartitionSpec | None = None, dtype: object = usual) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=alone if spec is None else NamedSharding(mesh, spec))

    def save(name: str, function: Callable[..., object], *arguments: object) -> None:
        (out / name).write_text(jax.jit(function).lower(*arguments).compile().as_text(), encoding="utf-8")

    def scan(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, w: (jnp.tanh(carry @ w), None), x, weights)[0]

    def nested(x: jax.Array, weights: jax.Array) -> jax.Array:
        def outer(carry: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.scan(lambda inner, _: (jnp.tanh(inner @ w), None), carry, None, length=INNER)[0], None

        return jax.lax.scan(outer, x, weights)[0]

    def checkpointed(x: jax.Array, weights: jax.Array) -> jax.Array:
        block = jax.checkpoint(lambda carry, w: (jnp.tanh(jnp.tanh(carry @ w) @ w.T), None))
        return jax.lax.scan(block, x, weights)[0].sum()

    def collectives(x: jax.Array, weights: jax.Array) -> jax.Array:
        def body(carry: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            full = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
            carry = jnp.tanh(carry @ full)
            total = jax.lax.psum(carry, "data")
            scattered = jax.lax.psum_scatter(total @ full.T, "fsdp", scatter_dimension=1, tiled=True)
            swapped = jax.lax.all_to_all(carry, "fsdp", split_axis=0, concat_axis=1, tiled=True)
            passed = jax.lax.ppermute(carry, "fsdp", [(place, (place + 1) % LINKS) for place in range(LINKS)])
            return carry + jnp.tanh(scattered).sum() + jnp.sin(swapped).sum() + passed, None

        return jax.lax.scan(body, x, weights)[0]

    spread = jax.shard_map(
        collectives,
        mesh=mesh,
        in_specs=(PartitionSpec(both), PartitionSpec(None, "fsdp")),
        out_specs=PartitionSpec(both),
        check_vma=False,
    )

    def step(weights: dict[str, jax.Array], tokens: jax.Array) -> dict[str, jax.Array]:
        def loss(weights: dict[str, jax.Array]) -> jax.Array:
            def block(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
                x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(both)))
                q, k, v = (jnp.sin(x @ w[name]).reshape(*x.shape[:2], 4, D // 4) for name in "qkv")
                scores = jax.nn.softmax(jnp.einsum("bqnh,bknh->bnqk", q, k))
                x = x + jnp.einsum("bnqk,bknh->bqnh", scores, v).reshape(x.shape) @ w["o"]
                return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

            x, _ = jax.lax.scan(jax.checkpoint(block), weights["rows"][tokens], weights["blocks"])
            logits = jax.nn.log_softmax((x @ weights["rows"].T).astype(jnp.float32))
            return -jnp.take_along_axis(logits, tokens[..., None], -1).mean()

        return jax.grad(loss)(weights)

    sizes = {name: (D, D) for name in "qkvo"} | {"gate": (D, F), "up": (D, F), "down": (F, D)}
    blocks = {name: array(LAYERS, *size, spec=PartitionSpec(None, both)) for name, size in sizes.items()}
    weights = {"rows": array(V, D, spec=PartitionSpec(both)), "blocks": blocks}
    square = array(ROUNDS, K, K)

    save("product", lambda a, b: a @ b, array(M, K), array(K, N))
    save("scan", scan, array(M, K), square)
    save("nested", nested, array(M, K), square)
    save("checkpointed", jax.grad(checkpointed, argnums=(0, 1)), array(M, K), square)
    save(
        "conditional",
        lambda which, a, b: jax.lax.cond(which > 0, lambda a, b: a @ b, lambda a, b: jnp.sin(a @ b) @ b, a, b),
        array(dtype=jnp.int32),
        array(M, M),
        array(M, M),
    )
    save("batched", lambda a, b: jnp.einsum("bnqh,bnkh->bnqk", a, b), array(2, 4, M, 128), array(2, 4, M, 128))
    save(
        "collectives",
        spread,
        array(128 * count, K, spec=PartitionSpec(both)),
        array(ROUNDS, K, K, spec=PartitionSpec(None, "fsdp")),
    )
    tokens = array(ROWS * count, T, spec=PartitionSpec(both), dtype=jnp.int32)
    save("step", step, weights, tokens)
    if platform != "cpu":
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * 4)
            return jax.vmap(kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1))(q, k, v)

        save("kernel", attend, *[array(2, 4, T, 128)] * 3)


LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture(scope="module", params=["cpu", pytest.param("v5e:4x4", marks=LIBTPU)])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The platform, and the directory with the texts."""
    out = tmp_path_factory.mktemp("hlo")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, __file__, request.param, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, out


def item(programs: tuple[str, Path]) -> int:
    """Bytes of an element of the programs' arrays."""
    return 4 if programs[0] == "cpu" else 2


def counted(programs: tuple[str, Path], name: str) -> Counts:
    counts = count_hlo((programs[1] / name).read_text(encoding="utf-8"))
    assert counts.unexplained == []
    return counts


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("product", 2 * M * K * N),
        ("scan", ROUNDS * 2 * M * K * K),
        ("nested", ROUNDS * INNER * 2 * M * K * K),
        # Two products forward, the same again, and two gradients of each.
        ("checkpointed", ROUNDS * (2 + 2 + 4) * 2 * M * K * K),
        # The branch with two products.
        ("conditional", 2 * 2 * M * M * M),
        ("batched", 2 * 2 * 4 * M * M * 128),
        ("collectives", ROUNDS * 2 * 2 * 128 * K * K),
    ],
)
def test_flops_are_those_of_the_products(programs: tuple[str, Path], name: str, flops: int) -> None:
    counts = counted(programs, name)
    assert counts.flops == flops
    assert counts.flops_by_dtype == {"f32" if programs[0] == "cpu" else "bf16": flops}


def test_flops_of_a_step_with_layers_sharded_over_all_devices(programs: tuple[str, Path]) -> None:
    """The TPU compiler turns these products into windowed convolutions in loops of their own, between permutes."""
    tokens = ROWS * T
    forward = 2 * tokens * (4 * D * D + 3 * D * F) + 4 * tokens * T * D
    # The last product of a layer is not needed again in its backward pass.
    layer = 4 * forward - 2 * tokens * D * F
    assert counted(programs, "step").flops == LAYERS * layer + 3 * 2 * tokens * D * V


def test_traffic_of_a_product_and_of_a_scan_that_slices_its_weights(programs: tuple[str, Path]) -> None:
    assert counted(programs, "product").hbm_bytes == item(programs) * (M * K + K * N + M * N)
    moved = counted(programs, "scan").hbm_bytes
    weights, rows = item(programs) * ROUNDS * K * K, item(programs) * M * K
    # Each round reads one slice of the weights. On the CPU a slice and the rows between the rounds are written and read
    # too, a few times; never all weights in each round.
    assert weights + 2 * rows <= moved <= 3 * weights + 10 * ROUNDS * rows
    if programs[0] != "cpu":
        # The rows stay in VMEM between the rounds.
        assert moved <= weights + 3 * rows


def test_collectives_in_a_loop(programs: tuple[str, Path]) -> None:
    counts = counted(programs, "collectives")
    kinds = counts.by_kind()
    block, share = item(programs) * 128 * K, (LINKS - 1) / LINKS
    along = 8 // LINKS if programs[0] == "cpu" else 16 // LINKS
    assert kinds["all-gather"] == (ROUNDS, ROUNDS * item(programs) * K * K, ROUNDS * share * item(programs) * K * K)
    assert kinds["all-to-all"] == (ROUNDS, ROUNDS * block, ROUNDS * share * block)
    assert kinds["collective-permute"] == (ROUNDS, ROUNDS * block, ROUNDS * block)
    summed = ROUNDS * 2 * (along - 1) / along * block
    if programs[0] == "cpu":
        assert kinds["reduce-scatter"] == (ROUNDS, ROUNDS * block / LINKS, ROUNDS * share * block)
        assert kinds["all-reduce"] == (ROUNDS, ROUNDS * block, summed)
    else:
        # So small a reduce-scatter is an all-reduce and a slice there.
        assert kinds["all-reduce"] == (2 * ROUNDS, 2 * ROUNDS * block, summed + ROUNDS * 2 * share * block)
    gathers = [found for found in counts.collectives.values() if found.kind == "all-gather"]
    assert gathers[0].groups[1] == tuple(range(LINKS, 2 * LINKS))
    assert "all_gather" in gathers[0].op_name
    permute = next(found for found in counts.collectives.values() if found.pairs)
    assert permute.pairs[:2] == ((0, 1), (1, 2)) and permute.groups[0] == tuple(range(LINKS))
    assert permute.asynchronous == (programs[0] != "cpu")
    assert counts.link_bytes == pytest.approx(sum(kind[2] for kind in kinds.values()), rel=1e-12)  # order of a sum


def test_a_collective_that_goes_on_through_several_fusions_counts_once(programs: tuple[str, Path]) -> None:
    text = (programs[1] / "step").read_text(encoding="utf-8")
    counts = count_hlo(text)
    gathers = [found for found in counts.collectives.values() if found.kind == "all-gather"]
    channels = set(re.findall(r" all-gather\(.*?channel_id=(\d+)", text))
    if programs[0] != "cpu":
        assert "AsyncCollectiveStart" in text and len(channels) < len(re.findall(r" all-gather\(", text))
        assert len(gathers) == len(channels)
        assert any(found.asynchronous for found in gathers)
    assert all(0 < found.link_bytes <= 4 * max(F * D, V * D) for found in gathers)


@LIBTPU
def test_a_kernel_is_explained_by_the_caller_or_listed(programs: tuple[str, Path]) -> None:
    if programs[0] == "cpu":
        pytest.skip("the kernel is one of the TPU")
    text = (programs[1] / "kernel").read_text(encoding="utf-8")
    unknown = count_hlo(text)
    assert unknown.flops == 0 and len(unknown.unexplained) == 1 and "splash_mha" in unknown.unexplained[0]
    assert unknown.hbm_bytes > 0
    seen: list[CustomCall] = []

    def explain(call: CustomCall) -> tuple[float, float | None]:
        seen.append(call)
        return 7.0, 11.0

    known = count_hlo(text, explain)
    assert known.flops == 7 and known.unexplained == []
    assert seen[0].target == "tpu_custom_call" and seen[0].kernel.startswith("splash_mha_fwd")
    assert [shape.dims for shape in seen[0].operands].count((2, 4, T, 128)) == 3
    assert "block_q" in seen[0].attributes
    calls = [work for work in known.work.values() if work.flops]
    assert [work.hbm_bytes for work in calls] == [11.0]


# Hand-written texts.

SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
"""


def module(entry: str, *others: str, devices: int = 8) -> str:
    body = "\n".join(f"  {line}" for line in entry.strip().splitlines())
    head = f"HloModule test, is_scheduled=true, num_partitions={devices}\n{SUM}"
    return head + "\n".join(others) + f"\nENTRY %main () -> f32[] {{\n{body}\n}}\n"


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
def test_every_way_to_write_groups(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert parse_groups(f", channel_id=1, {text}", 8) == groups


def test_groups_that_are_not_understood_are_an_error() -> None:
    with pytest.raises(ValueError, match="without groups"):
        parse_groups("replica_groups=something, dimensions={0}", 8)
    assert parse_pairs("replica_groups={{0,1}}") == ()


def test_shapes() -> None:
    shapes = parse_shapes("(bf16[2,256]{1,0:T(8,128)(2,1)S(1)}, (s4[3]{0}, pred[]), f8e4m3fn[<=5], token[])")
    assert [(shape.dtype, shape.dims, shape.space, shape.bytes) for shape in shapes] == [
        ("bf16", (2, 256), 1, 1024.0),
        ("s4", (3,), 0, 1.5),
        ("pred", (), 0, 1.0),
        ("f8e4m3fn", (5,), 0, 5.0),
        ("token", (), 0, 0.0),
    ]
    assert [shape.hbm() for shape in shapes] == [0.0, 1.5, 1.0, 5.0, 0.0]


def test_no_module_is_an_error() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_hlo("HloModule empty\n")
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_hlo("")


def test_an_instruction_over_several_lines() -> None:
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
    """A loop over an 8x8 product; `wide`: limit and step come from outside, through the loop's tuple."""
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
def test_rounds_of_a_loop(text: str, rounds: int) -> None:
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
def test_a_loop_whose_rounds_are_not_known_is_listed(text: str) -> None:
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
def test_flops_of_a_convolution_are_the_products_that_exist(
    left: tuple[int, ...], right: tuple[int, ...], window: str, labels: str, result: tuple[int, ...]
) -> None:
    """Against every triple of places, one by one."""
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


def test_slices_and_updates_inside_a_fusion_count_as_what_they_touch() -> None:
    entry = """%p = f32[100,8]{1,0} parameter(0)
%q = f32[8]{0} parameter(1)
%i = s32[] parameter(2)
%r = f32[100,8]{1,0} parameter(3)
ROOT %f = f32[100,8]{1,0} fusion(%p, %q, %i, %r), kind=kLoop, calls=%fused"""
    # A row of p, q, the index, and a row that is written; r is updated in place.
    assert count_hlo(module(entry, FUSED)).hbm_bytes == 4 * (8 + 8 + 1 + 8)


def test_vmem_and_names_of_values_move_nothing() -> None:
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
    # To VMEM; the product back; a slice read and written, and written again as an update.
    assert counts.hbm_bytes == 4 * (64 + 64 + 2 * 16 + 2 * 16)
    assert [work.kind for work in counts.work.values()] == ["copy", "compute", "compute", "compute"]


def test_an_all_reduce_of_which_a_fusion_keeps_a_slice_is_a_reduce_scatter() -> None:
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


def test_wrappers_of_asynchronous_work() -> None:
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


def test_an_asynchronous_collective_fusion() -> None:
    """As the TPU compiler writes it: a start, a piece beside a product, an end."""
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


def test_what_is_not_counted_is_said() -> None:
    entry = """%x = f32[8,8]{1,0} parameter(0)
%a = f32[8,8]{1,0} custom-call(%x), custom_call_target="AllocateBuffer"
ROOT %y = f32[8,8]{1,0} cholesky(%a), lower=true"""
    counts = count_hlo(module(entry))
    assert len(counts.unexplained) == 1 and "cholesky" in counts.unexplained[0]


def test_a_large_program_is_read_in_seconds() -> None:
    """Not timed: what is slow here would be quadratic, and would not end."""
    rows = "\n".join(f"%v{index} = f32[8]{{0}} add(%v{index - 1}, %v{index - 1})" for index in range(1, 100_000))
    counts = count_hlo(module(f"%v0 = f32[8]{{0}} parameter(0)\n{rows}"))
    assert counts.hbm_bytes == 99_999 * 3 * 32


if __name__ == "__main__":
    compile_programs(sys.argv[1], Path(sys.argv[2]))
