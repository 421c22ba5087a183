"""The kinds of variable in the parameter split, and the linear layer with a low-rank adapter.

Frozen weights are `nnx.Param`; trainable ones are `Adapter` or `NewRows`. Gradients, optimizer state and checkpoints
exist only for the trainable part of a split (`transllm_jax.model.parameters`), so a frozen weight cannot change by
accident. In full fine-tuning all weights are trainable: float32 arrays that are rounded where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from transllm_jax.model.layout import LINEAR, SINGLE, Layout, sum_scattered

# Checkpoint names, by which rematerialisation can save a value: a linear layer's output has the layer's own name, and
# the output of the first factor of its adapter has this one.
DOWN_PROJECTED = "adapter"


class Adapter(nnx.Param):
    """A low-rank factor of LoRA (arXiv 2106.09685), trained in float32."""


class NewRows(nnx.Param):
    """Trainable embedding or output rows, in float32: those of new tokens, and copies of the base's rows."""


# The most devices of a ring whose rounds are unrolled; the rounds of a larger ring are a loop.
_UNROLLED = 16

# Every linear layer of a block.
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA's rank R and alpha, the dropout rate of an adapter's input (training only), and the layers with an adapter.

    `rslora` scales by alpha / sqrt(R) in place of alpha / R (arXiv 2312.03732).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = TARGETS

    @property
    def scale(self) -> float:
        """The factor that an adapter's output is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


Arrays = tuple[jax.Array, ...]


class _AdaptedLayers(NamedTuple):
    """Several layers on one input: their names, the scale and dropout of their adapters, and the arrays' layout."""

    names: tuple[str, ...]
    scale: float
    dropout: float
    layout: Layout

    def dropped(self, x: jax.Array, keep: jax.Array | None) -> jax.Array:
        """x with dropout: 0 where `keep` is false, and the rest scaled up so that the mean stays. None: x itself."""
        return x if keep is None else jnp.where(keep, x * (256 / (256 - _dropped_of_256(self.dropout))), 0)

    def gathered(self, ws: Arrays, a_s: Arrays, bs: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        """The parameters as the products use them: gathered from the devices that store their parts."""
        use, axes = self.layout.gathered, [LINEAR[name] for name in self.names]
        return (
            tuple(use(w, inner, outer) for w, (inner, outer) in zip(ws, axes, strict=True)),
            tuple(use(a, f"{inner}_adapter", "rank") for a, (inner, _) in zip(a_s, axes, strict=True)),
            tuple(use(b, "rank", f"{outer}_adapter") for b, (_, outer) in zip(bs, axes, strict=True)),
        )

    def gradients(self, h: jax.Array, us: Arrays, grad_us: Arrays, gs: Arrays) -> tuple[Arrays, Arrays]:
        """Gradients of the factors, cut over the mesh as the factors are stored.

        h [tokens, in]; u and its gradient `grad_u` [tokens, R]; g [tokens, out], the gradient of the output.
        """
        layout = self.layout
        if layout.mesh is None or layout.stationary:
            return _products(h, us, grad_us, gs, self.scale)
        inner, outers = LINEAR[self.names[0]][0], [LINEAR[name][1] for name in self.names]
        states, narrow = layout.tokens_spec(inner), layout.tokens_spec(None)
        wide = tuple(layout.tokens_spec(outer) for outer in outers)
        stored = (
            tuple(layout.stored_spec(f"{inner}_adapter", "rank") for _ in outers),
            tuple(layout.stored_spec("rank", f"{outer}_adapter") for outer in outers),
        )

        def device(h: jax.Array, us: Arrays, grad_us: Arrays, gs: Arrays) -> tuple[Arrays, Arrays]:
            grad_a, grad_b = _products(h, us, grad_us, gs, self.scale)
            parts = [layout.parts(a, inner) for a in grad_a]
            # Transposed, so that the long side is first, as in the other factor.
            parts += [layout.parts(b.T, outer) for b, outer in zip(grad_b, outers, strict=True)]
            # One sum for all of them, because a ring has many rounds.
            ends = np.cumsum([part.shape[1] for part in parts])[:-1].tolist()
            together = jnp.concatenate(parts, axis=1)
            summed = jax.lax.psum(sum_scattered(together, ("fsdp",), unroll=len(together) <= _UNROLLED), "data")
            sums = jnp.split(summed, ends)
            return tuple(sums[: len(grad_a)]), tuple(own.T for own in sums[len(grad_a) :])

        return jax.shard_map(
            device,
            mesh=layout.mesh,
            in_specs=(states, (narrow,) * len(us), (narrow,) * len(us), wide),
            out_specs=stored,
            check_vma=False,
        )(h, us, grad_us, gs)


def _products(h: jax.Array, us: Arrays, grad_us: Arrays, gs: Arrays, scale: float) -> tuple[Arrays, Arrays]:
    return tuple((h.T @ grad_u) * scale for grad_u in grad_us), tuple(u.T @ g for u, g in zip(us, gs, strict=True))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _adapted(
    x: jax.Array, keep: jax.Array | None, ws: Arrays, a_s: Arrays, bs: Arrays, group: _AdaptedLayers
) -> Arrays:
    """x @ w + scale * (h @ a) @ b for several layers on one input [tokens, in]; every w is frozen and gets no gradient.

    h is x after dropout.
    """
    ws, a_s, bs = group.gathered(ws, a_s, bs)
    h = group.dropped(x, keep)
    return tuple(x @ w + (h @ (a * group.scale)) @ b for w, a, b in zip(ws, a_s, bs, strict=True))


def _adapted_forward(
    x: jax.Array, keep: jax.Array | None, ws: Arrays, a_s: Arrays, bs: Arrays, group: _AdaptedLayers
) -> tuple[Arrays, tuple[Any, ...]]:
    # Saved for the backward pass are the parameters as they are stored, not the gathered ones.
    stored = ws, a_s, bs
    ws, a_s, bs = group.gathered(ws, a_s, bs)
    h = group.dropped(x, keep)
    us = tuple(checkpoint_name(h @ (a * group.scale), DOWN_PROJECTED) for a in a_s)
    ys = tuple(checkpoint_name(x @ w + u @ b, name) for name, w, u, b in zip(group.names, ws, us, bs, strict=True))
    # The layers share the input, so it is saved only once.
    return ys, (x, keep, us, *stored)


def _adapted_backward(group: _AdaptedLayers, residuals: tuple[Any, ...], gs: Arrays) -> tuple[Any, ...]:
    x, keep, us, ws, a_s, bs = residuals
    ws, a_s, bs = group.gathered(ws, a_s, bs)
    # The barrier keeps XLA from fusing the operation that makes a gradient, with its transposes, into each of the
    # products below: on a CPU that recomputation costs more than the products themselves.
    if group.layout.platform == "cpu":
        gs = jax.lax.optimization_barrier(gs)
    grad_us = tuple(g @ b.T for g, b in zip(gs, bs, strict=True))
    grad_x = sum(g @ w.T for g, w in zip(gs, ws, strict=True))
    grad_h: Any = sum(grad_u @ (a * group.scale).T for grad_u, a in zip(grad_us, a_s, strict=True))
    grad_x += group.dropped(grad_h, keep)
    grad_a, grad_b = group.gradients(group.dropped(x, keep), us, grad_us, gs)
    return grad_x, None, None, grad_a, grad_b


_adapted.defvjp(_adapted_forward, _adapted_backward)


class LoRALinear(nnx.Module):
    """y = x @ kernel + scale * (x @ a) @ b + bias; kernel [in, out], a [in, R], b [R, out], bias [out] or none.

    With `adapters=False`, or without a `LoraConfig`, it is the original layer, bit for bit.
    """

    def __init__(
        self,
        name: str,
        features_in: int,
        features_out: int,
        lora: LoraConfig | None,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.name = name
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

    def __call__(
        self, x: jax.Array, *, adapters: bool, dropout: jax.Array | None = None, layout: Layout = SINGLE
    ) -> jax.Array:
        """[B, T, in] -> [B, T, out]; see `project`."""
        return project((self,), x, adapters=adapters, dropout=dropout, layout=layout)[0]


def project(
    layers: Sequence[LoRALinear],
    x: jax.Array,
    *,
    adapters: bool,
    dropout: jax.Array | None = None,
    layout: Layout = SINGLE,
) -> list[jax.Array]:
    """Several layers on one input, [B, T, in] -> [B, T, out] each.

    `dropout` is a random key, given in training if the rate is not 0; all layers drop the same values.
    """
    inner, outer = LINEAR[layers[0].name]
    x = layout.whole_rows(x) if inner == "embed" else layout.constrain(x, "batch", None, inner)
    flat = x.reshape(-1, x.shape[-1])
    lora = next((layer.lora for layer in layers if layer.lora is not None), None) if adapters else None
    adapted = [layer for layer in layers if lora is not None and layer.lora is not None]
    plain = [layer for layer in layers if lora is None or layer.lora is None]
    ys = {}
    for layer in plain:
        kernel = layout.gathered(layer.kernel[...].astype(x.dtype), *LINEAR[layer.name])
        ys[id(layer)] = checkpoint_name(flat @ kernel, layer.name)
    if lora is not None:
        keep = None
        if dropout is not None and lora.dropout:
            if layout.platform != "cpu":
                # Without the barrier all masks of a layer are drawn at its beginning and kept until they are needed.
                dropout, flat = jax.lax.optimization_barrier((dropout, flat))
            keep = _dropout_mask(dropout, x.shape, lora.dropout).reshape(flat.shape)
        ws = tuple(layer.kernel[...] for layer in adapted)
        a_s = tuple(layer.a[...].astype(x.dtype) for layer in adapted)
        bs = tuple(layer.b[...].astype(x.dtype) for layer in adapted)
        group = _AdaptedLayers(tuple(layer.name for layer in adapted), lora.scale, lora.dropout, layout)
        adapted_ys = _adapted(flat, keep, ws, a_s, bs, group)
        ys |= {id(layer): y for layer, y in zip(adapted, adapted_ys, strict=True)}
    outputs = [_with_bias(layer, ys[id(layer)]).reshape(*x.shape[:-1], -1) for layer in layers]
    # The outputs of o and down are sums over `tensor`; the caller decides where they go.
    return outputs if outer == "embed" else [layout.constrain(y, "batch", None, outer) for y in outputs]


def _dropped_of_256(rate: float) -> int:
    """A dropout rate in 256ths, at least 1."""
    return max(1, round(256 * rate))


def _dropout_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """The dropout mask of a shape [B, T, in], bool: true for values that are kept.

    Drawing random numbers takes most of the time, so each is split into four bytes, for four parts of the length.
    """
    batch, length, size = shape
    drawn = jax.random.bits(key, (batch, -(-length // 4), size), jnp.uint32)
    parts = [((drawn >> shift) & 0xFF) >= _dropped_of_256(rate) for shift in (0, 8, 16, 24)]
    return jnp.concatenate(parts, axis=1)[:, :length]


def _with_bias(layer: LoRALinear, y: jax.Array) -> jax.Array:
    return y + layer.bias[...].astype(y.dtype) if layer.has_bias else y
