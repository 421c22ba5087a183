"""What the three training stages share: packed sources in, trained adapters and new rows out."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transllm_jax.config import Source, Training
from transllm_jax.data.rows.batches import Batches
from transllm_jax.data.rows.packing import Rows
from transllm_jax.data.rows.planned import PlannedRows
from transllm_jax.errors import UserError
from transllm_jax.evaluation.likelihood import nats
from transllm_jax.model.layout import Layout
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import Flat, Split
from transllm_jax.model.splash import splash_supports
from transllm_jax.stages.bad_rows import BAD_ROWS
from transllm_jax.stages.points import trains
from transllm_jax.stages.run import Run
from transllm_jax.stages.token_rows import fields_not_read, left_out, planned_rows, validation_rows
from transllm_jax.training.arrays import all_on_host, save_arrays
from transllm_jax.training.flops import peak_flops, train_flops_per_token
from transllm_jax.training.loop import Environment, LoopConfig, Outcome, train
from transllm_jax.training.optimizer import OptimizerConfig
from transllm_jax.training.record.metrics import read_rows
from transllm_jax.training.record.reporting import Speed
from transllm_jax.training.validation import Watch

# Keys of a training section that no result depends on.
NEUTRAL = ("log_every", "checkpoint_every", "keep_checkpoints")
# Keys that say how a result is computed, not which: rounding may differ, and what dropout draws. They may change where
# the stage was cut off, and where it is done, which then stays as it was made.
HOW = ("remat", "accumulate", "max_skipped")
# Keys that may change where the stage was cut off: it goes on with the new ones. With other rows of validation, or
# another source, the best checkpoint is sought anew among those to come.
MAY_CHANGE = ("steps", "epochs", "validation", *HOW)


@dataclass(frozen=True)
class Part:
    """A source of rows in a mixture: its name, its rows, and its share (None: by its size).

    items: what it was made of, where that is known. left_out: how many of them were not used or cut, by reason, and
    bad rows. fields_not_read: of its records, and how many have them.
    """

    name: str
    rows: Rows
    weight: float | None
    items: int | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    fields_not_read: Mapping[str, int] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any]:
        """What is known of it before training."""
        return {
            "items": self.items,
            "left_out": dict(self.left_out),
            **({"fields_not_read": dict(self.fields_not_read)} if self.fields_not_read else {}),
            "rows": len(self.rows),
            "tokens": self.rows.token_count,
            "padded_fraction": self.rows.padded_fraction,
        }


@dataclass(frozen=True)
class Job:
    """A stage's training, ready to begin: what is trained, on which batches, how."""

    split: Split
    # Arrays of the stage's result that do not train.
    held: Flat
    batches: Batches
    parts: Sequence[Part]
    config: LoopConfig
    watch: Watch | None


def section_of(run: Run, name: str) -> Training:
    """The config's section of a training stage."""
    section: Training = getattr(run.config, name)
    return section


def training_inputs(run: Run, name: str) -> dict[str, Any]:
    """What a training stage's result depends on, of the config's section and its sources."""
    section = section_of(run, name)
    sources = getattr(section, "sources", [])
    measured = run.inputs.source_hashes([section.validation.source] if section.validation else [])
    return {
        name: section.model_dump(mode="json", exclude=set(NEUTRAL)),
        "seed": run.config.seed,
        **run.inputs.source_hashes(sources),
        # Named as keys of the validation, so that they may change with it.
        **{f"{name}.validation.{key}": digest for key, digest in measured.items()},
        **run.inputs.contamination_hashes(any(source.cleaning.contamination for source in sources)),
    }


def check_training(run: Run, name: str) -> None:
    """What can be known to be wrong before a training stage begins. Raises UserError."""
    section = section_of(run, name)
    run.models.check_length(f"{name}.length", section.length)
    check_layout(run.models.layout, name, section, run.models.config.head_dim)
    # Where it stands, before the manifest takes the new number for the stage's own.
    place = run.site.storage.checkpoints(name)
    saved = [path.name for path in place.iterdir()] if place.exists() else []
    reached = max((int(step) for step in saved if step.isdecimal()), default=0)
    if section.steps is not None and reached > section.steps:
        raise UserError(
            f"{name}.steps is {section.steps}, but the stage has a checkpoint of step {reached}; raise {name}.steps, "
            f"or begin the stage anew with --force {name}"
        )
    sources = getattr(section, "sources", [])
    for source in sources:
        run.inputs.check(source)
    if any(source.cleaning.contamination for source in sources):
        _ = run.inputs.evaluation_texts  # whole files: of an evaluation, no more than it measures is looked at
    if section.validation is not None:
        run.inputs.check(section.validation.source)


