"""Before stage 1: the chat model is fetched and imported, once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transllm_jax.conversion.import_base import import_base
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.chat import check_template
from transllm_jax.tokenizer.ends import unnamed_end


def inputs(run: Run) -> dict[str, Any]:
    """The inputs of the import; among them the dtype in which all steps compute."""
    return {"model": run.config.model.model_dump(exclude={"shape"})}


def check(run: Run) -> None:
    """Refuse a chat template that cannot be trained on, hours before the stage that uses it. Raises UserError.

    Prints which token ends an answer if the model's files do not name it.
    """
    tokenizer = run.models.tokenizer("base")
    check_template(tokenizer)
    if end := unnamed_end(tokenizer):
        run.progress.say(
            f"  the chat template ends an answer with {end}, which no file of the model names as eos: generation stops "
            "there too, and the export names it",
        )


def run_stage(run: Run, directory: Path) -> Mapping[str, Any]:
    """Write `base/`, a Hugging Face directory."""
    model = run.config.model
    import_base(model.source, directory, sha256=model.sha256, say=lambda line: run.progress.say(f"  {line}"))
    config = run.models.config
    return {"text": f"{config.num_hidden_layers} layers of width {config.hidden_size}, vocabulary {config.vocab_size}"}
