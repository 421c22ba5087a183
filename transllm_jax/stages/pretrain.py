"""Stage 2: causal language modelling on target-language text (TransLLM, arXiv 2405.13923)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transllm_jax.stages.run import Run
from transllm_jax.stages.training import Part, check_training, source_parts, train_stage, training_inputs

# The point that the stage goes on from.
START = "vocabulary"


def inputs(run: Run) -> dict[str, Any]:
    """What this stage reads: files and config sections."""
    return training_inputs(run, "pretrain")


def check(run: Run) -> None:
    """What can be known to be wrong before this stage begins. Raises UserError."""
    check_training(run, "pretrain")


def parts(run: Run) -> list[Part]:
    """The rows that the stage trains on, source by source."""
    return source_parts(run, "pretrain")


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Train adapters and new rows from their initial values; resumes from its checkpoint."""
    return train_stage(run, directory, name="pretrain", start=START, parts=parts(run))
