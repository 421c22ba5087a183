"""The points of a run, which are states of the model, and which arrays train.

`base` is the original chat model; each stage that changes the model produces the point of its own name.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transllm_jax.choices import POINTS
from transllm_jax.config import Config
from transllm_jax.errors import UserError
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.vocabulary import Padding, padding_of
from transllm_jax.stages.manifest import Artifact
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.sentencepiece_model import unused
from transllm_jax.tokenizer.tokenizer import Tokenizer


def newest_point(workdir: Path) -> str:
    """The last point that is done. Raises UserError if none is."""
    for point in reversed(POINTS):
        manifest = Artifact(workdir / point, point).manifest()
        if manifest is not None and manifest["state"] == "done":
            return point
    raise UserError(f"{workdir}: no stage is done yet; run `transllm run` first")


def lora_of(config: Config) -> LoraConfig | None:
    """The adapters' shape; None where all weights train."""
    lora = config.lora
    return None if lora is None else LoraConfig(lora.rank, lora.alpha, lora.dropout, lora.rslora, tuple(lora.targets))


def trains(config: Config, path: str) -> bool:
    """Whether this array of a point trains. `config.embeddings` says which arrays of the vocabulary do."""
    if not path.startswith("vocabulary."):
        return True
    new = path in ("vocabulary.new", "vocabulary.output_new")
    return {"all": True, "new": new, "none": False}[config.embeddings]


def markers_of(config: Config) -> Markers:
    """The chain's markers."""
    return Markers(config.markers.english, config.target_marker, config.markers.response)


def chat_metadata(config: Config) -> dict[str, Any]:
    """What `transllm chat` needs to know about an exported model: the content of its `transllm.json`."""
    return {"language": config.language.model_dump(), "markers": asdict(markers_of(config))}


def token_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of real tokens, in order, without the placeholders that fill a gap before the new ids."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return sorted(number for token, number in vocabulary.items() if token != unused(number))


def ids_without_token(tokenizer: Tokenizer, rows: int) -> Padding:
    """The ids below `rows` that a tokenizer has no token for."""
    return padding_of(token_ids(tokenizer), rows)
