"""Placing on a mesh: which parts are read, whose rows of a batch are whose, meshes that do not fit, other uses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_weights
from jax.sharding import Mesh, NamedSharding
from meshes import GROUPED, LORA, NEW, PLAIN, RATES, VOCAB, Case, Shape, batch_of, layout_of, train
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.errors import UserError
from transllm_jax.evaluation.likelihood import Teacher, bits_per_byte
from transllm_jax.generation.engine import Engine
from transllm_jax.model.layout import SINGLE, Index, Layout
from transllm_jax.model.mesh import make_layout
from transllm_jax.model.parameters import abstract, assemble, load_frozen, read_frozen
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.checkpoint import Checkpoints
from transllm_jax.training.optimizer import make_optimizer
from transllm_jax.training.placement import Placement
from transllm_jax.training.step import TrainState, batch_losses, initial_state

# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (8, 1, 1)])
def test_each_part_of_a_weight_is_read_once(shape: Shape) -> None:
    weights, layout = random_weights(GROUPED), layout_of(shape)
    asked: list[tuple[str, Sequence[Index]]] = []

    def read(path: str, parts: Sequence[Index]) -> list[np.ndarray]:
        asked.append((path, parts))
        return [weights[path][part] for part in parts]

    found = read_frozen(GROUPED, read, layout=layout)
    assert [path for path, _ in asked] == sorted(weights)
    for path, parts in asked:
        whole = path.endswith("scale")
        assert len(parts) == (1 if whole else shape[1] * shape[2]), path
        # Together they are the array, and none is in another.
        times = np.zeros(weights[path].shape, int)
        for part in parts:
            times[part] += 1
        assert (times == 1).all(), path
        np.testing.assert_array_equal(found[path], weights[path])
        assert found[path].sharding == layout.sharding(path)


def test_what_is_placed_is_a_copy_and_rounded_on_the_way() -> None:
    given = np.linspace(0, 1, 8 * 32, dtype=np.float32).reshape(8, 32)
    for layout in (SINGLE, layout_of((1, 2, 2))):
        kept = layout.place("vocabulary.new", given)
        rounded = layout.place("vocabulary.new", given, jnp.bfloat16)
        assert kept.dtype == np.float32 and rounded.dtype == jnp.bfloat16
        np.testing.assert_array_equal(kept, given)
        np.testing.assert_array_equal(rounded, given.astype(jnp.bfloat16))
        # Training gives it away.
        again = layout.place("vocabulary.new", kept)
        kept.delete()
        np.testing.assert_array_equal(again, given)


def test_a_mesh_that_does_not_divide_the_model_is_refused_with_all_that_is_wrong() -> None:
    config = replace(GROUPED, num_attention_heads=6, num_key_value_heads=3, head_dim=8, intermediate_size=50)
    with pytest.raises(UserError) as caught:
        abstract(config, LORA, NEW, layout=layout_of((1, 2, 4)))
    said = str(caught.value)
    assert "\n" not in said
    for fault in (
        "num_attention_heads 6 by tensor=4",
        "num_key_value_heads 3 by tensor=4",
        "blocks.mlp.gate.kernel [3, 32, 50], its 50 by tensor=4",
        "blocks.mlp.up.b [3, 3, 50], its 50 by tensor=4,fsdp=2",
        "blocks.mlp.down.a [3, 50, 3], its 50 by tensor=4,fsdp=2",
    ):
        assert fault in said
    assert said.endswith("choose other sizes of mesh")
    # 48 and 24 are multiples of 4, and of 8.
    assert "attention.q" not in said and "attention.k" not in said and "vocabulary" not in said
    with pytest.raises(UserError, match=r"vocabulary\.base \[61, 36\], its 36 by fsdp=8,tensor=1"):
        load_frozen(replace(GROUPED, hidden_size=36), random_weights(replace(GROUPED, hidden_size=36)), layout=CUT)
    with pytest.raises(ValueError, match=r"a mesh with axes \('data', 'tensor', 'fsdp'\), wanted \('data', 'fsdp'"):
        Layout(Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "tensor", "fsdp")))


CUT = layout_of((1, 8, 1))


def test_shapes_say_where_they_lie_and_what_is_placed_lies_there() -> None:
    layout = layout_of((2, 2, 2))
    shapes, arrays = abstract(GROUPED, LORA, NEW, layout=layout), Case(GROUPED).split(layout)
    assert arrays.layout == layout
    for wanted, found in ((shapes.trainable, arrays.trainable), (shapes.frozen, arrays.frozen)):
        assert wanted.keys() == found.keys()
        for path, leaf in wanted.items():
            assert leaf.sharding == found[path].sharding and leaf.shape == found[path].shape, path


def test_a_layout_of_the_devices_there_are() -> None:
    layout = make_layout((2, 2, 2))
    assert layout.mesh is not None and layout.mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sorted(device.id for device in layout.mesh.devices.flat) == list(range(8))
    assert make_layout((1, 1, 1), devices=jax.devices()[:1]).mesh is None
    assert (layout.size("fsdp", "tensor"), layout.size(), layout.batch_parts, layout.platform) == (4, 8, 4, "cpu")
    assert (SINGLE.size("fsdp"), SINGLE.size(), SINGLE.batch_parts, SINGLE.platform) == (1, 1, 1, "cpu")
    with pytest.raises(ValueError, match=r"labels \(3, 16\) are not divided by the mesh"):
        batch_losses(*Case().split(layout), batch_of(0, 3))  # type: ignore[arg-type]


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 1, 8)])
def test_a_batch_lies_by_rows(shape: Shape, accumulate: int) -> None:
    layout, size = layout_of(shape), 8 * accumulate
    placement, batch = Placement(layout, accumulate), batch_of(0, size)
    assert placement.local_rows(size).tolist() == list(range(size))
    for field, values in placement.to_devices(batch, size).items():
        wanted = batch[field]
        in_parts = wanted.reshape(accumulate, 8, *wanted.shape[1:]) if accumulate > 1 else wanted
        assert values.dtype == wanted.dtype and values.sharding == placement.batch_sharding
        np.testing.assert_array_equal(values, in_parts)
        # Every device has some rows of each part, and all of these rows.
        rows = 8 // layout.batch_parts
        shapes = {shard.data.shape for shard in values.addressable_shards}
        assert shapes == {(accumulate, rows, *wanted.shape[1:]) if accumulate > 1 else (rows, *wanted.shape[1:])}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 4, 2), (1, 2, 4)])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_rows_of_all_processes_are_the_batch(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, accumulate: int, processes: int
) -> None:
    """Processes that own some of the devices each, in order."""
    placement, size = Placement(layout_of(shape), accumulate), 8 * accumulate
    batch, sharding = batch_of(0, size), placement.batch_sharding
    assert sharding is not None
    real = NamedSharding.devices_indices_map
    own: set[int] = set()

    def addressable(self: NamedSharding, shape: tuple[int, ...]) -> dict[Any, Any]:
        return {device: index for device, index in real(self, shape).items() if device.id in own}

    def made(shape: tuple[int, ...], sharding: NamedSharding, part: Any) -> dict[Any, np.ndarray]:
        return {device: (index, part(index)) for device, index in addressable(sharding, shape).items()}

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", addressable)
    monkeypatch.setattr(jax, "make_array_from_callback", made)
    whole = {field: np.full(placement.shape(*values.shape), -1, values.dtype) for field, values in batch.items()}
    held, count = [], 8 // processes
    for process in range(processes):
        own = set(range(process * count, (process + 1) * count))
        places = placement.local_rows(size)
        held.append(places)
        # It has no other rows.
        found: Any = placement.to_devices({field: values[places] for field, values in batch.items()}, size)
        for field, parts in found.items():
            assert {device.id for device in parts} == own
            for index, values in parts.values():
                whole[field][index] = values
    for field, values in batch.items():
        np.testing.assert_array_equal(whole[field].reshape(values.shape), values)
    # Nobody reads what another reads, but where a row's devices belong to several.
    shared = max(1, processes // placement.layout.batch_parts)
    assert sorted(np.concatenate(held)) == sorted(list(range(size)) * shared)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [None, (2, 2, 2)], ids=["one device", "a mesh"])
def test_what_one_mesh_saved_another_reads_to_where_it_lies(tmp_path: Path, saved: Shape | None) -> None:
    def state_of(shape: Shape | None) -> tuple[TrainState, TrainState]:
        """A fresh state, and its shapes."""
        layout = SINGLE if shape is None else layout_of(shape)
        placement, make = Placement(layout), partial(initial_state, optimizer=make_optimizer(RATES))
        split = Case().split(layout)
        return placement.initial(make, split.trainable), placement.shapes(make, split.trainable)

    state, _ = state_of(saved)
    # Moments that are not all the same.
    state = state._replace(
        optimizer=jax.tree.map(
            lambda leaf: leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), state.optimizer
        )
    )
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state)
    for shape in (None, (1, 4, 2), (2, 2, 2)):
        _, like = state_of(shape)
        with closing(Checkpoints(tmp_path)) as checkpoints:
            found = checkpoints.restore(like)
        assert found is not None
        for ours, wanted, where in zip(*map(jax.tree.leaves, (found, state, like)), strict=True):
            np.testing.assert_array_equal(ours, wanted)
            assert ours.dtype == wanted.dtype and ours.sharding == where.sharding


# --- attention, generation and evaluation ---------------------------------------------------------------------------


def test_splash_attention_on_a_mesh_has_the_losses_of_plain_attention() -> None:
    config, length = replace(GROUPED, num_hidden_layers=1), 128
    wanted = train(Case(config), SINGLE, length)
    ours = train(Case(config), layout_of((2, 2, 2), "splash"), length)
    for found, expected in zip(ours.metrics, wanted.metrics, strict=True):
        # The kernel adds up in blocks, and in another order.
        np.testing.assert_allclose(found.loss, expected.loss, rtol=2e-6)
        np.testing.assert_allclose(found.gradient_norm, expected.gradient_norm, rtol=1e-5)


def test_generation_on_a_mesh_gives_the_tokens_of_one_device() -> None:
    """Five prompts, three at a time: neither is divided by the mesh."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, VOCAB + NEW, length).tolist() for length in (9, 1, 12, 5, 3)]
    case, room = Case(replace(GROUPED, tie_word_embeddings=True)), 12

    def answers(layout: Layout) -> list[list[int]]:
        engine = Engine(case.split(layout), case.config, batch_size=3)
        return engine.generate(prompts, max_new_tokens=room, stop=[VOCAB + NEW])

    wanted = answers(SINGLE)
    for shape in ((2, 2, 2), (1, 8, 1)):
        assert answers(layout_of(shape)) == wanted, shape
    assert {len(answer) for answer in wanted} == {room} and len({token for ids in wanted for token in ids}) > 10


def test_what_is_likely_on_a_mesh_is_what_is_likely_on_one_device(tmp_path: Path) -> None:
    """Three rows at a time, which the mesh does not divide."""
    build_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    case = Case(replace(PLAIN, vocab_size=tokenizer.vocab_size))
    texts = ["The capital of France is Paris.", "ประเทศไทย สวัสดี", "You can write a short letter.", "a", "12 months"]
    answers = [(tokenizer.encode(text)[:4], tokenizer.encode(text)[4:]) for text in texts[:3]]

    def measured(layout: Layout) -> tuple[float, float]:
        split = case.split(layout)
        bits = bits_per_byte(split, tokenizer, texts, length=32, batch_size=3)
        base = assemble(case.config, split.frozen, layout=layout)
        return bits, Teacher(base, answers, batch_size=3).divergence(split)

    wanted = measured(SINGLE)
    # Sums over tokens, in another order.
    np.testing.assert_allclose(measured(layout_of((2, 2, 2))), wanted, rtol=1e-5)
    assert min(wanted) > 0.01
