"""Shared by the tests of PEFT adapters: bases, arrays to write, and our logits and PEFT's."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_weights, tiny_config
from safetensors.numpy import load_file, save_file

from transllm_jax.conversion.hf.directory import HFModel, open_hf, read_weights, write_model
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import abstract, assemble, load_frozen, merge

VOCAB, NEW, LENGTH = 61, 5, 14
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.25)
SOME = LoraConfig(rank=2, alpha=5.5, rslora=True, targets=("q", "v", "down"))
IDS = list(range(VOCAB, VOCAB + NEW))
EMBED = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
# Float32 sums in another order: differences of up to 1e-5 were measured on logits of size 5.
NEAR = 1e-4


def write_bases(directory: Path) -> dict[bool, HFModel]:
    """The tied and the untied base."""
    for tied in (True, False):
        config = tiny_config(VOCAB, tied=tied)
        write_model(directory / str(tied), config, random_weights(config))
    return {tied: open_hf(directory / str(tied)) for tied in (True, False)}


def random_trainable(
    base: HFModel, lora: LoraConfig, new_rows: int = NEW, *, train_base: bool = False
) -> dict[str, np.ndarray]:
    """Adapters and rows as in the middle of training: nothing is zero, and base rows have moved a little."""
    rng = np.random.default_rng(3)
    shapes = abstract(base.config, lora, new_rows, train_base=train_base).trainable
    arrays = {path: 0.2 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in sorted(shapes.items())}
    weights = random_weights(base.config)
    for path in arrays:
        if path.endswith("base_trained"):
            arrays[path] = weights[path.removesuffix("_trained")] + 0.1 * arrays[path]
    return arrays


def tokens(rows: int) -> np.ndarray:
    """The ids of one text: all new ids first, then any."""
    ids = np.random.default_rng(0).integers(0, rows, LENGTH)
    ids[: rows - VOCAB] = np.arange(VOCAB, rows)
    return ids


@partial(jax.jit, static_argnames="structure")
def _logits(trainable: Any, frozen: Any, rows: Any, *, structure: Any) -> jax.Array:
    model = merge(structure, trainable, frozen)
    return model.vocabulary.logits(model(*rows))


def ours(base: HFModel, lora: LoraConfig, trainable: dict[str, np.ndarray]) -> np.ndarray:
    """Our model's logits [T, V + n]. The adapters are not merged."""
    frozen = load_frozen(base.config, read_weights(base.directory))
    split = assemble(base.config, frozen, lora=lora, trainable=trainable)
    ids = tokens(VOCAB + len(trainable.get("vocabulary.new", ())))[None]
    rows = tuple(map(jnp.asarray, (ids, np.arange(ids.size)[None], np.ones_like(ids))))
    return np.asarray(_logits(split.trainable, split.frozen, rows, structure=split.structure))[0]


def theirs(model: Any, rows: int) -> np.ndarray:
    """The logits of a torch model."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return np.asarray(model(torch.tensor(tokens(rows))[None]).logits[0])


def torch_base(base: HFModel, rows: int = VOCAB + NEW) -> Any:
    """The base in transformers, resized. Its new rows are random and differ from call to call."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    if rows != VOCAB:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def load_with_peft(base: HFModel, directory: Path, rows: int = VOCAB + NEW) -> Any:
    """Loads the adapter on the base with PEFT; raises if PEFT warns."""
    peft = pytest.importorskip("peft")
    model = torch_base(base, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns so of a missing or an unknown key
        return peft.PeftModel.from_pretrained(model, directory).eval()


def trained_by_peft(base: HFModel, directory: Path, rows: int = VOCAB + NEW, save: Any = "auto", **options: Any) -> Any:
    """Moves all that trains in a model of PEFT at random, and saves it with PEFT. Returns its logits."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config |= deepcopy(options)  # because PEFT changes the lists that it gets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(torch_base(base, rows), peft.LoraConfig(**config)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(directory, save_embedding_layers=save)
    return theirs(model, rows)


def base_table(base: HFModel, name: str = "vocabulary.base") -> np.ndarray:
    return random_weights(base.config)[name]


def change(
    directory: Path,
    config: Callable[[dict[str, Any]], Any] | None = None,
    arrays: Callable[[dict[str, np.ndarray]], Any] | None = None,
) -> None:
    """Edits an adapter's files in place."""
    if config is not None:
        raw = json.loads((directory / "adapter_config.json").read_text())
        config(raw)
        (directory / "adapter_config.json").write_text(json.dumps(raw))
    if arrays is not None:
        held = {name: array.copy() for name, array in load_file(directory / "adapter_model.safetensors").items()}
        arrays(held)
        save_file(held, directory / "adapter_model.safetensors")
