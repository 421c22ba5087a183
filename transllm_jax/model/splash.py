"""Splash attention: Pallas kernels for TPUs, behind the interface of `attention.attend_causally`.

The kernels go through [T, T] in blocks, skip those that the causal mask or the window leaves empty, and never write
scores to memory. `block_sizes` is the one place that chooses the blocks; what the kernels compute and move follows
from it: `kernel_flops` and `kernel_bytes` tell it of a compiled program.

How a call looks in `compiled.as_text()` for a TPU. An attention layer is the forward kernel, and in the backward pass
one fused kernel, or two where the row is so long that fusing does not pay:

    splash_mha_fwd_segmented_no_residuals  no gradient is taken
    splash_mha_fwd_segmented_residuals     for a backward pass: gives log-sum-exp too, f32[B, N, T, 128]
    splash_mha_dkv_segmented_no_residuals  gradients of k and v; fused, of q too: bf16[B, T / block, N, T, H]
    splash_mha_dq_segmented_no_residuals   gradient of q, where dkv is not fused

Each is a `custom-call` with `custom_call_target="tpu_custom_call"`. The kernel's name is the instruction's own name
(with a suffix such as `.1`), and stands twice in the metadata's `op_name`, before `/pallas_call`. The block sizes stand
in `frontend_attributes={kernel_metadata={"xprof_metadata":"{...}"}}`. That text has line breaks in it, so an
instruction is three lines long. The operands (their shapes stand in `operand_layout_constraints={...}`):

    s8[1, i, j], s8[1, i, j]          which block comes next, and which are full, partial or empty
    q [B, N, T, H], k and v [B, K, T, H]
    s32[B, T, 128], s32[B, 8, T]      segment ids of queries and keys (dkv: the other way round)
    dkv and dq only: log-sum-exp f32[B, N, 8, T] (dq: [B, N, 1, T]), output gradient [B, N, T, H], f32 like the first
    s32[T, 128]                       places of the queries (dkv: s32[8, T])

Inside a shard_map B, N and K are those of one device. With jax 0.10 the results begin with scratch buffers of a block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel

from transllm_jax.model.attention import ATTENDED

# The hardware's vector registers are LANES wide and SUBLANES high: blocks are multiples of LANES, and the kernels keep
# a number a row LANES or SUBLANES times.
LANES, SUBLANES = 128, 8
# The blocks below fit the 16 MiB of vector memory of v4 and v5e up to this head size.
LARGEST_HEAD = 256
# MaxText's default block for queries and keys. Smaller ones skip more, but each block also costs time of its own.
BLOCK = 512
# Long rows skip enough with larger blocks, and fetch keys less often. These are for heads up to 128 in bfloat16.
LARGEST_QUERY_BLOCK, LARGEST_KEY_BLOCK = 1024, 2048
# The fused backward kernel computes scores once, not twice (5 matrix products a block, not 7), but writes a gradient of
# q for every block of keys, to be summed after. Up to this many it is worth the memory.
MOST_FUSED = 4


def splash_supports(length: int, head_dim: int) -> str | None:
    """None where rows of T tokens and heads of size H can use `attend_splash` on a TPU; else one sentence why not."""
    if length < 1 or length % LANES:
        return f"splash attention needs a length that is a multiple of {LANES}, not {length}"
    if not 1 <= head_dim <= LARGEST_HEAD:
        return f"splash attention is for head sizes up to {LARGEST_HEAD}, not {head_dim}"
    return None


class Blocks(NamedTuple):
    """Block sizes of the kernels, in tokens: multiples of 128 that divide the row's length."""

    queries: int
    keys: int
    # Keys a block of the backward kernels, and whether these are one.
    backward_keys: int
    fused: bool


