"""Stage 2: causal language modelling on target-language text (TransLLM, arXiv 2405.13923)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transllm_jax.stages.run import Run
from transllm_jax.stages.training import Part, check_training, source_parts, train_stage, training_inputs

# The point from which the stage starts.
START = "vocabulary"


def inputs(run: Run) -> dict[str, Any]:
    """The stage's inputs: the config sections and files that it reads."""
    return training_inputs(run, "pretrain")


def check(run: Run) -> None:
    """Find what is wrong with the stage's config and files before it begins. Raises UserError."""
    check_training(run, "pretrain")


def parts(run: Run) -> list[Part]:
    """The parts of the stage's mixture: one per source."""
    return source_parts(run, "pretrain")


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Train adapters and new rows from their initial values, or from the stage's own last checkpoint."""
    return train_stage(run, directory, name="pretrain", start=START, parts=parts)
