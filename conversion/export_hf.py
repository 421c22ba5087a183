"""Export: base weights, adapters and new rows become one plain Hugging Face model directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from conversion.directories import new_directory, read_json
from conversion.hf import open_model, parse_config, write_config
from conversion.names import EMBEDDING, OUTPUT, Tensor, kernel_shapes, tensors
from conversion.safetensors_io import MAX_SHARD_BYTES, dtype_of, read_tensor, require_finite, write_tensors
from conversion.tokenizer_files import copy_tokenizer, require_tokenizer, token_ids
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig

_NEW = "vocabulary.new"
_OUTPUT_NEW = "vocabulary.output_new"


def export_hf(
    base_dir: str | Path,
    tokenizer_dir: str | Path,
    trainable: dict[str, np.ndarray],
    lora_alpha: float,
    lora_rank: int,
    dst: str | Path,
    dtype: str = "float32",
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model with adapters merged, `W + (lora_alpha / lora_rank) * a @ b`, and new rows appended.

    `trainable` holds `vocabulary.new` [n, D], `vocabulary.output_new` [n, D] where the output is untied,
    and for each adapted kernel `PATH.a` [L, in, R] and `PATH.b` [L, R, out]. The merge is in float32,
    tensor by tensor, and rounded once to `dtype` (`float32`, `bfloat16` or `float16`); memory holds one
    tensor beside the adapters. Tied embeddings stay tied. config.json is the base's with the new
    vocab_size, generation_config.json the base's.

    Atomic. Raises UserError if `dst` is not empty and `overwrite` is false, if the base is damaged, if the
    tokenizer does not have exactly one token for each new row, or if a trained value is not finite.
    """
    base_dir, tokenizer_dir, dst = Path(base_dir), Path(tokenizer_dir), Path(dst)
    target = dtype_of(dtype)
    raw = read_json(base_dir / "config.json")
    config = parse_config(raw, base_dir)
    entries = open_model(base_dir, config)
    trained = {path: np.asarray(array, np.float32) for path, array in trainable.items()}
    _check_trainable(config, trained, lora_rank)
    new_rows = trained[_NEW].shape[0] if _NEW in trained else 0
    require_tokenizer(tokenizer_dir)
    _check_tokenizer(tokenizer_dir, config.vocab_size, new_rows)
    grown = replace(config, vocab_size=config.vocab_size + new_rows)
    scale = np.float32(lora_alpha / lora_rank)

    def get(tensor: Tensor) -> np.ndarray:
        array = read_tensor(entries[tensor.name]).astype(np.float32)
        require_finite(array, tensor.name, entries[tensor.name].file)
        rows = {EMBEDDING: _NEW, OUTPUT: _OUTPUT_NEW}.get(tensor.name)
        if rows is not None and rows in trained:
            return np.concatenate([array, trained[rows]])
        adapter = tensor.path.removesuffix(".kernel")
        if f"{adapter}.a" in trained:
            product = trained[f"{adapter}.a"][tensor.layer] @ trained[f"{adapter}.b"][tensor.layer]
            array += scale * product.T
        return array

    with new_directory(dst, overwrite=overwrite) as directory:
        write_tensors(directory, tensors(grown), get, target, max_shard_bytes=max_shard_bytes)
        generation = base_dir / "generation_config.json"
        write_config(
            directory,
            {**raw, "vocab_size": grown.vocab_size},
            dtype,
            read_json(generation) if generation.is_file() else None,
        )
        copy_tokenizer(tokenizer_dir, directory)
        for notice in sorted([*base_dir.glob("LICENSE*"), *base_dir.glob("NOTICE*")]):
            (directory / notice.name).write_bytes(notice.read_bytes())


def _check_trainable(config: LlamaConfig, trained: dict[str, np.ndarray], rank: int) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    layers = config.num_hidden_layers
    for path, (size_in, size_out) in kernel_shapes(config).items():
        if f"{path}.a" in trained or f"{path}.b" in trained:
            expected[f"{path}.a"] = (layers, size_in, rank)
            expected[f"{path}.b"] = (layers, rank, size_out)
    if _NEW in trained or _OUTPUT_NEW in trained:
        rows = len(trained.get(_NEW, trained.get(_OUTPUT_NEW, ())))
        expected[_NEW] = (rows, config.hidden_size)
        if not config.tie_word_embeddings:
            expected[_OUTPUT_NEW] = (rows, config.hidden_size)
    problems = [f"{path} is missing" for path in sorted(expected.keys() - trained.keys())]
    problems += [f"{path} is not part of the model" for path in sorted(trained.keys() - expected.keys())]
    problems += [
        f"{path} has shape {list(trained[path].shape)}, expected {list(expected[path])}"
        for path in sorted(expected.keys() & trained.keys())
        if trained[path].shape != expected[path]
    ]
    if problems:
        raise UserError(f"the adapter does not fit the base model: {'; '.join(problems)}; was it trained on another?")
    for path, array in trained.items():
        require_finite(array, path, "the adapter")


def _check_tokenizer(directory: Path, base_rows: int, new_rows: int) -> None:
    above = {number for number in token_ids(directory) if number >= base_rows}
    if above != set(range(base_rows, base_rows + new_rows)):
        raise UserError(
            f"{directory}: the tokenizer has {len(above)} ids from {base_rows} on, "
            f"the adapter has {new_rows} new rows; export with the tokenizer of the adapter's training"
        )
