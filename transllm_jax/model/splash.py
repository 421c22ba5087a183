"""Splash attention: Pallas kernels for TPUs, behind the interface of `attention.attend_causally`.

The kernels go through [T, T] in blocks, skip those that the causal mask or the window leaves empty, and never write
scores to memory. `block_sizes` alone chooses the blocks, and they determine what the kernels compute and move:
`kernel_flops` and `kernel_bytes` count it from a compiled program.

What a call looks like in `compiled.as_text()` for a TPU: an attention layer is the forward kernel and, in the backward
pass, one fused kernel, or two if the row is so long that fusing does not pay:

    splash_mha_fwd_segmented_no_residuals  no gradient is taken
    splash_mha_fwd_segmented_residuals     for a backward pass: also gives log-sum-exp, f32[B, N, T, 128]
    splash_mha_dkv_segmented_no_residuals  gradients of k and v; if fused, of q too: bf16[B, T / block, N, T, H]
    splash_mha_dq_segmented_no_residuals   gradient of q, if dkv is not fused

Each is a `custom-call` with `custom_call_target="tpu_custom_call"`. The kernel's name is the instruction's own name
(with a suffix such as `.1`), and occurs twice in the metadata's `op_name`, before `/pallas_call`. The block sizes are
in `frontend_attributes={kernel_metadata={"xprof_metadata":"{...}"}}`. That text contains line breaks, so an instruction
is three lines long. The operands (their shapes are in `operand_layout_constraints={...}`):

    s8[1, i, j], s8[1, i, j]          which block comes next, and which are full, partial or empty
    q [B, N, T, H], k and v [B, K, T, H]
    s32[B, T, 128], s32[B, 8, T]      segment ids of queries and keys (dkv: in the other order)
    dkv and dq only: log-sum-exp f32[B, N, 8, T] (dq: [B, N, 1, T]), output gradient [B, N, T, H], f32 like the first
    s32[T, 128]                       indices of the queries (dkv: s32[8, T])

Inside a shard_map B, N and K are those of one device. With jax 0.10 the first results are scratch buffers of a block.
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

# The hardware's vector registers are LANES wide and SUBLANES high. So blocks are multiples of LANES, and the kernels
# store a number for each token LANES or SUBLANES times.
LANES, SUBLANES = 128, 8
# The blocks below fit the 16 MiB of vector memory of v4 and v5e up to this head size.
LARGEST_HEAD = 256
# MaxText's default block for queries and keys. Smaller blocks skip more, but every block has an overhead.
BLOCK = 512
# In long rows larger blocks skip enough and fetch keys less often. These limits are for heads up to 128 in bfloat16.
LARGEST_QUERY_BLOCK, LARGEST_KEY_BLOCK = 1024, 2048
# The fused backward kernel computes scores once, not twice (5 matrix products per block, not 7), but writes a gradient
# of q for every block of keys, which are summed afterwards. Up to this many blocks of keys that is worth the memory.
MOST_FUSED = 4


def splash_supports(length: int, head_dim: int) -> str | None:
    """None if rows of T tokens and heads of size H can use `attend_splash` on a TPU; else one sentence why not."""
    if length < 1 or length % LANES:
        return f"splash attention needs a length that is a multiple of {LANES}, not {length}"
    if not 1 <= head_dim <= LARGEST_HEAD:
        return f"splash attention is for head sizes up to {LARGEST_HEAD}, not {head_dim}"
    return None


class Blocks(NamedTuple):
    """Block sizes of the kernels, in tokens: multiples of 128 that divide the row's length."""

    queries: int
    keys: int
    # Keys in a block of the backward kernels, and whether these are fused into one.
    backward_keys: int
    fused: bool


