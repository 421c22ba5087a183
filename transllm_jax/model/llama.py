"""LLaMA (arXiv 2302.13971) and its family in Flax NNX: modules declare parameters, plain JAX transforms run them.

The layers are one stacked `Block` (leading axis L), run by `jax.lax.scan`. The caller passes the function that attends,
so training (self-attention under a mask) and decoding (with a cache) share one block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from transllm_jax.choices import Remat
from transllm_jax.model.attention import ATTENDED, attend_causally
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import LINEAR, SINGLE, Layout
from transllm_jax.model.lora import DOWN_PROJECTED, LoraConfig, LoRALinear, project
from transllm_jax.model.rope import rotary_angles, rotate
from transllm_jax.model.vocabulary import Padding, Vocabulary

# q [B, N, T, H], k and v [B, K, T, H] -> attention's output [B, N, T, H] and whatever else the caller wants back.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

# What of a layer the backward pass does not compute again: all of it; nothing; the outputs of its linear layers and of
# attention (the rest costs little beside them); the same without q; without q, k and v; without the feed-forward part.
_KEPT: dict[Remat, tuple[str, ...]] = {
    "projections": (*LINEAR, ATTENDED, DOWN_PROJECTED),
    "queries": ("k", "v", "o", "gate", "up", ATTENDED, DOWN_PROJECTED),
    "feed_forward": ("o", "gate", "up", ATTENDED, DOWN_PROJECTED),
    "attention": ("q", "k", "v", "o", ATTENDED, DOWN_PROJECTED),
    "full": (),
}


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (arXiv 1910.07467), computed in float32 as in transformers."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]; for q and k, over the head size H in place of D."""
        full = x.astype(jnp.float32)
        full = full * jax.lax.rsqrt(jnp.mean(full * full, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * full.astype(x.dtype)


class _DropoutKeys:
    """Each call gives the dropout key for the next input of linear layers in a block; None without dropout."""

    def __init__(self, key: jax.Array | None) -> None:
        self.key, self.count = key, 0

    def __call__(self) -> jax.Array | None:
        self.count += 1
        return None if self.key is None else jax.random.fold_in(self.key, self.count)


@jax.custom_vjp
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up. The backward pass keeps only the two inputs."""
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = residuals
    _, vjp = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    grad_gate, grad_up = vjp(g)
    return grad_gate, grad_up


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class Attention(nnx.Module):
    """Attention with its projections: N query heads and K key heads of size H."""

    def __init__(self, config: LlamaConfig, lora: LoraConfig | None, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        d, h = config.hidden_size, config.head_dim
        n, k = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = h
        linear = _layers(config, lora, rngs, dtype)
        self.q = linear("q", d, n * h)
        self.k = linear("k", d, k * h)
        self.v = linear("v", d, k * h)
        self.o = linear("o", n * h, d)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        attend: Attend,
        *,
        adapters: bool,
        keys: _DropoutKeys,
        layout: Layout,
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> ([B, T, D], the second result of `attend`)."""
        batch, length, _ = x.shape

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)

        ys = project((self.q, self.k, self.v), x, adapters=adapters, dropout=keys(), layout=layout)
        q, k, v = map(heads, ys)
        if layout.platform == "tpu":
            # Without the barrier they are transposed after the conversion to float32: twice the memory and traffic.
            q, k = jax.lax.optimization_barrier((q, k))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out, carried = attend(rotate(q, angles), rotate(k, angles), v)
        out = out.transpose(0, 2, 1, 3).reshape(batch, length, -1)
        return self.o(out, adapters=adapters, dropout=keys(), layout=layout), carried


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, lora: LoraConfig | None, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        d, f = config.hidden_size, config.intermediate_size
        linear = _layers(config, lora, rngs, dtype)
        self.gate = linear("gate", d, f)
        self.up = linear("up", d, f)
        self.down = linear("down", f, d)

    def __call__(self, x: jax.Array, *, adapters: bool, keys: _DropoutKeys, layout: Layout) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        gate, up = project((self.gate, self.up), x, adapters=adapters, dropout=keys(), layout=layout)
        return self.down(_swiglu(gate, up), adapters=adapters, dropout=keys(), layout=layout)


def _layers(
    config: LlamaConfig, lora: LoraConfig | None, rngs: nnx.Rngs, dtype: DTypeLike
) -> Callable[[str, int, int], LoRALinear]:
    """A function that makes a linear layer by name; the config decides on its bias, and `lora` on its adapter."""

    def linear(name: str, features_in: int, features_out: int) -> LoRALinear:
        adapter = lora if lora is not None and name in lora.targets else None
        return LoRALinear(name, features_in, features_out, adapter, bias=name in config.biases, rngs=rngs, dtype=dtype)

    return linear


class Block(nnx.Module):
    """One layer: attention and MLP, each of which reads the normalised residual stream and adds to it."""

    def __init__(
        self,
        config: LlamaConfig,
        lora: LoraConfig | None,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, lora, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, lora, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        attend: Attend,
        *,
        adapters: bool,
        dropout: jax.Array | None = None,
        layout: Layout = SINGLE,
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> ([B, T, D], the second result of `attend`)."""
        keys = _DropoutKeys(dropout)
        normed = self.attention_norm(x)
        attended, carried = self.attention(normed, angles, attend, adapters=adapters, keys=keys, layout=layout)
        x = x + layout.residual(attended)
        return x + layout.residual(self.mlp(self.mlp_norm(x), adapters=adapters, keys=keys, layout=layout)), carried


class Llama(nnx.Module):
    """The whole model: frozen weights, adapters as in `lora`, and `new_rows` trainable vocabulary rows.

    With `train_base` it also has trainable copies of the base vocabulary's rows. `padding`: see `Vocabulary`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        lora: LoraConfig | None = None,
        new_rows: int = 0,
        *,
        train_base: bool = False,
        padding: Padding = (),
        layout: Layout = SINGLE,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.config = config
        self.lora = lora
        self.layout = layout
        self.vocabulary = Vocabulary(
            config, new_rows, train_base=train_base, padding=padding, layout=layout, rngs=rngs, dtype=dtype
        )
        layer_keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.blocks = jax.vmap(lambda key: Block(config, lora, rngs=nnx.Rngs(key), dtype=dtype))(layer_keys)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        adapters: bool = True,
        dropout: jax.Array | None = None,
        remat: Remat = "none",
    ) -> jax.Array:
        """Hidden states of packed rows: ids, positions and segment ids [B, T] (segment 0 is padding) -> [B, T, D].

        `adapters=False` is the original model (new ids still take their new rows). `dropout` is a random key.
        `remat` chooses what the backward pass recomputes: less memory, more time.
        """
        x = self.vocabulary.embed(tokens, adapters=adapters)
        angles = self.angles(positions)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return attend_in(self.layout, q, k, v, segment_ids, self.config.sliding_window), None

        def layer(x: jax.Array, inputs: tuple[Block, jax.Array]) -> tuple[jax.Array, None]:
            block, index = inputs
            key = None if dropout is None else jax.random.fold_in(dropout, index)
            return block(x, angles, attend, adapters=adapters, dropout=key, layout=self.layout)

        x, _ = jax.lax.scan(_recomputed(layer, remat), x, (self.blocks, jnp.arange(self.config.num_hidden_layers)))
        return self.final_norm(x)

    def angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine [B, 1, T, H / 2] of positions [B, T]."""
        config = self.config
        return rotary_angles(
            positions, config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
        )


def attend_in(
    layout: Layout, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None
) -> jax.Array:
    """`attend_causally`, computed by the kernel that the layout chooses.

    Raises ValueError if the layout asks for splash attention and the shapes do not allow it.
    """
    if layout.attention == "plain" or (layout.attention == "auto" and layout.platform != "tpu"):
        return attend_causally(q, k, v, segment_ids, window)
    # Imported here because only TPUs need Pallas.
    from transllm_jax.model.splash import attend_splash, splash_supports

    if reason := splash_supports(q.shape[2], q.shape[3]):
        if layout.attention == "auto":
            return attend_causally(q, k, v, segment_ids, window)
        raise ValueError(reason)

    on_device = partial(attend_splash, window=window, interpret=layout.interpret)
    if layout.mesh is None:
        return on_device(q, k, v, segment_ids)
    heads, rows = PartitionSpec(("data", "fsdp"), "tensor"), PartitionSpec(("data", "fsdp"))
    on_mesh = jax.shard_map(
        on_device, mesh=layout.mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )
    return on_mesh(q, k, v, segment_ids)


def _recomputed(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A layer whose backward pass computes again what `remat` says."""
    if remat not in get_args(Remat):
        raise ValueError(f"remat is {remat!r}; it must be one of {', '.join(get_args(Remat))}")
    if remat == "none":
        return layer
    kept = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat]) if _KEPT[remat] else None
    # The loop over the layers keeps the forward pass apart from the backward pass, so no common value is found in both.
    return jax.checkpoint(layer, policy=kept, prevent_cse=False)
