"""Exports any opened model, merged or plain, as a Hugging Face model directory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transllm_jax.conversion.hf.directory import generation_of, parse_config, write_config
from transllm_jax.conversion.hf.safetensors_io import MAX_SHARD_BYTES, dtype_of, require_finite, widest, write_tensors
from transllm_jax.conversion.hf.tokenizer_files import copy_tokenizer, has_tokenizer, require_tokenizer, token_ids
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.names import Tensor, tensors
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.disk import read_model_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.new_directory import new_directory
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.sentencepiece_model import unused
from transllm_jax.tokenizer.tokenizer import Tokenizer


@dataclass
class Rounding:
    """How much rounding changed what training had changed: merged kernels, or the layers after full fine-tuning.

    `largest`: the largest rounding error of a weight. `error` and `change`: the sums of squares, over all these
    weights, of the rounding errors and of what training added.
    """

    largest: float = 0.0
    error: float = 0.0
    change: float = 0.0

    def round(self, exact: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        """Convert a float32 array to another type, and add its rounding errors to the sums."""
        rounded = np.empty(exact.shape, dtype)
        for start in range(0, len(exact), 64):  # a few rows at a time stay in the processor's cache
            part = exact[start : start + 64]
            with np.errstate(over="ignore"):  # overflow is reported when the tensor is written
                rounded[start : start + 64] = part
            lost = (part - rounded[start : start + 64].astype(np.float32)).reshape(-1)
            self.largest = max(self.largest, float(lost.max()), -float(lost.min()))
            self.error += float(np.dot(lost, lost))
        return rounded

    @property
    def share(self) -> float:
        """The norm of the rounding errors, divided by that of what training added; 0 if it added nothing."""
        return (self.error / self.change) ** 0.5 if self.change else 0.0


def export_hf(
    model: OpenedModel,
    files: str | Path,
    dst: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    begin: Callable[[int], Callable[[int], None]] | None = None,
    also: Callable[[Path], None] | None = None,
) -> Rounding:
    """Write a model, one tensor at a time; memory holds that tensor and, for a `Merged`, what was trained.

    `files`: the base's directory, with its config.json, generation_config.json and licences. The tokenizer is that of
    `tokenizer_dir`, by default the base's. `dtype` (`float32`, `bfloat16` or `float16`) is for all tensors; by default
    each has the base's type. Adapters are merged in float32 and rounded once; the result describes the rounding.

    Tied embeddings stay tied. An unchanged model keeps config.json byte for byte. If the vocabulary grew, ids without a
    token are written to generation_config.json as suppress_tokens, so that transformers does not produce them. For a
    trained model its eos_token_id names every token that ends an answer (`transllm_jax.tokenizer.ends`). `begin` is
    called with the number of bytes in all, and the function that it returns with the bytes written. `also` may add
    files to the directory.

    Atomic. Raises UserError if `dst` is not empty and `overwrite` is false, if the base is damaged, if the tokenizer
    does not have exactly one token for each new row (except rows of 0 at the end), or if a value is not finite.
    """
    files, dst = Path(files), Path(dst)
    tokenizer_dir = files if tokenizer_dir is None else Path(tokenizer_dir)
    single_dtype = None if dtype is None else dtype_of(dtype)
    raw = read_model_json(files / "config.json")
    base_rows = parse_config(raw, files).vocab_size
    without_tokenizer = not isinstance(model, Merged) and not has_tokenizer(tokenizer_dir)
    padding = model.padding if isinstance(model, Merged) else 0
    if not without_tokenizer:
        require_tokenizer(tokenizer_dir)
        check_tokenizer(tokenizer_dir, base_rows, model.config.vocab_size - base_rows, padding)
    rounding = Rounding()

    def target(tensor: Tensor) -> np.dtype[Any]:
        if single_dtype is not None:
            return single_dtype
        return model.base_dtype(tensor) if isinstance(model, Merged) else model.dtype(tensor)

    def get(tensor: Tensor) -> np.ndarray:
        array = model.read(tensor)
        require_finite(array, tensor.name, model.where)
        if not (isinstance(model, Merged) and model.merges(tensor)):
            return array
        rounding.change += model.change(tensor)
        return rounding.round(array, target(tensor))

    with new_directory(dst, overwrite=overwrite) as directory:
        table = tensors(model.config)
        total = sum(math.prod(tensor.shape) * target(tensor).itemsize for tensor in table)
        advance = None if begin is None else begin(total)
        write_tensors(directory, table, get, target, max_shard_bytes=max_shard_bytes, advance=advance)
        copy_generation_config(files, directory)
        generation = read_model_json(directory / "generation_config.json")
        ends = _ends(generation, tokenizer_dir, files) if isinstance(model, Merged) and not without_tokenizer else {}
        if single_dtype is None and model.config.vocab_size == base_rows:
            shutil.copyfile(files / "config.json", directory / "config.json")
            if ends:
                write_json(directory / "generation_config.json", generation | ends)
        else:
            named = dtype or raw.get("dtype") or raw.get("torch_dtype") or widest(map(target, table)).name
            if model.config.vocab_size > base_rows:
                generation |= _suppressed(generation, tokenizer_dir, model.config.vocab_size)
            write_config(directory, {**raw, "vocab_size": model.config.vocab_size}, named, generation | ends)
        if not without_tokenizer:
            copy_tokenizer(tokenizer_dir, directory)
        copy_notices(files, directory)
        if also is not None:
            also(directory)
    return rounding


def copy_generation_config(src: Path, dst: Path) -> None:
    """Copy generation_config.json, or make one from the token ids in config.json."""
    if (src / "generation_config.json").is_file():
        shutil.copyfile(src / "generation_config.json", dst / "generation_config.json")
        return
    write_json(dst / "generation_config.json", generation_of(read_model_json(src / "config.json")))


def _ends(generation: dict[str, Any], tokenizer_dir: Path, files: Path) -> dict[str, list[int]]:
    """An eos_token_id with every token that ended an answer in training; {} if `generation` has them already."""
    try:
        wanted = end_ids(Tokenizer.load(tokenizer_dir, model=files))
    except UserError:
        return {}  # without a chat template and an EOS token, training used neither
    named = generation.get("eos_token_id")
    listed = [] if named is None else list(named) if isinstance(named, list) else [named]
    missing = [token for token in wanted if token not in listed]
    return {"eos_token_id": [*listed, *missing]} if missing else {}


def _suppressed(generation: dict[str, Any], tokenizer_dir: Path, rows: int) -> dict[str, list[int]]:
    """The suppress_tokens that keep transformers from producing ids without a token; {} if every row has one."""
    vocabulary = read_model_json(tokenizer_dir / "tokenizer.json")["model"]["vocab"]
    named = vocabulary.items() if isinstance(vocabulary, dict) else ()
    # Names that only fill a gap before new ids are not tokens.
    filling = {number for token, number in named if token == unused(number)}
    empty = set(range(rows)) - token_ids(tokenizer_dir) | filling
    return {"suppress_tokens": sorted(empty.union(generation.get("suppress_tokens") or ()))} if empty else {}


def copy_notices(src: Path, dst: Path) -> None:
    """Copy the licence files, which have to be passed on with a model."""
    for notice in sorted([*src.glob("LICENSE*"), *src.glob("NOTICE*")]):
        if notice.is_file():
            shutil.copyfile(notice, dst / notice.name)


def check_tokenizer(directory: Path, base_rows: int, new_rows: int, padding: int = 0) -> None:
    """Raises UserError unless the tokenizer has one token for each new row, and none above.

    Some of the base's rows may have no token, because an embedding is often padded to a round number of rows. The last
    `padding` new rows may have none either.
    """
    above = {number for number in token_ids(directory) if number >= base_rows}
    if above != set(range(base_rows, base_rows + len(above))) or not new_rows - padding <= len(above) <= new_rows:
        raise UserError(
            f"{directory}: the tokenizer has {len(above)} ids from {base_rows} on, "
            f"the adapter has {new_rows} new rows; export with the tokenizer of the adapter's training"
        )
