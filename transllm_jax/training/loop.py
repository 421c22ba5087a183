"""The training loop: restore, then step, log and save until done or told to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from transllm_jax.errors import Preempted, UserError
from transllm_jax.interrupt import Interrupt
from transllm_jax.model.parameters import Flat, Split
from transllm_jax.progress import Progress
from transllm_jax.training.checkpoint import Checkpoints
from transllm_jax.training.metrics import MetricsLog, read_rows
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from transllm_jax.training.step import initial_state, make_step


class BatchSource(Protocol):
    """Batch k is a pure function of k; see transllm_jax.data.batches."""

    def __getitem__(self, k: int) -> Mapping[str, np.ndarray]: ...


@dataclass(frozen=True)
class LoopConfig:
    """What the loop needs to know besides the optimizer."""

    optimizer: OptimizerConfig
    checkpoint_every: int
    seed: int
    dropout: bool = False
    remat: bool = False
    log_every: int = 1


@dataclass
class Outcome:
    """What a stage's training did; the speed is that of this process's steps, compilation aside."""

    trainable: Flat
    steps: int
    tokens_per_second: float = 0.0
    last_loss: float = field(default=math.nan)


def train(
    split: Split,
    batches: BatchSource,
    config: LoopConfig,
    directory: Path,
    progress: Progress,
    interrupt: Interrupt,
) -> Outcome:
    """Train the split's trainable arrays for `config.optimizer.steps` steps, going on from `directory`'s checkpoint.

    Every key and batch is a function of (seed, step): a run that was killed ends with the bytes of one that was not.
    Raises Preempted after saving, when asked to stop; UserError on a non-finite loss (the last checkpoint stands).
    """
    steps = config.optimizer.steps
    optimizer = make_optimizer(config.optimizer)
    rate = schedule(config.optimizer)
    state = initial_state(split.trainable, optimizer)
    checkpoints = Checkpoints(directory / "checkpoints")
    if checkpoints.latest() is not None:
        state = checkpoints.restore(state)
    # A restored state is bound to its device, a fresh one is not yet: bound alike, both run the same compiled program.
    state = jax.device_put(state, jax.devices()[0])
    first = int(state.step)
    log = MetricsLog(directory / "metrics.jsonl", step=first)
    step = make_step(split.structure, optimizer, seed=config.seed, dropout=config.dropout, remat=config.remat)
    # Nothing is left to do for a stage that was killed just before it was noted as done.
    loss = read_rows(directory / "metrics.jsonl")[-1]["loss"] if first >= steps else math.nan
    started, timed = 0.0, 0
    bar = progress.task(directory.name, total=steps, done=first, unit="step")
    try:
        for number in range(first, steps):
            batch = batches[number]
            state, metrics = step(state, split.frozen, {field: jnp.asarray(values) for field, values in batch.items()})
            loss = float(metrics.loss)
            if not math.isfinite(loss):
                raise UserError(
                    f"{directory.name}: the loss is {loss} at step {number + 1}; lower {directory.name}.learning_rate "
                    f"and redo the stage with --force {directory.name}. The last checkpoint stands"
                )
            if number == first:
                # The first step compiles; the speed is of the others.
                started = time.perf_counter()
            else:
                timed += batch["tokens"].size
            elapsed = time.perf_counter() - started
            speed = timed / elapsed if timed else 0.0
            if (number + 1) % config.log_every == 0 or number + 1 == steps:
                log.write(
                    {
                        "step": number + 1,
                        "loss": loss,
                        "learning_rate": float(rate(number)),
                        "gradient_norm": float(metrics.gradient_norm),
                        "trained_tokens": int(metrics.tokens),
                    }
                )
            bar.update(number + 1, f"loss {loss:.3f}  {speed:,.0f} tokens/s" if timed else f"loss {loss:.3f}")
            last = number + 1 == steps
            if last or (number + 1) % config.checkpoint_every == 0 or interrupt.requested:
                checkpoints.save(state)
            if interrupt.requested and not last:
                raise Preempted(f"{directory.name}: stopped at step {number + 1} of {steps}, saved")
    finally:
        bar.close()
        checkpoints.close()
        log.close()
    elapsed = time.perf_counter() - started
    return Outcome(
        trainable=state.trainable,
        steps=steps,
        tokens_per_second=timed / elapsed if timed else 0.0,
        last_loss=loss,
    )
