"""What of a model trains, as a run's config says."""

from __future__ import annotations

from transllm_jax.config import Config
from transllm_jax.model.lora import LoraConfig


def lora_of(config: Config) -> LoraConfig | None:
    """The adapters' shape; None where all weights train."""
    lora = config.lora
    return None if lora is None else LoraConfig(lora.rank, lora.alpha, lora.dropout, lora.rslora, tuple(lora.targets))


def trains(config: Config, path: str) -> bool:
    """Whether an array of a point changes in training; of the vocabulary, some stay as they are."""
    if not path.startswith("vocabulary."):
        return True
    new = path in ("vocabulary.new", "vocabulary.output_new")
    return {"all": True, "new": new, "none": False}[config.embeddings]
