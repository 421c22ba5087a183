"""All that a model's answers depend on besides what it is asked: weights, adapter, tokenizer, chat template, markers.

By content, and not by path: a stage that was redone, or an export that was made again, is another model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transllm_jax.commands.open_chat import ChatModel
from transllm_jax.disk import FileHashes, cache_directory, sha256_of_json
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer


def of_point(run: Run, point: str) -> dict[str, Any]:
    """That of a run's point (JSON)."""
    models = run.models
    return {
        "kind": "model",
        "weights": _hash_of([models.base]),
        "point": point,
        "trained": None if point == "base" else _hash_of([models.trainable(point)]),
        "scale": models.scale,
        "dtype": run.config.model.dtype,
        **_format(models.tokenizer(point), run.markers),
    }


def of_files(opened: ChatModel) -> dict[str, Any]:
    """That of a model that was opened from files (JSON)."""
    return {
        "kind": "model",
        "weights": _hash_of(opened.files),
        "dtype": "float32",
        **_format(opened.tokenizer, opened.markers),
    }


def _hash_of(places: Sequence[Path]) -> str:
    """A hash of all files but notes for people; large ones are hashed once, however often they are used."""
    hashes = FileHashes(cache_directory() / "hashes.json")
    cache_directory().mkdir(parents=True, exist_ok=True)
    found = sha256_of_json(
        [
            (str(file.relative_to(place)), hashes(file))
            for place in places
            for file in (sorted(place.rglob("*")) if place.is_dir() else [place])
            if file.is_file() and file.suffix not in (".md", ".lock")
        ]
    )
    hashes.write()
    return found


def _format(tokenizer: Tokenizer, markers: Markers) -> dict[str, Any]:
    """How a model is asked: its tokenizer, with the chat template (and the date, if that writes it), markers, ends."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "ends": list(end_ids(tokenizer)),
        "markers": list(markers.in_order()),
    }
