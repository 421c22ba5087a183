"""Open a model to talk to: a run's work directory, on a disk or a store, its original model, or any other model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from transllm_jax.choices import POINTS
from transllm_jax.commands.open_model import Source, open_source, tokenizer_of
from transllm_jax.config import load_config
from transllm_jax.config.sections import Mesh
from transllm_jax.conversion.adapter import ADAPTER
from transllm_jax.conversion.hf.directory import stacked
from transllm_jax.conversion.peft.config import CONFIG as PEFT
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

# Which model writes the English answers, within chains and to English questions.
English = Literal["model", "original"]


@dataclass(frozen=True)
class ChatModel:
    """An opened model. name: for people. early: whether it is that of a run whose last stage, which teaches chains, is
    not done. original: opens the original model inside it; None if there is none. tuned: whether stage `transfer`
    trained it. in_chains: whether it was trained to answer in chains there. files: where it was read from.
    holds_original: whether its split, in mode ORIGINAL, is the original: not after full fine-tuning.
    """

    name: str
    split: Split
    config: LlamaConfig
    tokenizer: Tokenizer
    markers: Markers
    early: bool = False
    original: Callable[[], ChatModel] | None = None
    in_chains: bool = False
    tuned: bool = False
    files: tuple[Path, ...] = ()
    holds_original: bool = False


def open_chat_model(given: Path | str, *, base: bool = False) -> ChatModel:
    """Open a work directory's newest point (with `base`, its original model), or any model of `open_source`.

    given: a directory, the URL of a run on an object store, a GGUF file, or a name on the Hugging Face hub. Raises
    UserError for anything else.
    """
    path = _fetched(str(given), base) if "://" in str(given) else Path(given).expanduser()
    if (path / "run.yaml").is_file():
        run, newest = open_run(path), newest_point(path)
        # The frozen weights of the original are those of the trained model: they are in memory once.
        return at_point(run, "base") if base else at_point(run, newest, original=lambda: at_point(run, "base"))
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", ADAPTER, PEFT)):
        raise UserError(f"{path} is neither a work directory (run.yaml) nor a model directory (config.json)")
    if base:
        raise UserError(f"{given} is no work directory, and has no original model in it; give the run's work directory")
    source = open_source(str(given))
    tokenizer, shape = tokenizer_of(source), source.model.config
    frozen = load_frozen(shape, stacked(source.model), jnp.dtype("float32"))
    split = assemble(shape, frozen, padding=ids_without_token(tokenizer, shape.vocab_size))
    places = {path, source.files, source.tokenizer, Path(source.model.where)} - {None}
    files = tuple(sorted(place for place in places if place is not None and place.exists()))
    tuned = _about(source) is not None
    return ChatModel(source.name, split, shape, tokenizer, _markers(source), in_chains=tuned, tuned=tuned, files=files)


def check_english(opened: ChatModel, english: English) -> None:
    """Raises UserError if the original is to write the English answers, and there is none, or are no chains."""
    if english == "model":
        return
    if opened.original is None:
        raise UserError(f"--english original: no original model is beside {opened.name}; open a run's work directory")
    if not opened.in_chains:
        raise UserError(f"--english original: {opened.name} does not answer in chains; leave the option out")


def original_of(opened: ChatModel, english: English) -> ChatModel | None:
    """The original model inside an opened one, if it is to write the English answers. Raises as `check_english`."""
    check_english(opened, english)
    return opened.original() if english == "original" and opened.original is not None else None


def _markers(source: Source) -> Markers:
    """The markers that an export says it was trained with, or the usual ones."""
    about = _about(source)
    return Markers() if about is None else Markers(**about["markers"])


def _about(source: Source) -> dict[str, Any] | None:
    """What an export says of itself; None for another model."""
    path = None if source.tokenizer is None else source.tokenizer / "transllm.json"
    return read_json(path) if path is not None and path.exists() else None


def open_run(workdir: Path) -> Run:
    """A run whose models are only used."""
    # The devices here may differ from those of the training.
    config = load_config(workdir / "run.yaml").model_copy(update={"mesh": Mesh()})
    return Run(config, workdir, Progress(quiet=True), Interrupt())


def at_point(run: Run, point: str, original: Callable[[], ChatModel] | None = None) -> ChatModel:
    """The model of a run at a point."""
    name = "the original model" if point == "base" else f"the model after {point}"
    if early := point not in ("base", POINTS[-1]):
        name += f", which has learned no chains yet: {POINTS[-1]} is not done"
    models, tuned = run.models, point == POINTS[-1] and run.config.transfer.steps != 0
    return ChatModel(
        name,
        models.split(point),
        models.config,
        models.tokenizer(point),
        run.markers,
        early,
        original,
        in_chains=tuned and run.config.transfer.answers == "chains",
        tuned=tuned,
        files=(models.base,) if point == "base" else (models.base, models.trainable(point)),
        holds_original=point != "base" and models.lora is not None,
    )


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
