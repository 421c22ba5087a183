"""The training loop: restore, then step, log, validate and save until done or told to stop."""

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
from transllm_jax.data.rows.batches import Ahead, Batch
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
from transllm_jax.training.step import Step, TrainState, compiler_options, initial_state, make_step


class BatchSource(Protocol):
    """Batch k is a pure function of k; see transllm_jax.data.rows.batches."""

    batch_size: int

    def of_rows(self, k: int, places: np.ndarray) -> Batch: ...

    def places(self, k: int) -> list[str]: ...


@dataclass(frozen=True)
class LoopConfig:
    """What the loop needs to know besides the optimizer. sources: the names of the mixture's sources."""

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
    speed: Speed = field(default_factory=Speed)
    # Batches that are made ahead of their steps.
    ahead: int = 2


@dataclass(frozen=True)
class Around:
    """What a training has around it, by default nothing: it is one process's, on a directory of this host.

    checkpoints: where they lie, if not with the rest; all processes see them. saving: called before a checkpoint is
    written, when all that is told of its steps is. profile: steps that are traced.
    """

    peers: Peers = field(default_factory=Peers)
    checkpoints: Any = None
    saving: Callable[[], None] = lambda: None
    profile: int = 0


@dataclass(frozen=True)
class Watch:
    """Validation: `measure` gives bits per byte, every so many steps; `patience` of them without a better end it.

    of: says what is measured; validations of something else are not compared with these.
    """

    measure: Callable[[Flat], float]
    every: int
    patience: int | None = None
    of: str = ""


@dataclass
class Outcome:
    """What a stage's training did; the speed is that of this process's steps, compilation aside.

    trainable: of the last step, or with validation of `best`, the step with the lowest. steps: those that were done.
    """

    trainable: Flat
    steps: int
    skipped: int = 0
    best: int | None = None
    tokens_per_second: float = 0.0
    last_loss: float = field(default=math.nan)


def step_of(config: LoopConfig, split: Split) -> Step:
    """The step that the loop runs on a model (or on one of shapes)."""
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
    around: Around | None = None,
) -> Outcome:
    """Train the split's trainable arrays for `config.optimizer.steps` steps, going on from the last checkpoint.

    directory: where this process tells of it; of several processes each has its own, of the same name, and what the
    primary's holds counts. The arrays are given away: they are the training's own from then on.
    Every key and batch is a function of (seed, step): a run that was killed ends with the bytes of one that was not.
    Raises Preempted after saving, when asked to stop; Diverged where too many updates in a row had to be skipped;
    UserError for checkpoints that are all damaged, of another shape, or past the last step.
    """
    around = around or Around()
    peers, name = around.peers, directory.name
    placement = Placement(split.layout, config.accumulate)
    size, places = batches.batch_size, placement.places(batches.batch_size)
    with ledger.spend("init"):
        step = step_of(config, split)
        optimizer, rate = make_optimizer(config.optimizer), schedule(config.optimizer)
        where = around.checkpoints or directory / "checkpoints"
        checkpoints = Checkpoints(where, keep=config.keep, say=_teller(progress), peers=peers)
        # Placed alike, a fresh state and a restored one run the same compiled program.
        make = partial(initial_state, optimizer=optimizer)
        shapes = placement.shapes(make, split.trainable)
        restored = checkpoints.restore(shapes)
        if restored is not None:
            # What the stage began with would stand beside it to the end.
            for array in split.trainable.values():
                array.delete()
        state: TrainState = restored or placement.initial(make, split.trainable)
        frozen = split.frozen
    first, steps = int(state.step), config.optimizer.steps
    if done := len(read_rows(directory / "metrics.jsonl")):
        lost = "" if first else f": it has no checkpoint, so what was logged up to line {done} is done again"
        progress.say(f"  goes on from step {first:,}{lost}")
    if first > steps:
        raise UserError(
            f"{name}: its checkpoint is at step {first}, past the {steps} steps of the config; raise {name}.steps, or "
            f"begin the stage anew with --force {name}"
        )
    ledger.mark(first)
    peers.stands = _standing(name, checkpoints)
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
        rate=rate,
        places=batches.places,
        memory=used_memory,
        bar=bar,
    )
    history = [] if watch is None else _history(peers, directory, watch, checkpoints, progress)
    agreement = Agreement(peers)
    trace = Trace(directory / "profile", around.profile, lambda line: progress.say(f"  {line}"))
    ahead = Ahead(lambda k: batches.of_rows(k, places), steps, config.ahead)
    try:
        for number in range(first, steps):
            if watch is not None and _exhausted(history, watch.patience):
                break
            started = time.perf_counter()
            with ledger.spend("data"):
                batch = ahead[number]
            waited = time.perf_counter() - started
            done = number + 1
            last = done == steps
            validates = watch is not None and (last or done % watch.every == 0)
            with ledger.spend("compile" if number == first else "step"):
                with trace.step(number):
                    state, metrics = step(state, frozen, placement.cut(batch, size))
                # Asked once a step: what is decided by it is decided alike, here and in all processes.
                stop = agreement.tell(done, interrupt.requested)
                trace.dispatched(metrics)
                reporter.add(number, metrics, size * batch["tokens"].shape[1], waited)
                saves = last or validates or done % config.checkpoint_every == 0 or stop
                if saves or number == first:
                    reporter.flush()
            score = None
            if watch is not None and validates:
                with ledger.spend("validate"):
                    measured = watch.measure(state.trainable)
                    reporter.validated(done, measured, watch.of)
                # What is not finite is no better than anything.
                score = measured if math.isfinite(measured) else None
                history.append(math.inf if score is None else score)
            if saves:
                with ledger.spend("save"):
                    around.saving()
                    checkpoints.save(state, score)
            ledger.mark(done)
            peers.stands = _standing(name, checkpoints)
            if stop and not last:
                raise Preempted(f"{name}: stopped at step {done} of {steps}, saved")
        # Nothing was left to do for a stage that was killed just before it was noted as done.
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


def _standing(name: str, checkpoints: Checkpoints) -> str:
    """What is said where a process is lost."""
    step = checkpoints.whole
    return f"{name} has no checkpoint yet" if step is None else f"{name}: the checkpoint of step {step} stands"


def _teller(progress: Progress) -> Callable[[str], None]:
    return lambda message: progress.say(f"  warning: {message}")


def _history(peers: Peers, directory: Path, watch: Watch, checkpoints: Checkpoints, progress: Progress) -> list[float]:
    """The validations so far of what is measured now; checkpoints have the scores of these alone."""
    found = peers.share(read_rows(directory / "validation.jsonl"))
    alike = [row for row in found if row.get("of", "") == watch.of]
    if len(alike) < len(found):
        progress.say(
            f"  validations up to step {max(row['step'] for row in found if row not in alike)} were of other rows; the "
            "best checkpoint is sought among those that are measured on the rows of now",
        )
    checkpoints.compare(row["step"] for row in alike)
    return [math.inf if row["bits_per_byte"] is None else row["bits_per_byte"] for row in alike]


def _exhausted(history: list[float], patience: int | None) -> bool:
    """Whether so many validations in a row were no better than the best before them."""
    return bool(history) and patience is not None and len(history) - 1 - history.index(min(history)) >= patience


def _last_loss(directory: Path) -> float:
    losses = [row["loss"] for row in read_rows(directory / "metrics.jsonl") if row["loss"] is not None]
    return losses[-1] if losses else math.nan
