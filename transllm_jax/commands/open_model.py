"""Open a model, whatever the path is: a run at a stage, an adapter on its base, a model directory or a GGUF file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transllm_jax.choices import POINTS
from transllm_jax.commands.open_tokenizer import open_tokenizer
from transllm_jax.config import load_config
from transllm_jax.conversion.adapter import ADAPTER, AdapterDescription, read_adapter
from transllm_jax.conversion.fetch import fetch
from transllm_jax.conversion.gguf.weights import GGUFModel, open_gguf
from transllm_jax.conversion.hf.directory import open_hf
from transllm_jax.conversion.hf.tokenizer_files import has_tokenizer
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.open_directory import open_directory
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.conversion.peft.config import CONFIG
from transllm_jax.conversion.peft.read import open_peft, read_peft
from transllm_jax.disk import read_model_json
from transllm_jax.errors import UserError
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.model.lora import LoraConfig
from transllm_jax.progress import Progress
from transllm_jax.stages.points import chat_metadata, newest_point
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays


@dataclass(frozen=True)
class Source:
    """An opened model, the directories of its config and tokenizer and, if it was trained, its LoRA config and origin.

    `files` is None for a GGUF file, which holds everything itself.
    """

    model: OpenedModel
    files: Path | None
    tokenizer: Path | None
    lora: LoraConfig | None = None
    about: dict[str, Any] | None = None
    name: str = ""

    @property
    def bare(self) -> bool:
        """Whether the model has no tokenizer."""
        return not isinstance(self.model, GGUFModel) and (self.tokenizer is None or not has_tokenizer(self.tokenizer))


def open_source(source: str, *, base: str | None = None, stage: str | None = None) -> Source:
    """Open a run's work directory, an adapter (ours or PEFT's), a model directory of either kind, or a GGUF file.

    `base` is where an adapter's base is, if not where the adapter says. Raises UserError for anything else.
    """
    path = Path(source).expanduser()
    if (path / "run.yaml").is_file():
        return _open_run(path, stage)
    if stage is not None:
        raise UserError(f"{source} is not a run's work directory, so it has no stage {stage!r}; leave the stage out")
    if (path / ADAPTER).is_file():
        found = read_adapter(path)
        below = _open_base(path, base, found.base)
        check_base(found, below, path)
        merged = Merged(below.model, load_arrays(path / "trainable"), found.lora.scale)
        return Source(merged, below.files, path, found.lora, name=path.name)
    if (path / CONFIG).is_file():
        below = _open_base(path, base, None if base else peft_base(path))
        peft = read_peft(path, below.model)
        tokenizer = peft.tokenizer_dir or below.tokenizer
        return Source(open_peft(peft, below.model), below.files, tokenizer, peft.lora, name=path.name)
    if base is not None:
        raise UserError(f"{source} is no adapter, so it needs no --base; leave it out")
    fetched = fetch(source)
    if fetched.kind == "gguf":
        return Source(open_gguf(fetched.path), None, None, name=fetched.path.name)
    return Source(open_directory(fetched.path), fetched.path, fetched.path, name=fetched.path.name)


def _open_base(adapter: Path, given: str | None, named: str | None) -> Source:
    """Open an adapter's base: the one that the user gave, or else the one that the adapter names."""
    if given is not None:
        return open_source(given)
    try:
        return open_source(str(named))
    except UserError as error:
        raise UserError(
            f"{adapter} names the base {named}, which cannot be read ({error}); give it with --base"
        ) from None


def _open_run(workdir: Path, stage: str | None) -> Source:
    run = Run(load_config(workdir / "run.yaml"), workdir, Progress(quiet=True), Interrupt())
    point = stage or newest_point(workdir)
    if point not in POINTS:
        raise UserError(f"--stage {point} does not change the model; use one of {', '.join(POINTS)}")
    if point == "base":
        return Source(open_hf(run.models.base), run.models.base, run.models.base, name="base")
    trainable = run.models.trainable(point)
    if not trainable.is_dir():
        raise UserError(f"{workdir}: stage {point} is not done yet; its newest is {newest_point(workdir)}")
    merged = Merged(open_hf(run.models.base), load_arrays(trainable), run.models.scale)
    return Source(merged, run.models.base, workdir / "vocabulary", run.models.lora, chat_metadata(run.config), point)


def peft_base(directory: Path) -> str:
    """The base that a PEFT adapter names. Raises UserError if it names none."""
    base = read_model_json(directory / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{directory / CONFIG} names no base_model_name_or_path; give the base with --base")
    return base


def check_base(adapter: AdapterDescription, base: Source, where: Path) -> None:
    """Raises UserError if an adapter was made for another base."""
    if not adapter.fits(base.model):
        raise UserError(f"{where} was made for another base than {base.model.where}; give its own with --base")


def tokenizer_of(found: Source) -> Tokenizer:
    """The tokenizer of an opened model; one in a GGUF file, or in a tokenizer.model alone, is converted first."""
    where = found.model.where if isinstance(found.model, GGUFModel) else found.tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        return open_tokenizer(str(where), Path(scratch)).tokenizer
