"""The parameter split: kinds of variable, and the linear layer that carries a low-rank adapter.

Frozen weights are `nnx.Param`; what trains is an `Adapter` or `NewRows`. Gradients, optimizer state and checkpoints
exist only for what a split holds as trainable (`transllm_jax.model.parameters`), so a frozen weight cannot move by
accident. In full fine-tuning all weights are there, as float32 arrays that are rounded where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

# What a linear layer gives, and attention, by a name that rematerialisation can keep it by.
PROJECTION = "projection"


class Adapter(nnx.Param):
    """A low-rank factor of LoRA (arXiv 2106.09685), trained in float32."""


class NewRows(nnx.Param):
    """Embedding or output rows that train, in float32: of new tokens, and trained copies of the base's rows."""


# Every linear layer of a block.
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA's rank R, its alpha, the dropout on the adapter's input (training only), and the layers that have one.

    `rslora` scales by alpha / sqrt(R) in place of alpha / R (arXiv 2312.03732).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = TARGETS

    @property
    def scale(self) -> float:
        """The factor of the adapter's output."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


Arrays = tuple[jax.Array, ...]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _adapted(x: jax.Array, h: jax.Array, ws: Arrays, a_s: Arrays, bs: Arrays, scale: float) -> Arrays:
    """x @ w + scale * (h @ a) @ b for several layers on one input [tokens, in]; each w is frozen, without gradient."""
    return tuple(x @ w + (h @ (a * scale)) @ b for w, a, b in zip(ws, a_s, bs, strict=True))


def _adapted_forward(
    x: jax.Array, h: jax.Array, ws: Arrays, a_s: Arrays, bs: Arrays, scale: float
) -> tuple[Arrays, tuple[Any, ...]]:
    us = tuple(checkpoint_name(h @ (a * scale), PROJECTION) for a in a_s)
    ys = tuple(checkpoint_name(x @ w + u @ b, PROJECTION) for w, u, b in zip(ws, us, bs, strict=True))
    # The input is kept once for all the layers on it, not once a layer.
    return ys, (h, us, ws, a_s, bs)


def _adapted_backward(scale: float, residuals: tuple[Any, ...], gs: Arrays) -> tuple[Any, ...]:
    h, us, ws, a_s, bs = residuals
    # The barrier keeps XLA from fusing the producer of a gradient, with its transposes, into each of the products
    # below: on a CPU that recomputation costs more than the products themselves.
    gs = jax.lax.optimization_barrier(gs)
    slopes = [g @ b.T for g, b in zip(gs, bs, strict=True)]
    to_x = sum(g @ w.T for g, w in zip(gs, ws, strict=True))
    to_h = sum(slope @ (a * scale).T for slope, a in zip(slopes, a_s, strict=True))
    to_a = tuple((h.T @ slope) * scale for slope in slopes)
    to_b = tuple(u.T @ g for u, g in zip(us, gs, strict=True))
    return to_x, to_h, None, to_a, to_b


_adapted.defvjp(_adapted_forward, _adapted_backward)


class LoRALinear(nnx.Module):
    """y = x @ kernel + scale * (x @ a) @ b + bias; kernel [in, out], a [in, R], b [R, out], bias [out] or none.

    With `adapters=False`, or without a `LoraConfig`, exactly the original layer, bit for bit.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        lora: LoraConfig | None,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
    ) -> None:
        std = features_in**-0.5
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (features_in, features_out), dtype) * std)
        self.has_bias = bias
        if bias:
            self.bias = nnx.Param(jnp.zeros((features_out,), dtype))
        self.lora = lora
        if lora is not None:
            # LoRA's own initialisation: a random, b zero, so that training starts from the original model.
            limit = features_in**-0.5 * 3**0.5
            a = jax.random.uniform(rngs.params(), (features_in, lora.rank), jnp.float32, -limit, limit)
            self.a = Adapter(a)
            self.b = Adapter(jnp.zeros((lora.rank, features_out), jnp.float32))

    def __call__(self, x: jax.Array, *, adapters: bool, dropout: jax.Array | None = None) -> jax.Array:
        """[B, T, in] -> [B, T, out]; see `project`."""
        return project((self,), x, adapters=adapters, dropout=dropout)[0]


def project(
    layers: Sequence[LoRALinear], x: jax.Array, *, adapters: bool, dropout: jax.Array | None = None
) -> list[jax.Array]:
    """Several layers on one input, [B, T, in] -> [B, T, out] each.

    `dropout` is a random key, given in training when the rate is not 0; the layers share what is dropped.
    """
    flat = x.reshape(-1, x.shape[-1])
    lora = next((layer.lora for layer in layers if layer.lora is not None), None) if adapters else None
    adapted = [layer for layer in layers if lora is not None and layer.lora is not None]
    plain = [layer for layer in layers if lora is None or layer.lora is None]
    ys = {id(layer): checkpoint_name(flat @ layer.kernel[...].astype(x.dtype), PROJECTION) for layer in plain}
    if lora is not None:
        h = flat
        if dropout is not None and lora.dropout:
            keep = jax.random.bernoulli(dropout, 1 - lora.dropout, flat.shape)
            h = jnp.where(keep, flat / (1 - lora.dropout), 0)
        ws = tuple(layer.kernel[...] for layer in adapted)
        a_s = tuple(layer.a[...].astype(x.dtype) for layer in adapted)
        bs = tuple(layer.b[...].astype(x.dtype) for layer in adapted)
        outputs = _adapted(flat, h, ws, a_s, bs, lora.scale)
        ys |= {id(layer): y for layer, y in zip(adapted, outputs, strict=True)}
    return [_with_bias(layer, ys[id(layer)]).reshape(*x.shape[:-1], -1) for layer in layers]


def _with_bias(layer: LoRALinear, y: jax.Array) -> jax.Array:
    return y + layer.bias[...].astype(y.dtype) if layer.has_bias else y
