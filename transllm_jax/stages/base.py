"""Before stage 1: the chat model is fetched and imported, once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.import_base import import_base
from transllm_jax.stages.run import Run


def inputs(run: Run) -> dict[str, Any]:
    """What the import depends on, and the type that all steps compute in."""
    return {"model": run.config.model.model_dump(exclude={"shape"})}


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write `base/`, a Hugging Face directory."""
    model = run.config.model
    import_base(model.source, directory, sha256=model.sha256, say=lambda line: run.progress.say(f"  {line}"))
    config = run.model_config
    return {"text": f"{config.num_hidden_layers} layers of width {config.hidden_size}, vocabulary {config.vocab_size}"}
