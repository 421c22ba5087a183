"""adapter.json, which describes an adapter without its base: the adapter's shape, and the base that it was made for.

The arrays are in `trainable/` next to it, written by `transllm_jax.training.arrays`, and so is the tokenizer.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transllm_jax.conversion.names import EMBEDDING, tensors
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.disk import read_model_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.model.lora import TARGETS, LoraConfig

ADAPTER = "adapter.json"
FORMAT = "transllm-adapter-1"


@dataclass(frozen=True)
class AdapterDescription:
    """`base`: the path or name of the base at the time; `embedding_sha256`: the hash of its embedding, as float32.

    `source`: what the adapter was made from.
    """

    lora: LoraConfig
    base: str
    embedding_sha256: str
    source: str

    @classmethod
    def of(cls, base: OpenedModel, lora: LoraConfig, *, base_name: str, source: str) -> AdapterDescription:
        """Describe an adapter for an opened base."""
        return cls(lora, base_name, embedding_sha256(base), source)

    def fits(self, base: OpenedModel) -> bool:
        """Whether a base has the same embedding as the one that the adapter was made for."""
        return embedding_sha256(base) == self.embedding_sha256


def embedding_sha256(model: OpenedModel) -> str:
    """The SHA-256 of the embedding's values as float32, which does not depend on the model's file format or dtype."""
    tensor = next(tensor for tensor in tensors(model.config) if tensor.name == EMBEDDING)
    table = model.read(tensor)
    digest = hashlib.sha256()
    for start in range(0, len(table), 4096):
        digest.update(np.ascontiguousarray(table[start : start + 4096], np.float32).data)
    return digest.hexdigest()


def write_adapter(directory: Path, adapter: AdapterDescription) -> None:
    """Write adapter.json."""
    write_json(directory / ADAPTER, {"format": FORMAT, **asdict(adapter)})


def read_adapter(directory: str | Path) -> AdapterDescription:
    """Read adapter.json. Raises UserError if it is missing, damaged, or of another version."""
    path = Path(directory) / ADAPTER
    raw: dict[str, Any] = read_model_json(path)
    if raw.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not of the format {FORMAT}; make it again with transllm convert from-peft")
    try:
        lora = dict(raw.pop("lora"))
        targets = tuple(lora.pop("targets"))
        if not targets or set(targets) - set(TARGETS):
            raise ValueError(f"targets {targets}")
        return AdapterDescription(LoraConfig(**lora, targets=targets), **raw)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); make it again with transllm convert from-peft") from None
