"""What the three training stages share: packed sources in, trained adapters and new rows out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transllm_jax.config import Training
from transllm_jax.data.batches import Batches
from transllm_jax.data.examples import Example, document_examples, translation_examples
from transllm_jax.data.packing import PackedRows, pack
from transllm_jax.data.sources import check_no_special
from transllm_jax.errors import UserError
from transllm_jax.stages.run import Run
from transllm_jax.training.checkpoint import save_arrays
from transllm_jax.training.loop import LoopConfig, train
from transllm_jax.training.metrics import read_rows
from transllm_jax.training.optimizer import OptimizerConfig

# A source of rows: its name, its examples, and its share of the mixture (None: by its size).
Rows = tuple[str, Sequence[Example], float | None]


def train_stage(
    run: Run, directory: Path, *, name: str, start: str, section: Training, rows: Sequence[Rows]
) -> dict[str, Any]:
    """Train from point `start` on a mixture of examples and save the result as point `name`.

    The stage's order of batches and dropout depend on the run's seed and the stage's name alone.
    """
    packed: list[tuple[str, PackedRows, float | None]] = []
    for source, examples, weight in rows:
        if not examples:
            raise UserError(f"{name}: source {source} gave no example to train on; give it more, or shorter, text")
        packed.append((source, pack(examples, section.length), weight))
    seed = run.config.seed + sum(map(ord, name))
    batches = Batches(packed, section.batch_size, seed)
    started = time.monotonic()
    outcome = train(
        run.split(start),
        batches,
        LoopConfig(
            OptimizerConfig(
                learning_rate=section.learning_rate,
                steps=section.steps,
                warmup_steps=round(section.warmup_ratio * section.steps),
                final_fraction=section.final_fraction,
                new_rows_multiplier=section.new_rows_multiplier,
                weight_decay=section.weight_decay,
                clip_norm=section.clip_norm,
            ),
            checkpoint_every=section.checkpoint_every,
            seed=seed,
            dropout=run.config.lora.dropout > 0,
            remat=section.remat,
            log_every=section.log_every,
        ),
        directory,
        run.progress,
        run.interrupt,
    )
    save_arrays(directory / "trainable", outcome.trainable)
    first = read_rows(directory / "metrics.jsonl")[0]["loss"]
    processed = section.steps * section.batch_size * section.length
    epochs = batches.epoch(section.steps)
    return {
        "text": f"{section.steps} steps, {processed:,} tokens; loss {first:.2f} -> {outcome.last_loss:.2f}",
        "steps": section.steps,
        "tokens": processed,
        "tokens_per_second": outcome.tokens_per_second,
        "train_seconds": time.monotonic() - started,
        "sources": {
            source: {
                "examples": len(examples),
                "tokens": rows_of.token_count,
                "rows": len(rows_of),
                "padded_fraction": rows_of.padded_fraction,
                "epochs": epochs[source],
            }
            for (source, examples, _), (_, rows_of, _) in zip(rows, packed, strict=True)
        },
    }


def pretraining_rows(run: Run, name: str) -> list[Rows]:
    """The examples of stage `pretrain` or `translate`, source by source."""
    section = run.config.pretrain if name == "pretrain" else run.config.translate
    tokenizer, markers = run.tokenizer("vocabulary"), run.markers
    rows: list[Rows] = []
    for number, source in enumerate(section.sources):
        loaded = run.read(source)
        check_no_special(loaded, tokenizer.find_special)
        examples: list[Example]
        if source.format == "pairs":
            examples, report = translation_examples(tokenizer, loaded, section.length, markers)
            if report.dropped:
                run.progress.say(
                    f"  [yellow]{name}: {report.dropped} of {2 * report.pairs} translations of {source.path} are "
                    f"longer than {section.length} tokens and left out; raise {name}.length to keep them"
                )
        else:
            examples, _ = document_examples(tokenizer, loaded, section.length)
        rows.append((f"{number + 1} {Path(source.path).name}", examples, source.weight))
    return rows


def check_pretraining(run: Run, name: str) -> None:
    """What can be known to be wrong before stage `pretrain` or `translate` begins. Raises UserError."""
    section = run.config.pretrain if name == "pretrain" else run.config.translate
    run.check_length(f"{name}.length", section.length)
    for source in section.sources:
        run.check(source)


def pretraining_inputs(run: Run, name: str) -> dict[str, Any]:
    """What stage `pretrain` or `translate` reads: files and config sections."""
    section = run.config.pretrain if name == "pretrain" else run.config.translate
    return {
        name: section.model_dump(),
        "seed": run.config.seed,
        **run.hashes(source.path for source in section.sources),
    }


def pretraining_stage(run: Run, directory: Path, name: str, start: str) -> Mapping[str, Any]:
    """Run stage `pretrain` or `translate`: causal LM on its sources."""
    section = run.config.pretrain if name == "pretrain" else run.config.translate
    return train_stage(run, directory, name=name, start=start, section=section, rows=pretraining_rows(run, name))
