"""The counter of compiled programs: known results for XLA's compilers for the CPU and, with libtpu, for TPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import hlo_programs
import pytest
from hlo_programs import INNER, LAYERS, LINKS, ROUNDS, ROWS, D, F, K, M, N, T, V

from transllm_jax.preflight.program.hlo import Counts, CustomCall, count_hlo

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
    command = [sys.executable, hlo_programs.__file__, request.param, str(out)]
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
        # Two products forward, the same again when recomputed, and two gradients of each.
        ("checkpointed", ROUNDS * (2 + 2 + 4) * 2 * M * K * K),
        # The larger branch, with two products.
        ("conditional", 2 * 2 * M * M * M),
        ("batched", 2 * 2 * 4 * M * M * 128),
        ("collectives", ROUNDS * 2 * 2 * 128 * K * K),
    ],
)
def test_flops_are_counted(programs: tuple[str, Path], name: str, flops: int) -> None:
    counts = counted(programs, name)
    assert counts.flops == flops
    assert counts.flops_by_dtype == {"f32" if programs[0] == "cpu" else "bf16": flops}


def test_flops_of_a_sharded_step(programs: tuple[str, Path]) -> None:
    """The TPU compiler turns these products into windowed convolutions in loops with permutes."""
    tokens = ROWS * T
    forward = 2 * tokens * (4 * D * D + 3 * D * F) + 4 * tokens * T * D
    # The backward pass does not recompute the last product of a layer.
    layer = 4 * forward - 2 * tokens * D * F
    assert counted(programs, "step").flops == LAYERS * layer + 3 * 2 * tokens * D * V


def test_traffic_of_a_product_and_a_scan(programs: tuple[str, Path]) -> None:
    assert counted(programs, "product").hbm_bytes == item(programs) * (M * K + K * N + M * N)
    moved = counted(programs, "scan").hbm_bytes
    weights, rows = item(programs) * ROUNDS * K * K, item(programs) * M * K
    # Each round reads one slice of the weights, never all. On the CPU the slice and the rows between the rounds are
    # written and read a few times, too.
    assert weights + 2 * rows <= moved <= 3 * weights + 10 * ROUNDS * rows
    if programs[0] != "cpu":
        # The rows stay in VMEM between the rounds.
        assert moved <= weights + 3 * rows


def test_collectives_in_a_loop_count_each_round(programs: tuple[str, Path]) -> None:
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
        # There a reduce-scatter of this size is an all-reduce and a slice.
        assert kinds["all-reduce"] == (2 * ROUNDS, 2 * ROUNDS * block, summed + ROUNDS * 2 * share * block)
    gathers = [found for found in counts.collectives.values() if found.kind == "all-gather"]
    assert gathers[0].groups[1] == tuple(range(LINKS, 2 * LINKS))
    assert "all_gather" in gathers[0].op_name
    permute = next(found for found in counts.collectives.values() if found.pairs)
    assert permute.pairs[:2] == ((0, 1), (1, 2)) and permute.groups[0] == tuple(range(LINKS))
    assert permute.asynchronous == (programs[0] != "cpu")
    assert counts.link_bytes == pytest.approx(
        sum(kind[2] for kind in kinds.values()), rel=1e-12
    )  # another order of the sum


def test_a_collective_across_fusions_counts_once(programs: tuple[str, Path]) -> None:
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
