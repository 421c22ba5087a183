"""Trainings on every mesh: one device's losses, gradients and arrays, and each device holds its part and no more."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import jax
import numpy as np
import pytest
from meshes import GROUPED, LORA, NEW, PLAIN, ROWS, VOCAB, Case, Shape, Trained, factorisations, layout_of, train

from transllm_jax.choices import Remat
from transllm_jax.model.layout import AXES, SINGLE, partition
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import BASE_ROWS
from transllm_jax.training.recovery import Teaching


def _on(*targets: str) -> LoraConfig:
    """LoRA on some layers: fewer are compiled sooner."""
    return replace(LORA, targets=targets)


CASES = {
    "new rows": Case(),
    "in parts": Case(accumulate=2, remat="none"),
    "tied, grouped": Case(
        replace(GROUPED, tie_word_embeddings=True), _on("k", "v", "o", "up"), accumulate=2, remat="full"
    ),
    "base rows": Case(
        lora=_on("o", "gate"),
        train_base=True,
        remat="attention",
        teaching=Teaching(("sequence", "token", "both"), ROWS, VOCAB + 2),
    ),
    "full": Case(
        replace(PLAIN, attention_bias=True, mlp_bias=True), None, accumulate=2, remat="feed_forward", full=True
    ),
    "qwen2": Case(
        replace(PLAIN, model_type="qwen2", attention_bias=True, tie_word_embeddings=True),
        _on("q", "down"),
        remat="queries",
        teaching=Teaching(("sequence", "token", "sequence"), ROWS // 2, VOCAB + 2),
    ),
    "qwen3": Case(replace(GROUPED, model_type="qwen3"), _on("q", "k", "gate", "up"), remat="full"),
}
# Each case meets each axis, and each mesh is met.
MESHES: dict[str, list[Shape]] = {
    "new rows": [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8)],
    "in parts": [(2, 2, 2), (1, 4, 1)],
    "tied, grouped": [(4, 2, 1), (1, 2, 4), (2, 1, 1)],
    "base rows": [(2, 4, 1), (4, 1, 2), (1, 1, 2)],
    "full": [(1, 4, 2), (2, 1, 4), (1, 2, 1)],
    "qwen2": [(2, 2, 1), (1, 1, 4)],
    "qwen3": [(2, 1, 2), (1, 2, 2), (4, 1, 1)],
}


def test_every_mesh_is_tried_and_every_case_meets_every_axis() -> None:
    assert {case.remat for case in CASES.values()} == set(get_args(Remat))
    tried = [shape for shapes in MESHES.values() for shape in shapes]
    assert sorted(tried) == sorted(shape for count in (1, 2, 4, 8) for shape in factorisations(count))
    assert MESHES.keys() == CASES.keys()
    for shapes in MESHES.values():
        assert all(max(sizes) > 1 for sizes in zip(*shapes, strict=True))


@cache
def alone(name: str) -> Trained:
    """A case on one device."""
    return train(CASES[name], SINGLE)


def arrays_of(tree: Any) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def require_near(ours: Any, wanted: Any, tolerance: float) -> None:
    """Of each array, relative to its largest value."""
    found, expected = arrays_of(ours), arrays_of(wanted)
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        if values.dtype != np.float32:
            assert np.array_equal(found[path], values), path
        else:
            scale = np.abs(values).max()
            assert scale > 0 and np.abs(found[path] - values).max() <= tolerance * scale, path


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shapes in MESHES.items() for shape in shapes])
def test_a_mesh_trains_as_one_device(name: str, shape: Shape) -> None:
    layout = layout_of(shape)
    ours, wanted = train(CASES[name], layout), alone(name)
    for found, expected in zip(ours.metrics, wanted.metrics, strict=True):
        assert expected.finite and expected.padding > 0 and (expected.source_tokens > 0).all()
        for field in ("tokens", "padding", "finite", "source_tokens"):
            assert np.array_equal(getattr(found, field), getattr(expected, field)), field
        # Sums over devices are added in another order than sums on one: some units of float32's last place, 6e-8. A
        # gradient's are sums in which numbers cancel.
        for field, tolerance in (("loss", 1e-6), ("source_loss", 1e-6), ("gradient_norm", 1e-5)):
            np.testing.assert_allclose(getattr(found, field), getattr(expected, field), tolerance, err_msg=field)
    # Of the first gradient. Beside the largest of an array the error is small.
    require_near(ours.moments, wanted.moments, 2e-5)
    # Adam's first steps are as long for a gradient that is nothing but its rounding error as for any other, so single
    # entries may be off by a part of a step of 1e-3.
    for path, values in arrays_of(wanted.state.trainable).items():
        error = np.abs(arrays_of(ours.state.trainable)[path] - values)
        assert (error > 1e-6).mean() < 0.01 and error.max() < 3e-4, path
    require_where_it_lay(ours)
    require_parts(ours, name, shape)


def require_where_it_lay(ours: Trained) -> None:
    """A state lies after a step where it lay before it, and moments lie as what they are moments of."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(ours.state)
    moments: dict[str, int] = defaultdict(int)
    for (path, leaf), began in zip(leaves, jax.tree.leaves(ours.began), strict=True):
        assert leaf.sharding.is_equivalent_to(began, leaf.ndim), path
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if leaf.ndim:
            parameter = ours.state.trainable[names[-1]]
            assert leaf.shape == parameter.shape and leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim)
            moments[names[-1]] += 1
        else:
            assert leaf.sharding.is_fully_replicated
    # The array itself, and two moments.
    assert dict(moments) == dict.fromkeys(ours.state.trainable, 3)


def require_parts(ours: Trained, name: str, shape: Shape) -> None:
    """Each device holds 1 / (fsdp * tensor) of what is cut, to the byte; norms and biases are whole."""
    whole: dict[bool, int] = defaultdict(int)
    held: dict[bool, dict[int, int]] = {cut: defaultdict(int) for cut in (False, True)}
    leaves, _ = jax.tree_util.tree_flatten_with_path((ours.state.trainable, ours.state.optimizer, ours.frozen))
    for path, leaf in leaves:
        cut = leaf.ndim > 0 and not path[-1].key.endswith(("scale", "bias"))
        whole[cut] += leaf.nbytes
        for shard in leaf.addressable_shards:
            held[cut][shard.device.id] += shard.data.nbytes
    devices = range(math.prod(shape))
    assert held[True] == dict.fromkeys(devices, whole[True] // (shape[1] * shape[2]))
    assert held[False] == dict.fromkeys(devices, whole[False])
    rows = {"vocabulary.new"} | (set() if CASES[name].config.tie_word_embeddings else {"vocabulary.output_new"})
    assert rows < ours.state.trainable.keys()
    assert (set(BASE_ROWS) < ours.state.trainable.keys()) == CASES[name].train_base
    assert ours.state.trainable["vocabulary.new"].shape == (NEW, 32)
    assert all(set(axes) <= set(AXES) for path in ours.state.trainable for axes in partition(path))
