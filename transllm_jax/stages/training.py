"""What the training stages share: from the rows of their sources to trained adapters and new rows."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transllm_jax.choices import Recovery
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
from transllm_jax.training.arrays import all_on_host, load_arrays, save_arrays
from transllm_jax.training.flops import peak_flops, train_flops_per_token
from transllm_jax.training.loop import Environment, LoopConfig, Outcome, train
from transllm_jax.training.optimizer import OptimizerConfig
from transllm_jax.training.record.metrics import read_rows
from transllm_jax.training.record.reporting import Speed
from transllm_jax.training.recovery import Teaching
from transllm_jax.training.validation import Watch

# Keys of a training section on which no result depends.
NEUTRAL = ("log_every", "checkpoint_every", "keep_checkpoints")
# Keys that change how the result is computed, and so only its rounding and what dropout draws. They may change when a
# stopped stage goes on. They may also change when the stage is done: its result then stays as it was made.
METHOD = ("remat", "accumulate", "max_skipped")
# Keys that may change when a stopped stage goes on. If the rows of the validation change, only later checkpoints can be
# the best one.
MAY_CHANGE = ("steps", "epochs", "validation", *METHOD)


@dataclass(frozen=True)
class Part:
    """A source of rows in a mixture: its name, its rows, and its share (None: in proportion to its size).

    recovery: how its rows are trained on. items: the number of items that the rows were made from, if known. left_out:
    how many items were left out or cut, by reason, and bad rows. fields_not_read: fields of its records that are
    ignored, and how many records have them.
    """

    name: str
    rows: Rows
    weight: float | None
    recovery: Recovery = "sequence"
    items: int | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    fields_not_read: Mapping[str, int] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any]:
        """The part's contribution to the stage's summary, which is known before training."""
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
    """A stage's training, ready to begin. held: arrays of the stage's result that do not train."""

    split: Split
    held: Flat
    batches: Batches
    parts: Sequence[Part]
    config: LoopConfig
    watch: Watch | None


def training_inputs(run: Run, name: str) -> dict[str, Any]:
    """The inputs on which a training stage's result depends: its config section and the files of its sources."""
    section = section_of(run, name)
    sources = getattr(section, "sources", [])
    measured = run.inputs.source_hashes([section.validation.source] if section.validation else [])
    return {
        name: section.model_dump(mode="json", exclude=set(NEUTRAL)),
        "seed": run.config.seed,
        **run.inputs.source_hashes(sources),
        # Named as keys of `validation`, so that they may change with it (`MAY_CHANGE`).
        **{f"{name}.validation.{key}": digest for key, digest in measured.items()},
        **run.inputs.contamination_hashes(any(source.cleaning.contamination for source in sources)),
    }


def check_training(run: Run, name: str) -> None:
    """Find what is wrong with a training stage's config and files before it begins. Raises UserError."""
    section = section_of(run, name)
    run.models.check_length(f"{name}.length", section.length)
    check_layout(run.models.layout, name, section, run.models.config.head_dim)
    _check_steps(run, name, section)
    sources = getattr(section, "sources", [])
    for source in sources:
        run.inputs.check(source)
    if any(source.cleaning.contamination for source in sources):
        _ = run.inputs.evaluation_texts  # reads whole files; the check of an evaluation reads only what it measures
    if section.validation is not None:
        run.inputs.check(section.validation.source)


def _check_steps(run: Run, name: str, section: Training) -> None:
    """Refuse fewer steps than a checkpoint has. Now, because beginning the stage writes `steps` into its manifest."""
    place = run.site.storage.checkpoints(name)
    saved = [path.name for path in place.iterdir()] if place.exists() else []
    reached = max((int(step) for step in saved if step.isdecimal()), default=0)
    if section.steps is not None and reached > section.steps:
        raise UserError(
            f"{name}.steps is {section.steps}, but the stage has a checkpoint of step {reached}; raise {name}.steps, "
            f"or redo the stage with --force {name}"
        )


