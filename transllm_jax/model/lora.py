"""The parameter split: kinds of variable, and the linear layer that carries a low-rank adapter.

Frozen weights are `nnx.Param`; what trains is an `Adapter` or `NewRows`. Gradients, optimizer state and checkpoints
exist for the last two only (`transllm_jax.model.parameters.split`), so a frozen weight cannot move by accident.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx


class Adapter(nnx.Param):
    """A low-rank factor of LoRA (arXiv 2106.09685), trained in float32."""


class NewRows(nnx.Param):
    """Embedding or output rows of tokens that stage `vocabulary` added, trained in float32."""


@dataclass(frozen=True)
class LoraConfig:
    """LoRA's rank R, its scale alpha / R, and the dropout on the adapter's input (training only)."""

    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """The factor of the adapter's output: alpha / R."""
        return self.alpha / self.rank


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _adapted(x: jax.Array, h: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """x @ w + scale * (h @ a) @ b on [tokens, in]; `w` is frozen and gets no gradient."""
    return x @ w + (h @ (a * scale)) @ b


def _adapted_forward(
    x: jax.Array, h: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    u = h @ (a * scale)
    return x @ w + u @ b, (h, u, w, a, b)


def _adapted_backward(
    scale: float, residuals: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array, jax.Array]:
    h, u, w, a, b = residuals
    # The barrier keeps XLA from fusing the producer of g, with its transposes, into each of the products below:
    # on a CPU that recomputation costs more than the products themselves.
    g = jax.lax.optimization_barrier(g)
    gu = g @ b.T
    return g @ w.T, gu @ (a * scale).T, None, (h.T @ gu) * scale, u.T @ g


_adapted.defvjp(_adapted_forward, _adapted_backward)


class LoRALinear(nnx.Module):
    """y = x @ kernel + scale * (x @ a) @ b, without bias; kernel [in, out], a [in, R], b [R, out].

    With `adapters=False`, or without a `LoraConfig`, exactly x @ kernel: the original layer, bit for bit.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        lora: LoraConfig | None,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
    ) -> None:
        std = features_in**-0.5
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (features_in, features_out), dtype) * std)
        self.lora = lora
        if lora is not None:
            # LoRA's own initialisation: a random, b zero, so that training starts from the original model.
            limit = features_in**-0.5 * 3**0.5
            a = jax.random.uniform(rngs.params(), (features_in, lora.rank), jnp.float32, -limit, limit)
            self.a = Adapter(a)
            self.b = Adapter(jnp.zeros((lora.rank, features_out), jnp.float32))

    def __call__(self, x: jax.Array, *, adapters: bool, dropout: jax.Array | None = None) -> jax.Array:
        """[B, T, in] -> [B, T, out]; `dropout` is a random key, given in training when the rate is not 0."""
        flat = x.reshape(-1, x.shape[-1])
        w = self.kernel[...]
        if self.lora is None or not adapters:
            y = _frozen(flat, w)
        else:
            h = flat
            if dropout is not None and self.lora.dropout:
                keep = jax.random.bernoulli(dropout, 1 - self.lora.dropout, flat.shape)
                h = jnp.where(keep, flat / (1 - self.lora.dropout), 0)
            a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
            y = _adapted(flat, h, w, a, b, self.lora.scale)
        return y.reshape(*x.shape[:-1], -1)


def _frozen(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w with no gradient for w."""
    return x @ jax.lax.stop_gradient(w)
