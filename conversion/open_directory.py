"""Opens a model directory of either kind: Hugging Face's, or our own checkpoint."""

from __future__ import annotations

from pathlib import Path

from transllm_jax.conversion.hf.directory import HFModel, open_hf
from transllm_jax.conversion.store import MANIFEST, Store, open_store


def open_directory(directory: str | Path) -> HFModel | Store:
    """Open a model directory. Raises UserError as `open_hf` and `open_store` do."""
    directory = Path(directory)
    return open_store(directory) if (directory / MANIFEST).is_file() else open_hf(directory)