def block_sizes(length: int, head_dim: int, itemsize: int = 2) -> Blocks:
    """The blocks in which the kernels go through rows of T tokens, a multiple of 128. Powers of two are best.

    `itemsize` is that of q, in bytes.
    """
    # A head's vector fills whole registers; a block holds half as many vectors of twice the size.
    relative_size = max(1, -(-head_dim // LANES) * itemsize // 2)
    most_queries, most_keys = LARGEST_QUERY_BLOCK // relative_size, LARGEST_KEY_BLOCK // relative_size
    if length <= most_queries and _divisor(length, BLOCK) < BLOCK // 2:
        # One block, rather than many tiny ones.
        queries = keys = length
    else:
        queries = _divisor(length, min(max(BLOCK, length // 4), most_queries))
        keys = _divisor(length, min(max(BLOCK, length // 2), most_keys))
    fused = length // keys <= MOST_FUSED
    return Blocks(queries, queries, keys if fused else queries, fused)


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

    Segment ids are [B, T], 0 for padding, which attends to itself. A query attends to at most `window` keys, its own
    included. The output and its log-sum-exp are named ATTENDED for rematerialisation. `interpret` runs the kernels
    without a TPU. A `jax.shard_map` around it needs `check_vma=False`, because the kernels do not declare how their
    results vary over a mesh. Raises ValueError if T is not a multiple of 128.
    """
    heads, length, size = q.shape[1:]
    if length % LANES:
        raise ValueError(splash_supports(length, size))
    if window is not None and window >= length:
        window = None
    kernel = splash_kernel(heads, length, window, block_sizes(length, size, q.dtype.itemsize), interpret)
    # The kernels do not scale the scores.
    q = (q * size**-0.5).astype(q.dtype)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> Any:
        return kernel(q, k, v, SegmentIds(ids, ids))

    out: jax.Array = jax.vmap(attend)(q, k, v, segment_ids)
    return out.astype(v.dtype)


def kernel_flops(
    kernel_name: str, operand_shapes: Sequence[Sequence[int]], *, window: int | None = None, itemsize: int = 2
) -> int | None:
    """FLOPs of one execution of a custom call in a compiled program; None if it is not a kernel of this module.

    `kernel_name` is the instruction's name or its `op_name`; `operand_shapes` are in the operands' order; `itemsize` is
    that of q, in bytes. `window` is the model's, which the program does not contain.
    """
    cost = _cost_of(kernel_name, operand_shapes, window, itemsize)
    return cost and cost.flops


def kernel_bytes(
    kernel_name: str, operand_shapes: Sequence[Sequence[int]], *, window: int | None = None, itemsize: int = 2
) -> int | None:
    """Bytes that one execution of a custom call reads from and writes to memory; arguments as for `kernel_flops`.

    That is more than the size of its operands and results, because keys are read again for each block of queries that
    attends to them, and less if the compiler keeps an operand in vector memory.
    """
    cost = _cost_of(kernel_name, operand_shapes, window, itemsize)
    return cost and cost.bytes


def visited_blocks(length: int, queries: int, keys: int, window: int | None = None) -> int:
    """How many of a row's blocks of `queries` by `keys` are not skipped: those with at least one unmasked pair."""
    visited = 0
    for start in range(0, length, queries):
        first = 0 if window is None else max(0, start - window + 1)
        visited += (start + queries - 1) // keys - first // keys + 1
    return visited


def _divisor(length: int, most: int) -> int:
    """The largest multiple of LANES that divides a length and is at most `most`."""
    return max(size for size in range(LANES, most + 1, LANES) if length % size == 0)


def _part(block: int) -> int:
    """How many keys of a block are processed at once."""
    part = _divisor(block, BLOCK)
    return part if 2 * part >= BLOCK else block


# Cached by shape: a kernel holds arrays and a function that jit compares by identity, so a new one is compiled again.
@lru_cache(maxsize=64)
def splash_kernel(
    heads: int, length: int, window: int | None, blocks: Blocks, interpret: bool
) -> SplashAttentionKernel:
    """The kernels for rows of T tokens and N query heads: a function of q, k, v and the segment ids of one row."""
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
    # It may be made during a trace and outlives it, so it must hold neither tracers nor arrays on a device.
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
    """Sizes of a call: B, N, K, T, H and the bytes of one element of q."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    itemsize: int


def _cost_of(name: str, operands: Sequence[Sequence[int]], window: int | None, itemsize: int) -> _Cost | None:
    """The cost of a custom call in a compiled program; None if it is not a splash kernel."""
    match = re.search(r"splash_mha_(fwd|dkv|dq)_segmented_(no_)?residuals", name)
    if match is None:
        return None
    # The tables of blocks have rank 3, so q and k are the first two operands of rank 4.
    vectors = [shape for shape in operands if len(shape) == 4]
    # A batch of one row has no axis B. Then q and k have rank 3, too, and follow the two tables.
    q, k = vectors[:2] if vectors else [(1, *shape) for shape in operands if len(shape) == 3][2:4]
    return _cost(match[1], _Shape(q[0], q[1], k[1], q[2], q[3], itemsize), window, residuals=match[2] is None)


def _cost(phase: str, shape: _Shape, window: int | None, *, residuals: bool = True) -> _Cost:
    """The cost of the kernel of a phase (fwd, dkv, dq); `residuals` says whether fwd also gives log-sum-exp.

    Bytes are counted for each row and block: a block moves what it does not share with the block before.
    """
    batch, heads, kv_heads, length, size, itemsize = shape
    blocks = block_sizes(length, size, itemsize)
    queries, keys = blocks.queries, blocks.keys if phase == "fwd" else blocks.backward_keys
    products = {"fwd": 2, "dkv": 5 if blocks.fused else 4, "dq": 3}[phase]
    visited = visited_blocks(length, queries, keys, window)
    flops = 2 * products * batch * heads * visited * queries * keys * size

    # Bytes per token: of one head's vector, and of a number that is stored LANES or SUBLANES times.
    vector, row, column = size * itemsize, 4 * LANES, 4 * SUBLANES
    if phase == "dkv":
        # k, v and their gradients once; q, the output's gradient and four numbers per query for every block of keys.
        moved = 4 * kv_heads * length * vector + length * row
        moved += heads * visited * queries * (2 * vector + 4 * column)
        if blocks.fused:
            moved += length // keys * heads * length * vector
    else:
        # q and the output once; the queries' segment ids and indices for each head, or once if there is only one block.
        per_query = 2 * vector + residuals * row if phase == "fwd" else 3 * vector + 2 * 4
        moved = heads * length * per_query + (heads if length > queries else 1) * length * 2 * row
        # k and v for every block of queries that attends to them; a single block is fetched once for the heads on it.
        moved += (heads * visited * keys if length > keys else kv_heads * length) * 2 * vector
        moved += (heads * visited * keys if length > keys else length) * column
    return _Cost(flops, batch * moved)