def check_layout(layout: Layout, name: str, section: Training, head_dim: int) -> None:
    """Whether a stage's batches can be cut over a mesh. Raises UserError that names the config's key."""
    rows, parts = section.batch_size // section.accumulate, layout.batch_parts
    if rows % parts:
        raise UserError(
            f"{name}.batch_size: {rows} rows at once cannot be cut over {parts} devices; take a multiple of "
            f"{parts * section.accumulate}"
        )
    if section.length % layout.size("tensor"):
        raise UserError(f"{name}.length: {section.length} is no multiple of mesh.tensor {layout.size('tensor')}")
    refusal = splash_supports(section.length, head_dim) if layout.attention == "splash" else None
    if refusal:
        raise UserError(f"{name}.length: {refusal}; change it, or set attention=plain")


def source_parts(run: Run, name: str) -> list[Part]:
    """The sources of a stage's config as rows; says what was left out of each."""
    section = section_of(run, name)
    return [
        part_of(
            run,
            name,
            f"{number} {Path(source.path).name}",
            source,
            planned_rows(run, name, source, section.length),
            source.weight,
        )
        for number, source in enumerate(getattr(section, "sources", []), 1)
    ]


def part_of(run: Run, stage: str, name: str, source: Source, rows: PlannedRows, weight: float | None) -> Part:
    """A source's rows as a part of a stage's mixture; says what was left out of it. Bad rows were said already."""
    items, missing = rows.counts["items"], left_out(rows)
    said = {reason: count for reason, count in missing.items() if not reason.startswith(BAD_ROWS)}
    if said:
        what = ", ".join(f"{count:,} {reason}" for reason, count in said.items())
        run.progress.say(f"  {stage}: of {items:,} items of {source.path}: {what}", style="yellow")
    return Part(name, rows, weight, items, missing, fields_not_read(rows))


def prepare(run: Run, directory: Path, *, name: str, start: str, parts: Sequence[Part]) -> Job:
    """A stage's training from point `start` on a mixture of rows; nothing is trained yet.

    The stage's order of batches and dropout depend on the run's seed and the stage's name alone.
    """
    section = section_of(run, name)
    seed = run.seed_for(name)
    batches = Batches([(part.name, part.rows, part.weight) for part in parts], section.batch_size, seed)
    steps = section.steps or math.ceil((section.epochs or 1) * batches.steps_per_epoch)
    with run.ledger.spend("init"):
        whole = run.models.split(start)
        split = whole.freeze(path for path in whole.trainable if not trains(run.config, path))
    lora = run.models.lora
    new_rows = len(whole.trainable["vocabulary.new"])
    flops = train_flops_per_token(
        run.models.config,
        lora,
        new_rows,
        section.length,
        full=lora is None,
        train_base=run.config.embeddings == "all",
        train_new=run.config.embeddings != "none",
    )
    peak = peak_flops(jax.devices()[0])
    config = loop_config(
        lora,
        name,
        section,
        steps,
        seed=seed,
        sources=tuple(part.name for part in parts),
        speed=Speed(flops, None if peak is None else peak * len(jax.devices())),
    )
    held = {path: array for path, array in whole.trainable.items() if path not in split.trainable}
    return Job(split, held, batches, parts, config, _watch(run, name, section, split))


def loop_config(
    lora: LoraConfig | None,
    name: str,
    section: Training,
    steps: int,
    *,
    seed: int,
    sources: tuple[str, ...],
    speed: Speed | None = None,
) -> LoopConfig:
    """What the training loop is told of a stage's section. Raises UserError for a schedule that does not fit."""
    return LoopConfig(
        _optimizer(section, steps, name),
        checkpoint_every=section.checkpoint_every,
        seed=seed,
        dropout=lora is not None and lora.dropout > 0,
        remat=section.remat,
        accumulate=section.accumulate,
        z_loss=section.z_loss,
        log_every=section.log_every,
        keep=section.keep_checkpoints,
        max_skipped=section.max_skipped,
        sources=sources,
        speed=speed or Speed(),
    )


