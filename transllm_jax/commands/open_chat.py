"""Open a model to talk to: a run's work directory, on a disk or a store, its original model, or an exported model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from transllm_jax.choices import POINTS
from transllm_jax.config import load_config
from transllm_jax.config.sections import Mesh
from transllm_jax.conversion.hf.tokenizer_files import load_tokenizer
from transllm_jax.conversion.open_directory import open_directory
from transllm_jax.disk import read_json
from transllm_jax.errors import UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.parameters import Split, assemble, load_frozen
from transllm_jax.progress import Progress
from transllm_jax.stages.manifest import Artifact
from transllm_jax.stages.points import ids_without_token, newest_point
from transllm_jax.stages.run import Run
from transllm_jax.storage import open_workdir
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatModel:
    """An opened model. name: for people. early: whether it is that of a run whose last stage, which teaches chains, is
    not done. original: opens the original model inside it; None if there is none.
    """

    name: str
    split: Split
    config: LlamaConfig
    tokenizer: Tokenizer
    markers: Markers
    early: bool = False
    original: Callable[[], ChatModel] | None = None


def open_chat_model(given: Path | str, *, base: bool = False) -> ChatModel:
    """Open a work directory's newest point (with `base`, its original model), or an exported model.

    given: a directory, or the URL of a run on an object store. Raises UserError for a directory that is neither.
    """
    path = _fetched(str(given), base) if "://" in str(given) else Path(given)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a work directory or a model directory")
    if (path / "run.yaml").is_file():
        # The devices here may differ from those of the training.
        config = load_config(path / "run.yaml").model_copy(update={"mesh": Mesh()})
        run = Run(config, path, Progress(quiet=True), Interrupt())
        newest = newest_point(path)
        # The frozen weights of the original are those of the trained model: they are in memory once.
        return _at(run, "base") if base else _at(run, newest, original=lambda: _at(run, "base"))
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is neither a work directory (run.yaml) nor a model directory (config.json)")
    if base:
        raise UserError(f"{path} is an exported model, without the original model in it; give the work directory")
    known = read_json(path / "transllm.json") if (path / "transllm.json").exists() else None
    markers = Markers(**known["markers"]) if known else Markers()
    model = open_directory(path)
    tokenizer = load_tokenizer(path)
    frozen = load_frozen(model.config, model.weights(), jnp.dtype("float32"))
    padding = ids_without_token(tokenizer, model.config.vocab_size)
    return ChatModel(path.name, assemble(model.config, frozen, padding=padding), model.config, tokenizer, markers)


def _at(run: Run, point: str, original: Callable[[], ChatModel] | None = None) -> ChatModel:
    """The model of a run at a point."""
    name = "the original model" if point == "base" else f"the model after {point}"
    if early := point not in ("base", POINTS[-1]):
        name += f", which has learned no chains yet: {POINTS[-1]} is not done"
    models = run.models
    return ChatModel(name, models.split(point), models.config, models.tokenizer(point), run.markers, early, original)


def _fetched(url: str, base: bool) -> Path:
    """Mirror the parts of a run on a store that a conversation needs; return the mirror's directory."""
    place = open_workdir(url)
    if not place.pull("run.yaml"):
        raise UserError(f"{url} is not a run's work directory (it has no run.yaml)")
    for name in ("base", "vocabulary"):
        place.pull(name)
    for point in reversed(POINTS):
        place.pull(point)
        manifest = Artifact(place.local / point, point).manifest()
        if base or (manifest is not None and manifest["state"] == "done"):
            break
    return place.local