def check_layout(layout: Layout, name: str, section: Training, head_dim: int) -> None:
    """Refuse batches that cannot be sharded over the mesh. Raises UserError that names the config's key."""
    rows, parts = section.batch_size // section.accumulate, layout.batch_parts
    if rows % parts:
        raise UserError(
            f"{name}.batch_size: {rows} rows at once cannot be cut over {parts} devices; take a multiple of "
            f"{parts * section.accumulate}"
        )
    if section.length % layout.size("tensor"):
        raise UserError(f"{name}.length: {section.length} is not a multiple of mesh.tensor {layout.size('tensor')}")
    refusal = splash_supports(section.length, head_dim) if layout.attention == "splash" else None
    if refusal:
        raise UserError(f"{name}.length: {refusal}; change it, or set attention=plain")


def source_parts(run: Run, name: str) -> list[Part]:
    """The sources of a stage's config as parts of its mixture; prints what was left out of each."""
    section, parts = section_of(run, name), []
    for number, source in enumerate(getattr(section, "sources", []), 1):
        rows = planned_rows(run, name, source, section.length)
        title = f"{number} {Path(source.path).name}"
        parts.append(part_of(run, name, title, source, rows, source.weight, source.recovery))
    return parts


def part_of(
    run: Run,
    stage: str,
    name: str,
    source: Source,
    rows: PlannedRows,
    weight: float | None,
    recovery: Recovery = "sequence",
) -> Part:
    """A source's rows as a part of a stage's mixture; prints what was left out of it, except bad rows."""
    items, missing = rows.counts["items"], left_out(rows)
    # Bad rows were printed when the source was read.
    reasons = {reason: count for reason, count in missing.items() if not reason.startswith(BAD_ROWS)}
    if reasons:
        what = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        run.progress.say(f"  {stage}: of {items:,} items of {source.path}: {what}", style="yellow")
    return Part(name, rows, weight, recovery, items, missing, fields_not_read(rows))


def train_stage(
    run: Run, directory: Path, *, name: str, start: str, parts: Callable[[Run], Sequence[Part]]
) -> dict[str, Any]:
    """Train from point `start` on a mixture, and save the result as point `name`. Returns the stage's summary.

    parts: makes the mixture, if the stage has steps.
    """
    if section_of(run, name).steps == 0:
        return _left_out(run, directory, start)
    job = prepare(run, name=name, start=start, parts=parts(run))
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
            **_summary(directory, job, outcome),
            "tokens_per_second": outcome.tokens_per_second,
            "train_seconds": time.monotonic() - started,
        }

    with run.ledger.spend("save"):
        arrays = all_on_host({**outcome.trainable, **job.held}, keep=run.primary)
        return run.peers.run_on_primary(f"the result of {name}", finish) or {}


def _left_out(run: Run, directory: Path, start: str) -> dict[str, Any]:
    """Save point `start` as that of a stage without steps. Returns the stage's summary."""

    def finish() -> dict[str, Any]:
        save_arrays(directory / "trainable", load_arrays(run.models.trainable(start)))
        counts = {"steps": 0, "tokens": 0, "skipped": 0, "tokens_per_second": 0.0, "train_seconds": 0.0}
        return {"text": f"0 steps: as after {start}", **counts, "best": None, "sources": {}}

    with run.ledger.spend("save"):
        return run.peers.run_on_primary(f"the result of {start}", finish) or {}


def prepare(run: Run, *, name: str, start: str, parts: Sequence[Part]) -> Job:
    """A stage's training from point `start` on a mixture of rows; nothing is trained yet.

    The order of batches and the dropout depend only on the run's seed and the stage's name.
    """
    section, seed = section_of(run, name), run.seed_for(name)
    batches = Batches([(part.name, part.rows, part.weight) for part in parts], section.batch_size, seed)
    steps = math.ceil((section.epochs or 1) * batches.steps_per_epoch) if section.steps is None else section.steps
    with run.ledger.spend("init"):
        whole = run.models.split(start)
        split = whole.freeze(path for path in whole.trainable if not trains(run.config, path))
    held = {path: array for path, array in whole.trainable.items() if path not in split.trainable}
    config = loop_config(
        run.models.lora,
        name,
        section,
        steps,
        seed=seed,
        sources=tuple(part.name for part in parts),
        teaching=_teaching(run, section, [part.recovery for part in parts], batches, steps),
        speed=_speed(run, section, new_rows=len(whole.trainable["vocabulary.new"])),
    )
    return Job(split, held, batches, parts, config, _watch(run, name, section, split))


