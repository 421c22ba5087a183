"""Hugging Face model directories: reads config and weights into our layout, and writes them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from transllm_jax.conversion.hf.safetensors_io import (
    DTYPES,
    MAX_SHARD_BYTES,
    Entry,
    count_not_finite,
    dtype_of,
    open_checkpoint,
    read_tensor,
    same_values,
    write_tensors,
)
from transllm_jax.conversion.hf.tokenizer_files import copy_tokenizer
from transllm_jax.conversion.names import DERIVED, EMBEDDING, OUTPUT, Tensor, collapse, tensors, to_hf, weight_shapes
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.disk import read_model_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.new_directory import new_directory

# Of a directory as Meta's download script leaves it.
_META = (
    "is missing: params.json is Meta's own format, which is not read; give the model's Hugging Face edition, such as "
    "meta-llama/Llama-2-7b-chat-hf"
)
# Fields of config.json that mean the model would be read wrongly -> why it is refused and how to fix it.
_REFUSED = {
    "quantization_config": "quantised weights are not read; use the unquantised model",
    "auto_map": "the model brings its own code, which is not run; use a plain LLaMA model",
}


def read_config(directory: str | Path) -> LlamaConfig:
    """The model's shape from `config.json`. Raises UserError if it is missing or not a supported LLaMA."""
    return parse_config(read_model_json(Path(directory) / "config.json"), directory)