def _optimizer(section: Training, steps: int, name: str) -> OptimizerConfig:
    ratio = 0.01 if section.warmup_ratio is None else section.warmup_ratio
    warmup = round(ratio * steps) if section.warmup_steps is None else section.warmup_steps
    decay = max(1, round(section.decay_ratio * steps)) if section.schedule == "wsd" else 0
    if warmup + decay > steps:
        raise UserError(
            f"{name}: {warmup} steps of warm-up{f' and {decay} of decay' if decay else ''} are more than its {steps} "
            f"steps; lower {name}.warmup_{'ratio' if section.warmup_steps is None else 'steps'}"
        )
    return OptimizerConfig(
        learning_rate=section.learning_rate,
        steps=steps,
        warmup_steps=warmup,
        schedule=section.schedule,
        decay_steps=decay,
        final_fraction=section.final_fraction,
        new_rows_multiplier=section.new_rows_multiplier,
        weight_decay=section.weight_decay,
        clip_norm=section.clip_norm,
    )


def _watch(run: Run, name: str, section: Training, split: Split) -> Watch | None:
    validation = section.validation
    if validation is None:
        return None
    rows = validation_rows(run, name, validation.source, section.length)
    number, size = min(validation.rows, len(rows)), max(section.batch_size // section.accumulate, 1)
    read = [rows.row(row) for row in range(number)]
    content = hashlib.sha256()
    for values in (row[key] for row in read for key in sorted(row)):
        content.update(np.ascontiguousarray(values).tobytes())
    # Padding fills the last batch, so that all have one shape.
    empty = {field: np.zeros_like(values) for field, values in read[0].items()}
    read += [empty] * (-number % size)
    found = [
        {field: np.stack([row[field] for row in read[first : first + size]]) for field in empty}
        for first in range(0, len(read), size)
    ]
    size_in_bytes = sum(rows.bytes(row) for row in range(number))

    def measure(trainable: Flat) -> float:
        total = sum(float(nats(split.structure, trainable, split.frozen, batch)) for batch in found)
        return total / math.log(2) / size_in_bytes

    return Watch(measure, validation.every, validation.patience, content.hexdigest()[:16])


def train_stage(run: Run, directory: Path, *, name: str, start: str, parts: Sequence[Part]) -> dict[str, Any]:
    """Train from point `start` on a mixture and save the result as point `name`."""
    job = prepare(run, directory, name=name, start=start, parts=parts)
    started = time.monotonic()
    outcome = train(
        job.split,
        job.batches,
        job.config,
        run.record_directory(directory),
        run.progress,
        run.interrupt,
        run.ledger,
        job.watch,
        Environment(run.peers, run.site.storage.checkpoints(name), lambda: run.push(name), run.profile),
    )

    def finish() -> dict[str, Any]:
        save_arrays(directory / "trainable", arrays)
        return {
            **_told(directory, job, outcome),
            "tokens_per_second": outcome.tokens_per_second,
            "train_seconds": time.monotonic() - started,
        }

    with run.ledger.spend("save"):
        arrays = all_on_host({**outcome.trainable, **job.held}, keep=run.primary)
        return run.peers.run_on_primary(f"the result of {name}", finish) or {}


def _told(directory: Path, job: Job, outcome: Outcome) -> dict[str, Any]:
    losses = [row["loss"] for row in read_rows(directory / "metrics.jsonl") if row["loss"] is not None]
    first = losses[0] if losses else math.nan
    tokens = outcome.steps * job.batches.batch_size * job.parts[0].rows.row_length
    text = f"{outcome.steps} steps, {tokens:,} tokens; loss {first:.2f} -> {outcome.last_loss:.2f}"
    if outcome.best is not None:
        found = {row["step"]: row["bits_per_byte"] for row in read_rows(directory / "validation.jsonl")}
        text += f"; best at step {outcome.best}, {found[outcome.best]:.3f} bits a byte"
    if outcome.skipped:
        text += f"; {outcome.skipped} update{'s' if outcome.skipped > 1 else ''} skipped, not finite"
    epochs = job.batches.epoch(outcome.steps)
    return {
        "text": text,
        "steps": outcome.steps,
        "tokens": tokens,
        "skipped": outcome.skipped,
        "best": outcome.best,
        "sources": {part.name: {**part.summary, "epochs": epochs[part.name]} for part in job.parts},
    }