def _teaching(run: Run, section: Training, modes: Sequence[Recovery], batches: Batches, steps: int) -> Teaching | None:
    """Which rows of a batch the original model teaches; None if it teaches none."""
    taught = [number for number, mode in enumerate(modes) if mode != "sequence"]
    if not taught:
        return None
    size = section.batch_size // section.accumulate
    rows = rows_taught(batches.most_rows(taught, size, steps), size, run.models.layout)
    marker = run.models.tokenizer("vocabulary").token_id(run.markers.response)
    return Teaching(tuple(modes), rows, marker, section.recovery_weight)


def rows_taught(most: int, size: int, layout: Layout) -> int:
    """The number of rows for `Teaching`: at least `most` of the `size` rows at once, such that the mesh divides it."""
    return min(-(-most // layout.batch_parts) * layout.batch_parts, size)


def _speed(run: Run, section: Training, new_rows: int) -> Speed:
    """The model FLOPs of a token, and the peak FLOP/s of all devices together, if it is known."""
    lora = run.models.lora
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
    return Speed(flops, None if peak is None else peak * len(jax.devices()))


def loop_config(
    lora: LoraConfig | None,
    name: str,
    section: Training,
    steps: int,
    *,
    seed: int,
    sources: tuple[str, ...],
    teaching: Teaching | None = None,
    speed: Speed | None = None,
) -> LoopConfig:
    """The training loop's settings from a stage's section. Raises UserError if warm-up and decay exceed the steps."""
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
        teaching=teaching,
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
    """How to measure bits per byte on the first rows of the section's validation source; None without validation."""
    validation = section.validation
    if validation is None:
        return None
    rows = validation_rows(run, name, validation.source, section.length)
    number = min(validation.rows, len(rows))
    read = [rows.row(row) for row in range(number)]
    batches = _padded_batches(read, max(section.batch_size // section.accumulate, 1))
    size_in_bytes = sum(rows.bytes(row) for row in range(number))

    def measure(trainable: Flat) -> float:
        total = sum(float(nats(split.structure, trainable, split.frozen, batch)) for batch in batches)
        return total / math.log(2) / size_in_bytes

    return Watch(measure, validation.every, validation.patience, _rows_hash(read))


def _padded_batches(rows: Sequence[dict[str, np.ndarray]], size: int) -> list[dict[str, np.ndarray]]:
    """Batches of `size` rows. Empty rows fill the last one, so that all have one shape and one compiled program."""
    empty = {field: np.zeros_like(values) for field, values in rows[0].items()}
    filled = [*rows, *([empty] * (-len(rows) % size))]
    return [
        {field: np.stack([row[field] for row in filled[first : first + size]]) for field in empty}
        for first in range(0, len(filled), size)
    ]


def _rows_hash(rows: Sequence[dict[str, np.ndarray]]) -> str:
    content = hashlib.sha256()
    for values in (row[key] for row in rows for key in sorted(row)):
        content.update(np.ascontiguousarray(values).tobytes())
    return content.hexdigest()[:16]


def _summary(directory: Path, job: Job, outcome: Outcome) -> dict[str, Any]:
    losses = [row["loss"] for row in read_rows(directory / "metrics.jsonl") if row["loss"] is not None]
    first = losses[0] if losses else math.nan
    tokens = outcome.steps * job.batches.batch_size * job.parts[0].rows.row_length
    text = f"{outcome.steps} steps, {tokens:,} tokens; loss {first:.2f} -> {outcome.last_loss:.2f}"
    if outcome.best is not None:
        measured = {row["step"]: row["bits_per_byte"] for row in read_rows(directory / "validation.jsonl")}
        text += f"; best at step {outcome.best}, {measured[outcome.best]:.3f} bits a byte"
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


def section_of(run: Run, name: str) -> Training:
    """The config's section of a training stage."""
    section: Training = getattr(run.config, name)
    return section
