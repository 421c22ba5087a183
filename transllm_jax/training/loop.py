"""The training loop: restore; then batch, step, log, validate and save until done or told to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from transllm_jax.choices import Remat
from transllm_jax.data.rows.batches import Batch, Prefetcher
from transllm_jax.errors import Preempted, UserError
from transllm_jax.hosts.agreement import Agreement
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.hosts.runtime import Peers
from transllm_jax.model.parameters import Flat, Split
from transllm_jax.progress import Progress
from transllm_jax.training.checkpoint import Checkpoints
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from transllm_jax.training.placement import Placement, used_memory
from transllm_jax.training.record.ledger import Ledger
from transllm_jax.training.record.metrics import read_rows
from transllm_jax.training.record.reporting import Reporter, Speed
from transllm_jax.training.record.trace import Trace
from transllm_jax.training.recovery import Teaching
from transllm_jax.training.step import Step, TrainState, compiler_options, initial_state, make_step
from transllm_jax.training.validation import Validation, Watch


class BatchSource(Protocol):
    """Batch k is a pure function of k; see transllm_jax.data.rows.batches."""

    batch_size: int

    def select_rows(self, k: int, places: np.ndarray) -> Batch: ...

    def places(self, k: int) -> list[str]: ...


@dataclass(frozen=True)
class LoopConfig:
    """The loop's settings. sources: the names of the mixture's sources. teaching: which of them the original model
    teaches. ahead: batches prepared before their steps.
    """

    optimizer: OptimizerConfig
    checkpoint_every: int
    seed: int
    dropout: bool = False
    remat: Remat = "none"
    accumulate: int = 1
    z_loss: float = 0.0
    log_every: int = 1
    keep: int = 2
    max_skipped: int = 5
    sources: tuple[str, ...] = ("all",)
    teaching: Teaching | None = None
    speed: Speed = field(default_factory=Speed)
    ahead: int = 2


@dataclass(frozen=True)
class Environment:
    """Where a training runs; by default in one process, with a directory of this host.

    checkpoints: their directory, which all processes see; by default `checkpoints` in the directory of the records.
    before_save: called before each checkpoint, after the records of its steps are written. profile: how many steps are
    traced.
    """

    peers: Peers = field(default_factory=Peers)
    checkpoints: Any = None
    before_save: Callable[[], None] = lambda: None
    profile: int = 0


@dataclass
class Outcome:
    """The result of a stage's training.

    trainable: the arrays after the last step or, with validation, after step `best`, which has the lowest score.
    steps: how many were done. tokens_per_second: the speed of this process's steps, without compilation.
    """

    trainable: Flat
    steps: int
    skipped: int = 0
    best: int | None = None
    tokens_per_second: float = 0.0
    last_loss: float = field(default=math.nan)


def step_of(config: LoopConfig, split: Split) -> Step:
    """The compiled step that the loop runs on a model, whose arrays may be shapes only."""
    optimizer, placement = make_optimizer(config.optimizer), Placement(split.layout)
    state = placement.shapes(partial(initial_state, optimizer=optimizer), split.trainable)
    return make_step(
        split.structure,
        optimizer,
        schedule(config.optimizer),
        seed=config.seed,
        dropout=config.dropout,
        remat=config.remat,
        accumulate=config.accumulate,
        z_loss=config.z_loss,
        sources=len(config.sources),
        teaching=config.teaching,
        shardings=None if placement.metrics is None else (placement.shardings(state), placement.metrics),
        options=compiler_options(split.layout),
    )


def train(
    split: Split,
    batches: BatchSource,
    config: LoopConfig,
    directory: Path,
    progress: Progress,
    interrupt: Interrupt,
    ledger: Ledger,
    watch: Watch | None = None,
    environment: Environment | None = None,
) -> Outcome:
    """Train the split's trainable arrays for `config.optimizer.steps` steps, from the last checkpoint on.

    directory: where this process writes its records. Each process has its own, of the same name; only the primary's
    counts. The trainable arrays are donated: the caller must not use them afterwards.
    Every key and batch is a function of (seed, step): a run that was killed ends with the same bytes as one that was
    not. Raises Preempted after saving, when asked to stop; Diverged if too many updates in a row were skipped;
    UserError if all checkpoints are damaged, or one has other shapes or is past the last step.
    """
    environment = environment or Environment()
    peers, name, steps = environment.peers, directory.name, config.optimizer.steps
    placement = Placement(split.layout, config.accumulate)
    size, rows = batches.batch_size, placement.local_rows(batches.batch_size)

    # Restore the last checkpoint, or begin.
    with ledger.spend("init"):
        step = step_of(config, split)
        where = environment.checkpoints or directory / "checkpoints"
        checkpoints = Checkpoints(where, keep=config.keep, say=_warn(progress), peers=peers)
        make = partial(initial_state, optimizer=make_optimizer(config.optimizer))
        shapes = placement.shapes(make, split.trainable)
        state = _restored(checkpoints, shapes, split) or placement.initial(make, split.trainable)
    first = int(state.step)
    _check_start(progress, directory, first, steps)
    ledger.mark(first)
    peers.last_saved = _checkpoint_of(name, checkpoints)
    earlier = [] if watch is None else peers.share(read_rows(directory / "validation.jsonl"))
    validation = Validation(watch, earlier, progress.say)
    if watch is not None:
        checkpoints.compare_only(validation.steps)

    bar = progress.task(name, total=steps, done=first, unit="step")
    reporter = Reporter(
        directory,
        first=first,
        steps=steps,
        log_every=config.log_every,
        max_skipped=config.max_skipped,
        skipped_in_a_row=int(state.skipped_in_a_row),
        sources=config.sources,
        speed=config.speed,
        rate=schedule(config.optimizer),
        places=batches.places,
        memory=used_memory,
        bar=bar,
    )
    agreement = Agreement(peers)
    trace = Trace(directory / "profile", environment.profile, lambda line: progress.say(f"  {line}"))
    ahead = Prefetcher(lambda k: batches.select_rows(k, rows), steps, config.ahead)
    try:
        for number in range(first, steps):
            if validation.exhausted:
                break

            # A batch.
            started = time.perf_counter()
            with ledger.spend("data"):
                batch = ahead[number]
            waited = time.perf_counter() - started

            # A step. All processes agree to stop one step after one of them was asked to.
            done = number + 1
            last, due = done == steps, validation.due(done, done == steps)
            with ledger.spend("compile" if number == first else "step"):
                with trace.step(number):
                    state, metrics = step(state, split.frozen, placement.to_devices(batch, size))
                stop = agreement.tell(done, interrupt.requested)
                trace.dispatched(metrics)

                # The log. It is one step behind, so that the device never waits for the host.
                reporter.add(number, metrics, size * batch["tokens"].shape[1], waited)
                save = last or due or stop or done % config.checkpoint_every == 0
                if save or number == first:
                    reporter.flush()

            # Validation.
            score = None
            if due:
                with ledger.spend("validate"):
                    measured = validation.measure(state.trainable)
                    reporter.validated(done, measured, validation.of)
                score = measured if math.isfinite(measured) else None

            # A checkpoint.
            if save:
                with ledger.spend("save"):
                    environment.before_save()
                    checkpoints.save(state, score)
            ledger.mark(done)
            peers.last_saved = _checkpoint_of(name, checkpoints)
            if stop and not last:
                raise Preempted(f"{name}: stopped at step {done} of {steps}, saved")

        # The result: the arrays of the last step, or of the step with the best validation.
        loss = reporter.loss if math.isfinite(reporter.loss) else _last_loss(directory)
        speed, reached, skipped = reporter.tokens_per_second, int(state.step), int(state.skipped)
        best = checkpoints.best() if watch is not None else None
        if best is not None and best != reached:
            with ledger.spend("save"):
                checkpoints.wait()
                del state
                state = checkpoints.read(best, shapes)
    finally:
        ahead.close()
        trace.close()
        bar.close()
        reporter.close()
        with ledger.spend("save"):
            checkpoints.close()
    return Outcome(state.trainable, reached, skipped, best, speed, loss)


def _restored(checkpoints: Checkpoints, shapes: TrainState, split: Split) -> TrainState | None:
    """The state of the last checkpoint, placed as a fresh one, so that both run the same compiled program."""
    restored = checkpoints.restore(shapes)
    if restored is not None:
        # Otherwise the initial arrays would take memory until the end.
        for array in split.trainable.values():
            array.delete()
    return restored


def _check_start(progress: Progress, directory: Path, first: int, steps: int) -> None:
    """Say from which step the training goes on. Raises UserError if the checkpoint is past the last step."""
    name = directory.name
    if logged := len(read_rows(directory / "metrics.jsonl")):
        lost = "" if first else f": it has no checkpoint, so what was logged up to line {logged} is done again"
        progress.say(f"  goes on from step {first:,}{lost}")
    if first > steps:
        raise UserError(
            f"{name}: its checkpoint is at step {first}, past the {steps} steps of the config; raise {name}.steps, or "
            f"redo the stage with --force {name}"
        )


def _checkpoint_of(name: str, checkpoints: Checkpoints) -> str:
    """Which checkpoint there is: part of the message when a process is lost."""
    step = checkpoints.newest_complete
    return f"{name} has no checkpoint yet" if step is None else f"{name}: the checkpoint of step {step} is kept"


def _warn(progress: Progress) -> Callable[[str], None]:
    return lambda message: progress.say(f"  warning: {message}")


def _last_loss(directory: Path) -> float:
    """The last logged loss, for a stage that was killed after its last step and has none left to do."""
    losses = [row["loss"] for row in read_rows(directory / "metrics.jsonl") if row["loss"] is not None]
    return losses[-1] if losses else math.nan
