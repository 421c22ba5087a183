"""After stage 4: the model as a Hugging Face directory, adapters merged and new rows appended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transllm_jax.conversion.hf.directory import open_hf
from transllm_jax.conversion.hf.export import export_hf
from transllm_jax.conversion.merged import Merged
from transllm_jax.disk import write_json
from transllm_jax.stages.points import chat_metadata
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.llama_cpp import misread_message, readers_of
from transllm_jax.training.arrays import load_arrays


def inputs(run: Run) -> dict[str, Any]:
    """The export's inputs besides the trained point."""
    return {"export": run.config.export.model_dump()}


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write `export/`."""
    model = Merged(open_hf(run.models.base), load_arrays(run.models.trainable("transfer")), run.models.scale)

    def describe(place: Path) -> None:
        write_json(place / "transllm.json", {**chat_metadata(run.config), "readers": readers_of(place)})

    export_hf(
        model,
        run.models.base,
        directory,
        tokenizer_dir=run.workdir / "vocabulary",
        dtype=run.config.export.dtype,
        also=describe,
    )
    size = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    text = f"{size / 1e6:,.0f} MB, {run.config.export.dtype}"
    if warning := misread_message(directory):
        text += f"; {warning}"
    return {"text": text}