def block_sizes(length: int, head_dim: int, itemsize: int = 2) -> Blocks:
    """The blocks in which the kernels go through rows of T tokens, a multiple of 128. Powers of two are best.

    `itemsize` is that of q, in bytes.
    """
    # A vector fills whole registers. Twice as large a vector, half as many in a block.
    share = max(1, -(-head_dim // LANES) * itemsize // 2)
    most_queries, most_keys = LARGEST_QUERY_BLOCK // share, LARGEST_KEY_BLOCK // share
    if length <= most_queries and _divisor(length, BLOCK) < BLOCK // 2:
        # Whole, rather than in splinters.
        side = keys = length
    else:
        side = _divisor(length, min(max(BLOCK, length // 4), most_queries))
        keys = _divisor(length, min(max(BLOCK, length // 2), most_keys))
    fused = length // keys <= MOST_FUSED
    return Blocks(side, side, keys if fused else side, fused)


def attend_splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    window: int | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attention.attend_causally` in Pallas kernels: q [B, N, T, H], k and v [B, K, T, H] -> [B, N, T, H] in v's dtype.

    Segment ids [B, T], 0 for padding, which attends to itself. `window` is how many keys a query sees at most, its own
    among them. The output and its log-sum-exp are named ATTENDED for rematerialisation. `interpret` runs the kernels
    where there is no TPU. A `jax.shard_map` around it needs `check_vma=False`: the kernels do not say how their results
    vary over a mesh. Raises ValueError for a length that is no multiple of 128.
    """
    heads, length, size = q.shape[1:]
    if length % LANES:
        raise ValueError(splash_supports(length, size))
    if window is not None and window >= length:
        window = None
    kernel = splash_kernel(heads, length, window, block_sizes(length, size, q.dtype.itemsize), interpret)
    # The kernels do not scale.
    q = (q * size**-0.5).astype(q.dtype)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> Any:
        return kernel(q, k, v, SegmentIds(ids, ids))

    out: jax.Array = jax.vmap(attend)(q, k, v, segment_ids)
    return out.astype(v.dtype)


def kernel_flops(
    kernel_name: str, operand_shapes: Sequence[Sequence[int]], *, window: int | None = None, itemsize: int = 2
) -> int | None:
    """FLOPs of one execution of a custom call in a compiled program; None where it is no kernel of this module.

    `kernel_name` is the instruction's name or its `op_name`; `operand_shapes` are in the operands' order; `itemsize` is
    that of q, in bytes. The window is the model's: a program does not tell it.
    """
    cost = _cost_of(kernel_name, operand_shapes, window, itemsize)
    return cost and cost.flops


def kernel_bytes(
    kernel_name: str, operand_shapes: Sequence[Sequence[int]], *, window: int | None = None, itemsize: int = 2
) -> int | None:
    """As `kernel_flops`, the bytes that a custom call reads from and writes to memory.

    More than its operands and results have, as keys are read again for each block of queries that sees them; less where
    the compiler has put an operand into vector memory.
    """
    cost = _cost_of(kernel_name, operand_shapes, window, itemsize)
    return cost and cost.bytes


def visited_blocks(length: int, queries: int, keys: int, window: int | None = None) -> int:
    """How many of a row's blocks of `queries` by `keys` are not skipped: one of their pairs is seen at least."""
    visited = 0
    for start in range(0, length, queries):
        first = 0 if window is None else max(0, start - window + 1)
        visited += (start + queries - 1) // keys - first // keys + 1
    return visited


def _divisor(length: int, most: int) -> int:
    """The largest multiple of LANES that divides a length and is at most `most`."""
    return max(size for size in range(LANES, most + 1, LANES) if length % size == 0)


def _part(block: int) -> int:
    """How many keys of a block are computed at once."""
    part = _divisor(block, BLOCK)
    return part if 2 * part >= BLOCK else block


# A kernel holds arrays and a function that jit compares by identity: one a shape, or each layer is compiled anew.
@lru_cache(maxsize=64)
def splash_kernel(
    heads: int, length: int, window: int | None, blocks: Blocks, interpret: bool
) -> SplashAttentionKernel:
    """The kernels of rows of T tokens with N query heads: a function of q, k, v and the segment ids of one row."""
    square = (length, length)
    mask = CausalMask(square) if window is None else LocalMask(square, (window - 1, 0), 0)
    sizes = BlockSizes(
        block_q=blocks.queries,
        block_kv=blocks.keys,
        block_kv_compute=_part(blocks.keys),
        block_q_dkv=blocks.queries,
        block_kv_dkv=blocks.backward_keys,
        block_kv_dkv_compute=_part(blocks.backward_keys),
        block_q_dq=None if blocks.fused else blocks.queries,
        block_kv_dq=None if blocks.fused else blocks.backward_keys,
        use_fused_bwd_kernel=blocks.fused,
    )
    # It may be made while something is traced, and outlives the trace: no tracers in it, and nothing of a device.
    with jax.ensure_compile_time_eval():
        kernel = make_splash_mha_single_device(
            MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            residual_checkpoint_name=ATTENDED,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


class _Cost(NamedTuple):
    """FLOPs of the matrix products, and bytes read from and written to memory."""

    flops: int
    bytes: int


class _Shape(NamedTuple):
    """Sizes of a call: B, N, K, T, H and the bytes of a number of q."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    itemsize: int


def _cost_of(name: str, operands: Sequence[Sequence[int]], window: int | None, itemsize: int) -> _Cost | None:
    """The cost of a custom call in a compiled program; None where it is no splash kernel."""
    match = re.search(r"splash_mha_(fwd|dkv|dq)_segmented_(no_)?residuals", name)
    if match is None:
        return None
    # Tables of blocks come before, of rank 3: q and k are the first two of rank 4.
    vectors = [shape for shape in operands if len(shape) == 4]
    # A batch of one row is no axis of its own; then they stand behind the two tables.
    q, k = vectors[:2] if vectors else [(1, *shape) for shape in operands if len(shape) == 3][2:4]
    return _cost(match[1], _Shape(q[0], q[1], k[1], q[2], q[3], itemsize), window, residuals=match[2] is None)


def _cost(phase: str, shape: _Shape, window: int | None, *, residuals: bool = True) -> _Cost:
    """What the kernel of a phase (fwd, dkv, dq) costs; `residuals` is whether fwd gives log-sum-exp.

    Bytes are counted by row and block: what a block does not share with the one before is fetched or written.
    """
    batch, heads, kv_heads, length, size, itemsize = shape
    blocks = block_sizes(length, size, itemsize)
    queries, keys = blocks.queries, blocks.keys if phase == "fwd" else blocks.backward_keys
    products = {"fwd": 2, "dkv": 5 if blocks.fused else 4, "dq": 3}[phase]
    visited = visited_blocks(length, queries, keys, window)
    flops = 2 * products * batch * heads * visited * queries * keys * size

    # A token's bytes: of a vector of a head, and of a number that is kept a whole row of registers, or a column of one.
    vector, row, column = size * itemsize, 4 * LANES, 4 * SUBLANES
    if phase == "dkv":
        # k, v and their gradients once; q, the output's gradient and the numbers of each for every block of keys.
        moved = 4 * kv_heads * length * vector + length * row
        moved += heads * visited * queries * (2 * vector + 4 * column)
        if blocks.fused:
            moved += length // keys * heads * length * vector
    else:
        # q and the output once, with the queries' ids and places a head (as long as there are several blocks of them).
        own = 2 * vector + residuals * row if phase == "fwd" else 3 * vector + 2 * 4
        moved = heads * length * own + (heads if length > queries else 1) * length * 2 * row
        # k and v for every block of queries that sees them; heads that share a single block share its fetch.
        moved += (heads * visited * keys if length > keys else kv_heads * length) * 2 * vector
        moved += (heads * visited * keys if length > keys else length) * column
    return _Cost(flops, batch * moved)