def parse_config(raw: dict[str, Any], where: str | Path) -> LlamaConfig:
    """`read_config` from the dictionary of a `config.json` in the directory `where`."""
    for field, reason in _REFUSED.items():
        if raw.get(field):
            raise UserError(f"{Path(where) / 'config.json'}: {field} is set; {reason}")
    try:
        return LlamaConfig.from_hf(raw)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _match(directory: Path, config: LlamaConfig, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The checkpoint's tensors that belong to `config`; raises UserError as `open_hf` does."""
    table = {tensor.name: tensor for tensor in tensors(config)}
    problems = []
    missing = table.keys() - entries.keys()
    if missing:
        problems.append(f"missing: {collapse(missing)}")
    tied = config.tie_word_embeddings and OUTPUT in entries
    extra = {name for name in entries.keys() - table.keys() if not DERIVED.match(name)} - {OUTPUT if tied else ""}
    if extra:
        problems.append(f"not part of the model: {collapse(extra)}")
    known = [name for name in table if name in entries] + ([OUTPUT] if tied else [])
    for name in known:
        expected = table[EMBEDDING if name not in table else name].shape
        if entries[name].shape != expected:
            problems.append(f"{name} has shape {list(entries[name].shape)}, config.json says {list(expected)}")
        if entries[name].dtype not in DTYPES:
            problems.append(f"{name} has type {entries[name].dtype}, only {', '.join(DTYPES)} are read")
    if problems:
        raise UserError(
            f"{directory}: the tensors are not those of its config.json; {'; '.join(problems)}; "
            "fetch the model again or correct config.json"
        )
    if tied and not same_values(entries[OUTPUT], entries[EMBEDDING]):
        raise UserError(
            f"{directory}: config.json says tie_word_embeddings, but {OUTPUT} differs from {EMBEDDING}; "
            "set tie_word_embeddings to false if the output rows are to be kept"
        )
    return {name: entries[name] for name in table}


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face directory, opened (see `transllm_jax.conversion.opened`). `raw` is its config.json.

    `dropped` are tensors in the files that others determine: the output rows of a tied model, RoPE's buffers.
    `notes` are lines about other weights in the directory, which are not read.
    """

    directory: Path
    config: LlamaConfig
    raw: dict[str, Any]
    entries: dict[str, Entry]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The directory's path."""
        return str(self.directory)

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        """The tensor's type in the file."""
        return DTYPES[self.entries[tensor.name].dtype]

    def read(self, tensor: Tensor) -> np.ndarray:
        """The tensor as it is stored."""
        return read_tensor(self.entries[tensor.name])

    def weights(self, dtype: DTypeLike = np.float32) -> dict[str, np.ndarray]:
        """All weights in our layout; see `read_weights`."""
        return stacked(self, dtype)


def open_hf(directory: str | Path) -> HFModel:
    """Open a Hugging Face directory without reading its weights.

    `lm_head.weight` of a tied model is accepted only if it equals the embedding. Rotary `inv_freq` buffers are left out
    because `rope_theta` determines them. Raises UserError as `read_config` does, and for tensors that are missing,
    extra, of the wrong shape or not F32, F16 or BF16 (all are listed).
    """
    directory = Path(directory)
    own_format = (directory / "params.json").is_file()
    raw = read_model_json(directory / "config.json", missing=_META if own_format else None)
    config = parse_config(raw, directory)
    found, notes = open_checkpoint(directory)
    entries = _match(directory, config, found)
    return HFModel(directory, config, raw, entries, tuple(sorted(found.keys() - entries.keys())), tuple(notes))


def read_weights(directory: str | Path, dtype: DTypeLike = np.float32) -> dict[str, np.ndarray]:
    """A model directory's weights in our layout: path -> array, kernels `[L, in, out]`, in `dtype`.

    Tensors are read one at a time into the stacked arrays: memory is one copy of the weights plus one tensor. `dtype`
    may be `ml_dtypes.bfloat16` (or `jax.numpy.bfloat16`, which is the same).

    Raises UserError for tensors that are missing, extra, of the wrong shape, NaN or infinite, for truncated files, and
    for pickle checkpoints.
    """
    return open_hf(directory).weights(dtype)


def stacked(model: OpenedModel, dtype: DTypeLike = np.float32) -> dict[str, np.ndarray]:
    """All weights of an opened model in our layout.

    Raises UserError, which lists all tensors with values that are NaN or infinite.
    """
    weights = {path: np.empty(shape, dtype) for path, shape in weight_shapes(model.config).items()}
    bad: dict[str, int] = {}
    for tensor in tensors(model.config):
        array = model.read(tensor)
        if found := count_not_finite(array):
            bad[tensor.name] = found
        to_hf(weights, tensor)[...] = array
    if bad:
        raise not_finite(model.where, bad)
    return weights


def read_parts(model: OpenedModel, path: str, parts: Sequence[tuple[slice, ...]], dtype: DTypeLike) -> list[np.ndarray]:
    """Parts of one of our weights, for a `transllm_jax.model.layout.Reader`; each of the weight's tensors is read once.

    A part has a slice without a step for each dimension, and all layers. Memory is the parts plus one tensor.
    Raises UserError, which lists the weight's tensors with values that are NaN or infinite.
    """
    shape = weight_shapes(model.config)[path]
    found = [np.empty([len(range(*p.indices(n))) for p, n in zip(part, shape, strict=True)], dtype) for part in parts]
    bad: dict[str, int] = {}
    for tensor in (tensor for tensor in tensors(model.config) if tensor.path == path):
        array = model.read(tensor)
        if count := count_not_finite(array):
            bad[tensor.name] = count
        array = array.T if tensor.transposed else array
        for part, target in zip(parts, found, strict=True):
            if tensor.layer is None:
                target[...] = array[part]
            else:
                target[tensor.layer] = array[part[1:]]
    if bad:
        raise not_finite(model.where, bad)
    return found


def require_all_finite(model: OpenedModel, advance: Callable[[int], None] | None = None) -> None:
    """Read every tensor once. Raises UserError, which lists all tensors with values that are NaN or infinite."""
    bad: dict[str, int] = {}
    for tensor in tensors(model.config):
        array = model.read(tensor)
        if found := count_not_finite(array):
            bad[tensor.name] = found
        if advance is not None:
            advance(array.nbytes)
    if bad:
        raise not_finite(model.where, bad)


def not_finite(where: str, bad: dict[str, int]) -> UserError:
    """The error for values that are NaN or infinite; `bad` is their number by tensor."""
    count = sum(bad.values())
    return UserError(f"{where}: {count} values are NaN or infinite, in {collapse(bad)}; fetch the model again")


def write_model(
    dst: str | Path,
    config: LlamaConfig,
    weights: dict[str, np.ndarray],
    *,
    dtype: str = "float32",
    tokenizer_dir: str | Path | None = None,
    extra_config: dict[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write our weights as a Hugging Face directory; the reverse of `read_weights`, bit for bit in float32.

    `weights` has the paths and shapes of `names.weight_shapes(config)`. `extra_config` adds fields to config.json
    (`eos_token_id`, ...), and its token ids are also written to generation_config.json. Atomic; raises UserError as
    `new_directory` does.
    """
    shapes = weight_shapes(config)
    if weights.keys() != shapes.keys():
        raise ValueError(f"weights and config disagree about {sorted(weights.keys() ^ shapes.keys())}")
    target = dtype_of(dtype)

    def get(tensor: Tensor) -> np.ndarray:
        return to_hf(weights, tensor)

    with new_directory(Path(dst), overwrite=overwrite) as directory:
        write_tensors(directory, tensors(config), get, target, max_shard_bytes=max_shard_bytes)
        write_config(directory, {**config.to_hf(), **(extra_config or {})}, dtype)
        if tokenizer_dir is not None:
            copy_tokenizer(Path(tokenizer_dir), directory)


_GENERATION_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_config(directory: Path, raw: dict[str, Any], dtype: str, generation: dict[str, Any] | None = None) -> None:
    """Write config.json and generation_config.json.

    `raw` is the config.json dictionary. `generation` is the generation_config.json dictionary, by default made from the
    token ids in `raw`. The type of the weights is written as `dtype` (transformers 5) and `torch_dtype` (earlier).
    """
    write_json(directory / "config.json", {**raw, "dtype": dtype, "torch_dtype": dtype})
    if generation is None:
        generation = generation_of(raw)
    write_json(directory / "generation_config.json", generation)


def generation_of(raw: dict[str, Any]) -> dict[str, Any]:
    """A generation_config.json from a config.json: its token ids."""
    return {field: raw[field] for field in _GENERATION_FIELDS if raw.get(field) is not None}
