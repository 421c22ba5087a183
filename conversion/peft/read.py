"""Reads an adapter that PEFT trained as our trainable arrays: LoRA's factors and rows of the vocabulary."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transllm_jax.conversion.hf.safetensors_io import DTYPES, Entry, count_not_finite, read_header, read_tensor
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.names import KERNELS, collapse, kernel_shapes
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.conversion.peft.config import PREFIX, WEIGHTS, PeftConfig, read_peft_config
from transllm_jax.conversion.peft.tables import Tables
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import LoraConfig

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as our trainable arrays.

    `trainable` is float32: `PATH.a` [L, in, R] and `PATH.b` [L, R, out] for each kind of layer in `lora.targets`;
    `vocabulary.new` [n, D] if there are n `new_rows`; `vocabulary.base_trained` [V, D] if base rows were trained; for
    an untied model also `vocabulary.output_new` and `vocabulary.output_base_trained`. `tokenizer_dir` is the adapter's
    directory if it has a tokenizer.
    """

    lora: LoraConfig
    trainable: dict[str, np.ndarray]
    new_rows: int
    tokenizer_dir: Path | None


def read_peft(adapter_dir: str | Path, base: OpenedModel) -> PeftAdapter:
    """Read the directory of a LoRA adapter that was trained on `base` and saved by PEFT's `save_pretrained`.

    Raises UserError for options that are not supported; for tensors that are missing, extra, of the wrong shape, not
    F32, F16 or BF16, or not finite (all are listed); for vocabulary rows that do not fit the base's tables; and for a
    pickle file.
    """
    directory = Path(adapter_dir)
    config = read_peft_config(directory)
    entries = _open(directory)
    tables = Tables(base, config, entries, directory)
    lora = _Adapters(base.config, config, entries)
    faults = lora.faults + tables.faults
    if extra := entries.keys() - lora.shapes.keys() - tables.shapes.keys():
        faults.append(f"not part of a LoRA adapter of this model: {_listed(extra)}")
    wanted = lora.shapes | tables.shapes
    missing = (lora.shapes.keys() | tables.required) - entries.keys()
    if missing:
        faults.append(f"missing: {_listed(missing)}")
    bad = []
    for name in sorted(wanted.keys() & entries.keys()):
        entry = entries[name]
        if entry.shape != wanted[name]:
            faults.append(f"{_listed([name])} has shape {list(entry.shape)}, expected {list(wanted[name])}")
        if entry.dtype not in DTYPES:
            faults.append(f"{_listed([name])} has type {entry.dtype}, only {', '.join(DTYPES)} are read")
        elif count_not_finite(read_tensor(entry)):
            bad.append(name)
    if bad:
        faults.append(f"with values that are NaN or infinite: {_listed(bad)}")
    if faults:
        raise UserError(f"{directory / WEIGHTS}: {'; '.join(faults)}; was the adapter trained on this base model?")
    trainable = lora.read() | tables.read()
    has_tokenizer = any((directory / name).is_file() for name in _TOKENIZERS)
    return PeftAdapter(
        config.lora([path.rpartition(".")[2] for path in lora.paths]),
        trainable,
        len(trainable.get("vocabulary.new", ())),
        directory if has_tokenizer else None,
    )


def open_peft(adapter: PeftAdapter, base: OpenedModel) -> Merged:
    """The base with the adapter merged, read tensor by tensor. Raises UserError if it does not fit the base."""
    return Merged(base, adapter.trainable, adapter.lora.scale)


class _Adapters:
    """LoRA's tensors in an adapter file. `shapes` are those that must be there; `faults` are messages about others."""

    def __init__(self, config: LlamaConfig, peft: PeftConfig, entries: dict[str, Entry]) -> None:
        self.entries = entries
        self.rank = peft.rank
        self.sizes = kernel_shapes(config)
        self.layers = config.num_hidden_layers
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.faults: list[str] = []
        self.paths: list[str] = []
        without_adapter = []
        for path, (size_in, size_out) in self.sizes.items():
            targeted = [peft.targeted(_module(path, layer)) for layer in range(self.layers)]
            present = [any(name in entries for name in self._pair(path, layer)) for layer in range(self.layers)]
            if peft.targets is None:
                targeted = present
            if not any(targeted):
                continue
            self.paths.append(path)
            for layer in range(self.layers):
                if targeted[layer]:
                    a, b = self._pair(path, layer)
                    self.shapes |= {a: (self.rank, size_in), b: (size_out, self.rank)}
                else:
                    without_adapter.append(_module(path, layer))
        if without_adapter:
            listed = collapse(without_adapter)
            self.faults.append(f"without an adapter, which other layers have: {listed}; every layer must have one")
        if not self.paths:
            self.faults.append("target_modules names no linear layer of this model")

    def read(self) -> dict[str, np.ndarray]:
        """`PATH.a` [L, in, R] and `PATH.b` [L, R, out] for each kind of layer, in float32."""
        arrays = {}
        for path in self.paths:
            pairs = [self._pair(path, layer) for layer in range(self.layers)]
            for end, names in zip("ab", zip(*pairs, strict=True), strict=True):
                stack = [read_tensor(self.entries[name]).T for name in names]
                arrays[f"{path}.{end}"] = np.stack(stack).astype(np.float32)
        return arrays

    def _pair(self, path: str, layer: int) -> tuple[str, str]:
        name = f"{PREFIX}{_module(path, layer)}"
        return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def _module(path: str, layer: int) -> str:
    return f"model.layers.{layer}.{KERNELS[path]}"


def _open(directory: Path) -> dict[str, Entry]:
    file = directory / WEIGHTS
    if not file.is_file():
        pickles = sorted(path.name for path in directory.glob("adapter_model*.bin"))
        if pickles:
            raise UserError(
                f"{directory} holds a pickle file only ({', '.join(pickles)}), which can run code when read; load it "
                "with PEFT where you trust it, and save_pretrained it again with safe_serialization=True"
            )
        raise UserError(f"{file} is missing; is this the complete directory of an adapter?")
    return read_header(file)


def _listed(names: Collection[str]) -> str:
    """The names without PEFT's prefix, layers of one kind together; names that lack the prefix are marked."""
    with_prefix = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    without = [f"{name} (without the prefix {PREFIX})" for name in sorted(names) if not name.startswith(PREFIX)]
    return ", ".join([collapse(with_prefix), *without] if with_prefix else without)
