"""Models and trainings for the checks on meshes: every size that a mesh of eight cuts is a multiple of eight.

The checks run on eight virtual CPU devices, in a process of their own: test_layout.py starts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from conftest import random_weights
from jax.sharding import Mesh

from transllm_jax.choices import Attention, Remat
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import AXES, Layout
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import Split, abstract, assemble, load_frozen
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from transllm_jax.training.placement import Placement
from transllm_jax.training.recovery import Teaching
from transllm_jax.training.step import Metrics, Step, TrainState, initial_state, make_step

jax.config.update("jax_num_cpu_devices", 8)

VOCAB, NEW = 61, 7
# Rows of a part: divided by data and fsdp. The length is divided by tensor.
ROWS, LENGTH = 8, 16
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.2)
RATES = OptimizerConfig(1e-3, steps=8, warmup_steps=1, new_rows_multiplier=2.0, weight_decay=0.01)
# Heads do not fill the width. The tables have odd numbers of rows.
PLAIN = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
GROUPED = replace(PLAIN, num_attention_heads=16, head_dim=4)

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A training: a model, what of it trains, and how."""

    config: LlamaConfig = PLAIN
    lora: LoraConfig | None = LORA
    train_base: bool = False
    accumulate: int = 1
    remat: Remat = "projections"
    teaching: Teaching | None = None
    # All weights train, and no adapters.
    full: bool = field(default=False, kw_only=True)

    def split(self, layout: Layout) -> Split:
        """The model in the middle of training: nothing is zero."""
        rng = np.random.default_rng(1)
        shapes = abstract(self.config, self.lora, NEW, train_base=self.train_base).trainable
        drawn: dict[str, Any] = {
            path: 0.1 * rng.standard_normal(leaf.shape, dtype=np.float32) for path, leaf in sorted(shapes.items())
        }
        frozen = load_frozen(self.config, random_weights(self.config), layout=layout)
        given = drawn | random_weights(self.config) if self.full else drawn
        return assemble(self.config, frozen, lora=self.lora, trainable=given, layout=layout)


def factorisations(devices: int) -> list[Shape]:
    """All sizes of data, fsdp and tensor for so many devices."""
    sizes = range(1, devices + 1)
    return [(d, f, t) for d in sizes for f in sizes for t in sizes if d * f * t == devices]


@cache
def layout_of(shape: Shape, attention: Attention = "auto") -> Layout:
    """A mesh of as many of the devices as it needs."""
    count = int(np.prod(shape))
    return Layout(
        Mesh(np.array(jax.devices()[:count]).reshape(shape), AXES),
        attention=attention,
        interpret=attention == "splash",
    )


def batch_of(number: int, rows: int, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Batch `number`: random tokens of the whole vocabulary, in two texts and padding; rows count very differently."""
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, VOCAB + NEW, (rows, length), dtype=np.int32)
    places = np.arange(length, dtype=np.int32)
    first = rng.integers(1, length - 2, (rows, 1))
    segments = np.where(places < first, 1, 2).astype(np.int32)
    segments[:, -1] = rng.integers(0, 2, rows) * 2
    counted = rng.permutation(np.arange(rows) * (length - 1) // (rows - 1))
    return {
        "tokens": tokens,
        "positions": np.where(places < first, places, places - first).astype(np.int32),
        "segment_ids": segments,
        "labels": np.roll(tokens, -1, axis=1),
        "weights": (places < counted[:, None]).astype(np.float32),
        "sources": np.arange(rows, dtype=np.int32) % 3,
    }


class Prepared(NamedTuple):
    """A training that can begin: its step, its state, its frozen weights, and how batches come to it."""

    step: Step
    state: TrainState
    split: Split
    cut: Callable[[int], dict[str, jax.Array]]


def prepare(case: Case, layout: Layout, length: int = LENGTH) -> Prepared:
    """As the training loop does it."""
    split, optimizer = case.split(layout), make_optimizer(RATES)
    placement = Placement(layout, case.accumulate)
    make = partial(initial_state, optimizer=optimizer)
    shapes = placement.shapes(make, split.trainable)
    step = make_step(
        split.structure,
        optimizer,
        schedule(RATES),
        seed=11,
        dropout=True,
        remat=case.remat,
        accumulate=case.accumulate,
        sources=3,
        teaching=case.teaching,
        shardings=None if layout.mesh is None else (placement.shardings(shapes), placement.metrics),
    )
    size = ROWS * case.accumulate

    def cut(number: int) -> dict[str, jax.Array]:
        rows = batch_of(number, size, length)
        return placement.to_devices({field: values[placement.local_rows(size)] for field, values in rows.items()}, size)

    return Prepared(step, placement.initial(make, split.trainable), split, cut)


class Trained(NamedTuple):
    """Three steps: each one's metrics, the moments after the first, the last state, and where the state lay before."""

    metrics: list[Metrics]
    moments: Any
    state: TrainState
    began: TrainState
    frozen: dict[str, jax.Array]


def train(case: Case, layout: Layout, length: int = LENGTH) -> Trained:
    """Three steps."""
    step, state, split, cut = prepare(case, layout, length)
    began = jax.tree.map(lambda leaf: leaf.sharding, state)
    found, moments = [], None
    for number in range(3):
        state, metrics = step(state, split.frozen, cut(number))
        found.append(jax.device_get(metrics))
        moments = jax.device_get(state.optimizer) if moments is None else moments
    return Trained(found, moments, state, began, split.frozen)
