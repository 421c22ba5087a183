"""Writes what was trained as an adapter that PEFT loads: LoRA, and rows of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from transllm_jax.conversion.hf.export import check_tokenizer
from transllm_jax.conversion.hf.safetensors_io import SINGLE, dtype_of, write_tensors
from transllm_jax.conversion.hf.tokenizer_files import copy_tokenizer, require_tokenizer
from transllm_jax.conversion.merged import Merged
from transllm_jax.conversion.names import EMBEDDING, KERNELS, OUTPUT, Tensor, kernel_shapes, to_hf
from transllm_jax.conversion.opened import OpenedModel
from transllm_jax.conversion.peft.config import CONFIG, PREFIX, WEIGHTS, make_peft_config
from transllm_jax.disk import write_json
from transllm_jax.errors import UserError
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import BASE_ROWS
from transllm_jax.new_directory import new_directory

Rows = Literal["tokens", "tables"]

_NEW = {EMBEDDING: "vocabulary.new", OUTPUT: "vocabulary.output_new"}


def write_peft(
    dst: str | Path,
    base: OpenedModel,
    trainable: Mapping[str, np.ndarray],
    lora: LoraConfig,
    *,
    base_model: str,
    tokenizer_dir: str | Path | None = None,
    dtype: str = "float32",
    rows: Rows | None = None,
    overwrite: bool = False,
) -> None:
    """Write adapter_config.json, adapter_model.safetensors and the tokenizer for what was trained on `base`.

    To load it with n new rows: `base.resize_token_embeddings(V + n)`, then `PeftModel.from_pretrained(base, dst)`;
    PEFT cannot load it without the resize. `trainable` is that of `Merged`; `base_model` is the name or path by which
    PEFT finds the base. Values are rounded once to `dtype`.

    `rows` is how the vocabulary is stored. "tokens": new rows only (`trainable_token_indices`, PEFT 0.15 and later).
    "tables": whole tables (`modules_to_save`), which earlier versions read too; tied tables are stored twice, and only
    PEFT versions with `ensure_weight_tying` still tie them after merging. The default is "tokens", or "tables" if base
    rows were trained, which "tokens" cannot express.

    Atomic. Raises UserError if `dst` is not empty and `overwrite` is false, if the arrays do not fit the base or are
    not finite, if the tokenizer does not have one token for each new row (except rows of 0 at the end), and if `rows`
    cannot express what was trained.
    """
    target = dtype_of(dtype)
    merged = Merged(base, trainable, lora.scale, merge_adapters=False)
    config, size = base.config, base.config.vocab_size
    adapters = _adapters(merged, lora)
    if not adapters:
        raise UserError("no layer has an adapter, which PEFT needs to load a directory; export the merged model")
    ends = [EMBEDDING] if config.tie_word_embeddings else [EMBEDDING, OUTPUT]
    base_trained = any(path in merged.trainable for path in BASE_ROWS)
    if rows == "tokens" and base_trained:
        raise UserError("base rows of the vocabulary were trained, which single tokens cannot express; choose tables")
    rows = rows or ("tables" if base_trained else "tokens")
    table = list(adapters)
    if not merged.new_rows and not base_trained:
        raw = make_peft_config(lora, base_model, tokens={})
    elif rows == "tokens":
        ids = list(range(size, size + merged.new_rows))
        shape = (merged.new_rows, config.hidden_size)
        for name in ends:
            row_name = f"{PREFIX}{_module(name)}.token_adapter.trainable_tokens_delta"
            table.append(Tensor(row_name, _NEW[name], shape))
        raw = make_peft_config(lora, base_model, tokens={_module(name): ids for name in ends})
    else:
        # Both modules, even of a tied model: PEFT expects both, and versions that cannot tie them need both.
        for name in (EMBEDDING, OUTPUT):
            table.append(Tensor(f"{PREFIX}{name}", "", (size + merged.new_rows, config.hidden_size)))
        modules = [_module(EMBEDDING), _module(OUTPUT)]
        raw = make_peft_config(lora, base_model, tables=modules, tokens={}, tied=config.tie_word_embeddings)

    def get(tensor: Tensor) -> np.ndarray:
        if tensor.path:
            return to_hf(merged.trainable, tensor)
        name = EMBEDDING if config.tie_word_embeddings else tensor.name.removeprefix(PREFIX)
        return merged.read(Tensor(name, "", tensor.shape))

    if tokenizer_dir is not None:
        require_tokenizer(Path(tokenizer_dir))
        check_tokenizer(Path(tokenizer_dir), size, merged.new_rows, merged.padding)
    with new_directory(Path(dst), overwrite=overwrite) as directory:
        total = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in table) * target.itemsize
        write_tensors(directory, table, get, target, max_shard_bytes=total)
        (directory / SINGLE).rename(directory / WEIGHTS)
        write_json(directory / CONFIG, raw)
        if tokenizer_dir is not None:
            copy_tokenizer(Path(tokenizer_dir), directory)


def _adapters(merged: Merged, lora: LoraConfig) -> list[Tensor]:
    """LoRA's tensors with PEFT's names and shapes: A [R, in], B [out, R]."""
    table = []
    adapted = {path.removesuffix(".a") for path in merged.trainable if path.endswith(".a")}
    if adapted != {path for path in KERNELS if path.rpartition(".")[2] in lora.targets}:
        raise ValueError(f"adapters on {sorted(adapted)}, and the config has targets {lora.targets}")
    shapes = kernel_shapes(merged.config)
    for layer in range(merged.config.num_hidden_layers):
        for path in (path for path in KERNELS if path in adapted):
            size_in, size_out = shapes[path]
            if merged.trainable[f"{path}.a"].shape[-1] != lora.rank:
                raise ValueError(f"{path}.a has rank {merged.trainable[f'{path}.a'].shape[-1]}, the config {lora.rank}")
            name = f"{PREFIX}model.layers.{layer}.{KERNELS[path]}"
            table.append(Tensor(f"{name}.lora_A.weight", f"{path}.a", (lora.rank, size_in), layer, transposed=True))
            table.append(Tensor(f"{name}.lora_B.weight", f"{path}.b", (size_out, lora.rank), layer, transposed=True))
    return table


def _module(name: str) -> str:
    return name.removesuffix(".weight")
