"""Shared by the tests of training: a small model, numbered batches, and runs of the loop on them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import random_weights, tiny_config

from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import Split, abstract, assemble, load_frozen
from transllm_jax.progress import Progress
from transllm_jax.training.checkpoint import Checkpoints
from transllm_jax.training.loop import LoopConfig, Outcome, train
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer
from transllm_jax.training.record.ledger import LEDGER, Ledger
from transllm_jax.training.step import TrainState, initial_state, summed_loss
from transllm_jax.training.validation import Watch

VOCAB, NEW, LENGTH, STEPS = 40, 5, 16, 6
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, steps=STEPS, warmup_steps=1, new_rows_multiplier=2.0, weight_decay=0.01)


def adapted_split(
    lora: LoraConfig = LORA, new_rows: int = NEW, *, train_base: bool = False, tied: bool = True
) -> Split:
    """A model as in the middle of training: nothing is zero."""
    config = tiny_config(VOCAB, tied=tied)
    rng = np.random.default_rng(1)
    shapes = abstract(config, lora, new_rows, train_base=train_base).trainable
    trainable = {path: 0.1 * rng.standard_normal(leaf.shape, dtype=np.float32) for path, leaf in sorted(shapes.items())}
    return assemble(config, load_frozen(config, random_weights(config)), lora=lora, trainable=trainable)


def batch_of(k: int) -> dict[str, np.ndarray]:
    """Batch k: sequences of base and new ids in which each token determines the next."""
    tokens = np.zeros((2, LENGTH), np.int32)
    tokens[:, 0] = [k % (VOCAB + NEW), (7 * k + 3) % (VOCAB + NEW)]
    for place in range(1, LENGTH):
        tokens[:, place] = (tokens[:, place - 1] * 2 + 3) % (VOCAB + NEW)
    weights = np.ones((2, LENGTH), np.float32)
    weights[:, -1] = 0
    return {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
        "segment_ids": np.ones_like(tokens),
        "labels": np.roll(tokens, -1, axis=1),
        "weights": weights,
    }


class Source:
    """Numbered batches; calls `before` with each number that is asked for."""

    batch_size = 2

    def __init__(self, before: Callable[[int], None] = lambda k: None) -> None:
        self.before = before

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        self.before(k)
        return batch_of(k)

    def select_rows(self, k: int, places: np.ndarray) -> dict[str, np.ndarray]:
        return {field: values[places] for field, values in self[k].items()}

    def places(self, k: int) -> list[str]:
        return [f"text.txt:{2 * k + row}" for row in range(2)]


def run(
    directory: Path,
    source: Any = None,
    *,
    checkpoint_every: int = 2,
    interrupt: Interrupt | None = None,
    watch: Watch | None = None,
    **changes: Any,
) -> Outcome:
    # No batch is read ahead of its step, so that `before` is called at that step.
    config = LoopConfig(OPTIMIZER, checkpoint_every=checkpoint_every, seed=11, dropout=True, ahead=0)
    config = replace(config, **changes)
    directory.mkdir(parents=True, exist_ok=True)
    with Ledger(directory / LEDGER) as ledger:
        given = (source or Source(), config, directory, Progress(quiet=True), interrupt or Interrupt(), ledger, watch)
        return train(adapted_split(), *given)


@cache
def _summed_loss() -> Any:
    split = adapted_split()
    return jax.jit(lambda trainable, batch: summed_loss(split.structure, trainable, split.frozen, batch))


def mean_loss(trainable: Any, batch: dict[str, jax.Array]) -> float:
    """Mean nats a token, without dropout."""
    return float(_summed_loss()(trainable, batch) / batch["weights"].sum())


def tree_bytes(tree: Any) -> dict[str, bytes]:
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves(tree)}


def leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def latest(directory: Path) -> int | None:
    with closing(Checkpoints(directory / "checkpoints")) as checkpoints:
        return checkpoints.latest()


def restored(directory: Path, like: TrainState | None = None) -> TrainState:
    with closing(Checkpoints(directory / "checkpoints")) as checkpoints:
        return checkpoints.restore(some_state(0) if like is None else like)


def save(directory: Path, *states: TrainState) -> None:
    with closing(Checkpoints(directory / "checkpoints")) as checkpoints:
        for state in states:
            checkpoints.save(state)


def some_state(step: int, *, lora: LoraConfig = LORA, new_rows: int = NEW, train_base: bool = False) -> TrainState:
    """A state of random values."""
    rng = np.random.default_rng(step)
    state = initial_state(adapted_split(lora, new_rows, train_base=train_base).trainable, make_optimizer(OPTIMIZER))
    drawn = jax.tree.map(
        lambda leaf: (
            jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) if leaf.ndim else jnp.int32(rng.integers(99))
        ),
        state,
    )
    return drawn._replace(step=jnp.int32(step))


class Broken(Source):
    """Batches; those in `broken` have a loss that is not finite."""

    def __init__(self, broken: set[int]) -> None:
        super().__init__()
        self.broken = broken

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        batch = batch_of(k)
        if k in self.broken:
            batch["weights"] = batch["weights"] * np.float32(3e38)
        return batch


class Dying(Broken):
    """Batches, of which number 3 is interrupted as by Ctrl-C."""

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        if k == 3:
            raise KeyboardInterrupt
        return super().__getitem__(k)
