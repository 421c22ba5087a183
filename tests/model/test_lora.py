"""Adapted layers: their gradients and their dropout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx
from gradient_checks import outputs_and_gradients, require_near
from tiny_splits import LORA, NEW, VOCAB, random_trainable, trained_split, whole_rows

from transllm_jax.model.lora import LoraConfig, LoRALinear, project
from transllm_jax.model.parameters import assemble, merge


def test_dropout_depends_on_its_key() -> None:
    config = tiny_config(VOCAB)
    split = trained_split(config)
    undropped = assemble(
        config, split.frozen, lora=replace(LORA, dropout=0.0), trainable=random_trainable(config, LORA, NEW)
    )
    rows = tuple(map(jnp.asarray, whole_rows()))

    @partial(jax.jit, static_argnames="structure")
    def hidden(structure: Any, trainable: Any, frozen: Any, key: Any) -> jax.Array:
        return merge(structure, trainable, frozen)(*rows, dropout=key)

    plain = hidden(*split, None)
    one, same, other = (hidden(*split, jax.random.key(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert np.abs(one - plain).max() > 0.01 and np.abs(one - other).max() > 0.01
    # At rate 0 a key changes nothing.
    assert np.array_equal(hidden(*undropped, jax.random.key(1)), plain)


def layer_of(lora: LoraConfig, parts: Mapping[str, jax.Array]) -> LoRALinear:
    """A linear layer that holds the given kernel, a and b."""
    shapes = parts["kernel"].shape
    structure, _ = nnx.split(LoRALinear("up", *shapes, lora, rngs=nnx.Rngs(0)))
    layer: LoRALinear = nnx.merge(structure, dict(parts))
    return layer


@pytest.mark.parametrize("dropped", [False, True], ids=["no dropout", "dropout"])
def test_gradients_of_adapted_layers_match_the_formula(dropped: bool) -> None:
    rate, size_in, sizes_out = 0.25, 8, (6, 5, 5)
    lora = LoraConfig(rank=3, alpha=7.5, dropout=rate)
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x = drawn(4, 50, size_in)
    layers = [{"kernel": drawn(size_in, size), "a": drawn(size_in, 3), "b": drawn(3, size)} for size in sizes_out]
    kernels = [layer.pop("kernel") for layer in layers]
    key = jax.random.key(1) if dropped else None

    # With identities for a and b and a kernel of zeros, the output is the adapter's input.
    eye = jnp.eye(size_in)
    open_layer = layer_of(LoraConfig(size_in, size_in, rate), {"kernel": 0 * eye, "a": eye, "b": eye})
    given = np.asarray(open_layer(x, adapters=True, dropout=key))
    kept = given != 0
    factor = kept / (1 - rate) if dropped else np.ones(x.shape, np.float32)
    assert np.allclose(given, x * factor, atol=1e-6)
    assert abs(kept.mean() - (1 - rate if dropped else 1)) < 0.04

    def ours(x: jax.Array, layers: Any, kernels: Any) -> list[jax.Array]:
        modules = [layer_of(lora, {"kernel": w, **layer}) for w, layer in zip(kernels, layers, strict=True)]
        return project(modules, x, adapters=True, dropout=key)

    def formula(x: jax.Array, layers: Any, kernels: Any) -> list[jax.Array]:
        return [
            x @ w + lora.alpha / lora.rank * ((x * factor) @ layer["a"]) @ layer["b"]
            for w, layer in zip(kernels, layers, strict=True)
        ]

    outputs, (of_x, of_layers, of_kernels) = outputs_and_gradients(ours, x, layers, kernels)
    assert not any(np.asarray(slope).any() for slope in of_kernels), "kernels beside adapters are frozen"
    wanted, (*slopes, _) = outputs_and_gradients(formula, x, layers, kernels)
    require_near((outputs, of_x, of_layers), (wanted, *slopes))

    def switched_off(x: jax.Array, layers: Any, kernels: Any) -> list[jax.Array]:
        modules = [layer_of(lora, {"kernel": w, **layer}) for w, layer in zip(kernels, layers, strict=True)]
        return project(modules, x, adapters=False, dropout=key)

    outputs, (of_x, of_layers, of_kernels) = outputs_and_gradients(switched_off, x, layers, kernels)
    assert not any(np.asarray(slope).any() for slope in jax.tree.leaves(of_layers))
    # Without adapters a kernel may train.
    wanted, slopes = outputs_and_gradients(lambda x, kernels: [x @ w for w in kernels], x, kernels)
    require_near((outputs, of_x, of_kernels), (wanted, *slopes))


@pytest.mark.parametrize(
    ("rate", "dropped"), [(0.5, 128), (0.2, 51), (0.05, 13), (1e-6, 1)], ids=["half", "rounded", "small", "not 0"]
)
def test_dropout_rounds_its_rate_to_256ths_and_keeps_the_mean(rate: float, dropped: int) -> None:
    """Four values come from one random number, so the length is not a multiple of four."""
    eye = jnp.eye(64)
    layer = layer_of(LoraConfig(64, 64, rate), {"kernel": 0 * eye, "a": eye, "b": eye})
    out = np.asarray(layer(jnp.ones((4, 402, 64)), adapters=True, dropout=jax.random.key(3)))
    assert set(np.unique(out)) == {0, np.float32(256 / (256 - dropped))}
    share = dropped / 256
    for part in np.split(out[:, :400], 4, axis=1):
        # Five standard deviations of the mean.
        assert abs((part == 0).mean() - share) < 5 * (share / part.size) ** 0.5
    # Two parts drop independently.
    first, second = (part == 0 for part in np.split(out[:, :202], 2, axis=1))
    assert abs((first & second).mean() - share**2) < 5 * share / first.size**0.5
