"""The work of a call of splash attention, from its shapes."""

from __future__ import annotations

from transllm_jax.model.splash import block_sizes, kernel_flops


def splash_flops(
    batch: int, heads: int, length: int, head_dim: int, window: int | None = None, itemsize: int = 2
) -> tuple[int, int]:
    """FLOPs of the matrix products of a call with q [B, N, T, H]: of the forward kernel, and of the backward kernels.

    They compute whole blocks, so half the square and more; key heads make no difference. `itemsize` is that of q, in
    bytes.
    """

    def of(phase: str) -> int:
        shapes = [(batch, heads, length, head_dim)] * 2
        flops = kernel_flops(f"splash_mha_{phase}_segmented_residuals", shapes, window=window, itemsize=itemsize)
        assert flops is not None
        return flops

    fused = block_sizes(length, head_dim, itemsize).fused
    return of("fwd"), sum(map(of, ("dkv",) if fused else ("dkv", "dq")))
