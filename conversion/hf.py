"""Hugging Face model directories: config and weights, read into our layout and written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from conversion.directories import new_directory, read_json, write_json
from conversion.names import DERIVED, EMBEDDING, OUTPUT, Tensor, collapse, tensors, to_hf, weight_shapes
from conversion.safetensors_io import (
    DTYPES,
    MAX_SHARD_BYTES,
    Entry,
    dtype_of,
    open_checkpoint,
    read_tensor,
    require_finite,
    write_tensors,
)
from conversion.tokenizer_files import copy_tokenizer
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig

# What config.json may say about the weights themselves, and that we would read wrongly if we looked away.
_REFUSED = {
    "quantization_config": "quantised weights are not read; use the unquantised model",
    "auto_map": "the model brings its own code, which is not run; use a plain LLaMA model",
}


def read_config(directory: str | Path) -> LlamaConfig:
    """The model's shape from `config.json`. Raises UserError if it is missing or not a supported LLaMA."""
    return parse_config(read_json(Path(directory) / "config.json"), directory)


def parse_config(raw: dict[str, Any], where: str | Path) -> LlamaConfig:
    """As `read_config`, from the dictionary of the `config.json` of the directory `where`."""
    for field, mend in _REFUSED.items():
        if raw.get(field):
            raise UserError(f"{Path(where) / 'config.json'}: {field} is set; {mend}")
    try:
        return LlamaConfig.from_hf(raw)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def open_model(directory: str | Path, config: LlamaConfig) -> dict[str, Entry]:
    """The checkpoint's tensors by name, exactly those of `config`, without reading their data.

    Raises UserError that lists every missing, extra and misshapen tensor, and every one of a type that is not
    F32, F16 or BF16. `lm_head.weight` of a tied model is accepted only if it equals the embedding, and rotary
    `inv_freq` buffers are left out because `rope_theta` determines them.
    """
    directory = Path(directory)
    entries = open_checkpoint(directory)
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
    if tied and not np.array_equal(read_tensor(entries[OUTPUT]), read_tensor(entries[EMBEDDING])):
        raise UserError(
            f"{directory}: config.json says tie_word_embeddings, but {OUTPUT} differs from {EMBEDDING}; "
            "set tie_word_embeddings to false if the output rows are to be kept"
        )
    return {name: entries[name] for name in table}


def check_weights(directory: str | Path, config: LlamaConfig) -> None:
    """Read every tensor once. Raises UserError as `open_model` does, and for NaN or infinite values."""
    for name, entry in open_model(directory, config).items():
        require_finite(read_tensor(entry), name, entry.file)


def read_weights(directory: str | Path, dtype: DTypeLike = np.float32) -> dict[str, np.ndarray]:
    """A model directory's weights in our layout: path -> array, kernels `[L, in, out]`, in `dtype`.

    Reads tensor by tensor into the stacked arrays: memory is one copy of the weights plus one tensor. `dtype`
    may be `ml_dtypes.bfloat16` (or `jax.numpy.bfloat16`, which is the same).

    Raises UserError for tensors that are missing, extra, misshapen, NaN or infinite, for truncated files,
    and for pickle checkpoints.
    """
    config = read_config(directory)
    entries = open_model(directory, config)
    weights = {path: np.empty(shape, dtype) for path, shape in weight_shapes(config).items()}
    for tensor in tensors(config):
        array = read_tensor(entries[tensor.name])
        require_finite(array, tensor.name, entries[tensor.name].file)
        to_hf(weights, tensor)[...] = array
    return weights


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

    `weights` has the paths and shapes of `names.weight_shapes(config)`; `extra_config` adds fields to
    config.json (`eos_token_id`, ...), which then also go into generation_config.json. Atomic; see
    `new_directory` for errors.
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

    `raw` is the config.json dictionary. `generation` is the generation_config.json dictionary; without one
    it is made from the token ids in `raw`. The type of the weights is written under transformers 5's name
    (`dtype`) and the earlier one (`torch_dtype`).
    """
    write_json(directory / "config.json", {**raw, "dtype": dtype, "torch_dtype": dtype})
    if generation is None:
        generation = {field: raw[field] for field in _GENERATION_FIELDS if raw.get(field) is not None}
    write_json(directory / "generation_config.json", generation)
