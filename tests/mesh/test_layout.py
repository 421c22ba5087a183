"""Where arrays lie: a name for each axis of every parameter; and the checks of tests/mesh on eight virtual devices."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from processes import PATIENT

from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import AXES, SINGLE, logical_axes, partition
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import abstract
from transllm_jax.training.placement import Placement

CHECKS = Path(__file__).parent
LORA = LoraConfig(rank=2, alpha=4.0)
FAMILIES = {
    "llama": replace(tiny_config(40, tied=False), attention_bias=True, mlp_bias=True),
    "mistral": replace(tiny_config(40, tied=False), model_type="mistral", sliding_window=8),
    "qwen2": replace(tiny_config(40), model_type="qwen2", attention_bias=True),
    "qwen3": replace(tiny_config(40), model_type="qwen3"),
}


def parameters(config: LlamaConfig) -> dict[str, Any]:
    """All that a model can have: weights, adapters, new rows, and copies of the base's rows that train."""
    split = abstract(config, LORA, 3, train_base=True)
    return {**split.frozen, **split.trainable}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_axis_of_every_parameter_has_a_name_and_no_mesh_axis_cuts_two(family: str) -> None:
    for path, leaf in parameters(FAMILIES[family]).items():
        assert len(logical_axes(path)) == len(partition(path)) == leaf.ndim, path
        cut = [axis for axes in partition(path) for axis in axes]
        assert len(cut) == len(set(cut)) and set(cut) <= set(AXES), path
        # What is large is cut by both, over the devices that hold one copy of the model; data holds copies.
        small = path.endswith(("scale", "bias"))
        assert set(cut) == (set() if small else {"fsdp", "tensor"}), path


def test_axes_of_one_name_have_one_size() -> None:
    """Of a model in which no two sizes are the same."""
    config = replace(
        tiny_config(41, tied=False), hidden_size=50, intermediate_size=70, num_hidden_layers=3, head_dim=18
    )
    sizes: dict[str, set[int]] = {}
    for path, leaf in parameters(config).items():
        for name, size in zip(logical_axes(path), leaf.shape, strict=True):
            if name not in ("norm", "vocabulary"):
                sizes.setdefault(name.removesuffix("_adapter").removesuffix("_table"), set()).add(size)
    assert sizes == {"layers": {3}, "embed": {50}, "mlp": {70}, "heads": {4 * 18}, "kv_heads": {2 * 18}, "rank": {2}}


@pytest.mark.parametrize("path", ["blocks.mlp.sideways.kernel", "blocks.mlp.up.c", "blocks.mlp.up"])
def test_a_path_that_no_model_has_has_no_axes(path: str) -> None:
    with pytest.raises(KeyError):
        logical_axes(path)


def test_on_one_device_everything_is_what_it_was() -> None:
    x = jnp.ones((2, 3, 4))
    assert SINGLE.constrain(x, "batch", None, "heads") is x and SINGLE.residual(x) is x and SINGLE.whole_rows(x) is x
    assert (
        SINGLE.gathered(x[0], "embed", "mlp").shape == (3, 4)
        and SINGLE.decoding.gathered(x, "embed", "mlp", "rank") is x
    )
    assert (
        SINGLE.sharding("vocabulary.new")
        is SINGLE.replicated
        is SINGLE.batch_sharding()
        is SINGLE.batch_sharding(parts=True)
        is None
    )
    placement = Placement(SINGLE, 2)
    assert placement.metrics is None and placement.local_rows(6).tolist() == list(range(6))
    rows = np.arange(6 * 2).reshape(6, 2)
    cut = placement.to_devices({"tokens": rows, "sources": rows[:, 0]}, 6)
    assert np.array_equal(cut["tokens"], rows.reshape(2, 3, 2)) and cut["sources"].shape == (2, 3)
    assert np.array_equal(Placement(SINGLE).to_devices({"tokens": rows}, 6)["tokens"], rows)
    assert not any(jax.tree.leaves(placement.shardings(cut)))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("check", sorted(path.stem for path in CHECKS.glob("check_*.py")))
def test_on_eight_devices(check: str) -> None:
    # Programs are small and run a few times: to optimise them takes longer. What is compared is made by the
    # partitioner, which comes before.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 {PATIENT}"
    line = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(CHECKS / f"{check}.py")]
    done = subprocess.run(line, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
