"""After stage 4: the model as a Hugging Face directory, adapters merged and new rows appended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conversion.export_hf import export_hf
from transllm_jax.artifacts import write_json
from transllm_jax.stages.run import Run
from transllm_jax.training.checkpoint import load_arrays


def inputs(run: Run) -> dict[str, Any]:
    """What the export reads besides the trained point."""
    return {"export": run.config.export.model_dump()}


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write `export/`."""
    export_hf(
        run.base,
        run.workdir / "vocabulary",
        load_arrays(run.trainable("transfer")),
        run.lora.alpha,
        run.lora.rank,
        directory,
        run.config.export.dtype,
    )
    # What `transllm chat` needs to know of an exported model.
    write_json(
        directory / "transllm.json",
        {"language": run.config.language.model_dump(), "markers": asdict(run.markers)},
    )
    size = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    return {"text": f"{size / 1e6:,.0f} MB, {run.config.export.dtype}"}
