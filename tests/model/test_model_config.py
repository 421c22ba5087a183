"""The model's config: every field has an effect, and unsupported values are refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from conftest import random_weights, tiny_config
from tiny_splits import VOCAB, base_split, logits, whole_rows

from transllm_jax.errors import UserError
from transllm_jax.generation.engine import Engine
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.parameters import load_frozen
from transllm_jax.model.rope import RopeScaling

# For each field another value, and the weight that does not fit it (None: all weights fit, but the logits differ).
OTHER_VALUES: dict[str, tuple[Any, str | None]] = {
    "vocab_size": (62, "vocabulary.base"),
    "hidden_size": (64, "final_norm.scale"),
    "intermediate_size": (81, "blocks.mlp.gate.kernel"),
    "num_hidden_layers": (3, "blocks.attention.q.kernel"),
    "num_attention_heads": (2, "blocks.attention.q.kernel"),
    "num_key_value_heads": (4, "blocks.attention.k.kernel"),
    "head_dim": (8, "blocks.attention.o.kernel"),
    "tie_word_embeddings": (False, "vocabulary.output_base is missing"),
    "rms_norm_eps": (0.1, None),
    "rope_theta": (100.0, None),
    "max_position_embeddings": (20, None),
    "model_type": ("qwen3", "blocks.attention.q_norm.scale is missing"),
    "attention_bias": (True, "blocks.attention.o.bias is missing"),
    "mlp_bias": (True, "blocks.mlp.down.bias is missing"),
    "rope_scaling": (RopeScaling("linear", 4.0), None),
    "sliding_window": (3, None),
}


def test_every_field_of_the_config_has_a_test() -> None:
    assert OTHER_VALUES.keys() == {field.name for field in fields(LlamaConfig)}


@pytest.mark.parametrize("field", [name for name, (_, misfit) in OTHER_VALUES.items() if misfit])
def test_weights_of_another_shape_are_refused(field: str) -> None:
    value, misfit = OTHER_VALUES[field]
    config = tiny_config(VOCAB)
    with pytest.raises(UserError, match=misfit):
        load_frozen(replace(config, **{field: value}), random_weights(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": OTHER_VALUES["rms_norm_eps"][0]},
        {"rope_theta": OTHER_VALUES["rope_theta"][0]},
        {"rope_scaling": OTHER_VALUES["rope_scaling"][0]},
        {"sliding_window": OTHER_VALUES["sliding_window"][0]},
        # All weights have the same shapes, but are split into other heads.
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    ],
    ids=["rms_norm_eps", "rope_theta", "rope_scaling", "sliding_window", "heads"],
)
def test_config_fields_that_change_no_shape_change_the_logits(changes: dict[str, Any]) -> None:
    config = tiny_config(VOCAB)
    before = logits(base_split(config), whole_rows())
    after = logits(base_split(replace(config, **changes)), whole_rows())
    assert np.abs(after - before).max() > 0.01


def test_max_position_embeddings_limits_generation() -> None:
    config = replace(tiny_config(VOCAB), max_position_embeddings=OTHER_VALUES["max_position_embeddings"][0])
    with pytest.raises(UserError, match="context of 20"):
        Engine(base_split(config), config).generate([[1] * 10], max_new_tokens=11, stop=[0])


def test_the_config_comes_back_from_config_json() -> None:
    for tied in (True, False):
        config = replace(
            tiny_config(VOCAB, tied=tied), rope_theta=500000.0, rms_norm_eps=1e-6, max_position_embeddings=77
        )
        assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_config_json_of_old_and_new_transformers_is_read() -> None:
    raw = tiny_config(VOCAB).to_hf()
    del raw["rope_theta"]
    newer = LlamaConfig.from_hf(raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}})
    assert newer.rope_theta == 5000.0
    del raw["head_dim"], raw["num_key_value_heads"]
    older = LlamaConfig.from_hf(raw)
    assert (older.rope_theta, older.head_dim, older.num_key_value_heads) == (10000.0, 12, 4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
    ],
    ids=str,
)
def test_unsupported_configs_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        LlamaConfig.from_hf(tiny_config(VOCAB).to_hf() | changes)


def test_a_missing_field_is_named() -> None:
    raw = tiny_config(VOCAB).to_hf()
    del raw["intermediate_size"]
    with pytest.raises(UserError, match="intermediate_size"):
        LlamaConfig.from_hf(raw)


@pytest.mark.parametrize("field", ["vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -2, "many", 1.5, True])
def test_bad_sizes_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        LlamaConfig.from_hf({**tiny_config(300).to_hf(), field: value})
