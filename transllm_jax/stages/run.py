"""What every stage is given: the config, the work directory, a voice, and the models and tokenizers of its points.

A point is a state of the model in the course of a run: `base` (the original chat model) and, after each stage that
changes it, `vocabulary`, `pretrain`, `translate`, `transfer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from conversion.hf import read_config, read_weights
from transllm_jax.artifacts import Artifact, file_hash
from transllm_jax.config import Config, Source
from transllm_jax.data import sources
from transllm_jax.errors import UserError
from transllm_jax.evaluation.likelihood import Teacher
from transllm_jax.interrupt import Interrupt
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import Flat, Split, assemble, load_frozen
from transllm_jax.model.vocabulary import Padding, padding_of
from transllm_jax.progress import Progress
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.chat import encode_prompt
from transllm_jax.tokenizer.sentencepiece_model import unused
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.checkpoint import load_arrays

POINTS = ("base", "vocabulary", "pretrain", "translate", "transfer")


class Run:
    """One run of the pipeline. The frozen weights are read once and shared by the models of all points."""

    def __init__(self, config: Config, workdir: Path, progress: Progress, interrupt: Interrupt) -> None:
        self.config = config
        self.workdir = workdir
        self.progress = progress
        self.interrupt = interrupt
        # The original model with its answers to held-out questions; made by the first evaluation, used by all.
        self.teacher: Teacher | None = None
        self._tokenizers: dict[str, Tokenizer] = {}
        self._hashes: dict[Path, str] = {}
        self._checked: set[Source] = set()

    @property
    def base(self) -> Path:
        """The imported chat model: a Hugging Face directory."""
        return self.workdir / "base"

    @cached_property
    def model_config(self) -> LlamaConfig:
        """The base model's shape."""
        return read_config(self.base)

    @property
    def lora(self) -> LoraConfig:
        """The adapters' shape."""
        lora = self.config.lora
        return LoraConfig(lora.rank, lora.alpha, lora.dropout, lora.rslora, tuple(lora.targets))

    @property
    def markers(self) -> Markers:
        """The chain's markers."""
        markers = self.config.markers
        return Markers(markers.english, self.config.target_marker, markers.response)

    @cached_property
    def frozen(self) -> Flat:
        """The base model's weights, on the device."""
        dtype = jnp.dtype(self.config.model.dtype)
        return load_frozen(self.model_config, read_weights(self.base, dtype), dtype)

    def tokenizer(self, point: str) -> Tokenizer:
        """The tokenizer at a point: the base's own, or the expanded one."""
        name = "base" if point == "base" else "vocabulary"
        if name not in self._tokenizers:
            self._tokenizers[name] = Tokenizer.load(self.workdir / name)
        return self._tokenizers[name]

    def split(self, point: str) -> Split:
        """The model at a point."""
        rows, lora, trainable = self.model_config.vocab_size, None, None
        if point != "base":
            lora, trainable = self.lora, load_arrays(self.trainable(point))
            rows += len(trainable.get("vocabulary.new", ()))
        padding = tokenless(self.tokenizer(point), rows)
        return assemble(self.model_config, self.frozen, lora=lora, trainable=trainable, padding=padding)

    def trainable(self, point: str) -> Path:
        """Where a point's adapters and new rows lie."""
        return self.workdir / point / "trainable"

    def read(self, source: Source) -> sources.Loaded[Any]:
        """Documents of a `text` source, (English, target) pairs of a `pairs` source."""
        if source.format == "pairs":
            return sources.read_pairs(source.path, limit=source.limit, controls=source.controls)
        return sources.read_documents(
            source.path, limit=source.limit, separator=source.separator, controls=source.controls
        )

    def read_target(self, source: Source) -> list[str]:
        """Texts in the target language: documents, or of pairs that side."""
        loaded = self.read(source)
        sources.check_no_special(loaded, self.tokenizer("base").find_special)
        return [item[1] if source.format == "pairs" else item for item in loaded]

    def read_english(self, source: Source) -> list[str]:
        """English texts: documents, or of pairs that side."""
        return [item[0] if source.format == "pairs" else item for item in self.read(source)]

    def find_special(self, text: str) -> str | None:
        """The first of the base model's special tokens or the chain's markers in a text: no user data may hold one."""
        found = self.tokenizer("base").find_special(text)
        return found or next((marker for marker in self.markers.in_order() if marker in text), None)

    def check(self, source: Source) -> None:
        """Read a source for its faults alone, once. Raises UserError with file and line."""
        source = source.model_copy(update={"weight": None})
        if source not in self._checked:
            sources.check_no_special(self.read(source), self.find_special)
            self._checked.add(source)

    def check_length(self, key: str, length: int) -> None:
        """Refuse a length in tokens above the model's context. Raises UserError that names the config's key."""
        context = self.model_config.context
        if length > context:
            raise UserError(f"{key} is {length}, the model's context is {context} tokens; lower {key}")

    def check_room(self, questions: Iterable[tuple[str, sources.Place]], key: str, new_tokens: int) -> None:
        """Refuse a question that exceeds the model's context together with an answer of `new_tokens`.

        Raises UserError that names its place and the config's key.
        """
        tokenizer, context = self.tokenizer("base"), self.model_config.context

        def length(text: str) -> int:
            return len(encode_prompt(tokenizer, [{"role": "user", "content": text}]))

        frame = length("a")
        for text, place in questions:
            # A token holds a byte at least, so most questions need not be encoded.
            if frame + len(text.encode()) + new_tokens <= context:
                continue
            tokens = length(text)
            if tokens + new_tokens > context:
                raise UserError(
                    f"{place}: a prompt of {tokens} tokens and {key} {new_tokens} exceed the model's context of "
                    f"{context}; shorten the text or lower {key}"
                )

    def hashes(self, paths: Iterable[str]) -> dict[str, str]:
        """The hashes of the files that these paths (or globs) mean, for a step's inputs.

        Raises UserError for a path that means none.
        """
        files = [file for path in paths for file in sources.resolve(path)]
        for file in files:
            if file not in self._hashes:
                self._hashes[file] = file_hash(file)
        # Named by the path as given, which the user knows; the content is what counts.
        return {f"file {file}": self._hashes[file] for file in files}


def token_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that stand for something, in order: not those of names that only fill the gap before new ids."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return sorted(number for token, number in vocabulary.items() if token != unused(number))


def tokenless(tokenizer: Tokenizer, rows: int) -> Padding:
    """The ids of a table of so many rows that a tokenizer has no token for."""
    return padding_of(token_ids(tokenizer), rows)


def about(run: Run) -> dict[str, Any]:
    """What `transllm chat` needs to know of an exported model, its `transllm.json`."""
    return {"language": run.config.language.model_dump(), "markers": asdict(run.markers)}


def newest_point(workdir: Path) -> str:
    """The last point of a run that is done. Raises UserError before the first."""
    for point in reversed(POINTS):
        manifest = Artifact(workdir / point, point).manifest()
        if manifest is not None and manifest["state"] == "done":
            return point
    raise UserError(f"{workdir}: no stage is done yet; run `transllm run` first")
