"""The adapter of one run as what another run begins with."""

from __future__ import annotations

from pathlib import Path

from transllm_jax.config import load_config
from transllm_jax.conversion.adapter import AdapterDescription, write_adapter
from transllm_jax.conversion.hf.directory import open_hf
from transllm_jax.conversion.hf.tokenizer_files import copy_tokenizer
from transllm_jax.conversion.moved import moved
from transllm_jax.new_directory import new_directory
from transllm_jax.stages.points import lora_of
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.arrays import load_arrays, save_arrays


def write_scaled_adapter(workdir: Path, point: str, base: Path, dst: Path, scale: float) -> None:
    """Write what a run had trained at a point as an adapter of the model in `base`, whose shape is the same.

    scale: what adapters are multiplied with. Raises UserError after full fine-tuning, which has no adapters.
    """
    model, lora = open_hf(base), lora_of(load_config(workdir / "run.yaml"))
    special = list(Tokenizer.load(base).special_tokens.values())
    trainable = moved(load_arrays(workdir / point / "trainable"), model, [scale], special)
    # `moved` refuses full fine-tuning, so there are adapters.
    assert lora is not None
    with new_directory(dst, overwrite=dst.exists()) as directory:
        save_arrays(directory / "trainable", trainable)
        copy_tokenizer(workdir / "vocabulary", directory)
        write_adapter(
            directory,
            AdapterDescription.of(model, lora, base_name=str(base.resolve()), source=f"{workdir.resolve()} at {point}"),
        )
