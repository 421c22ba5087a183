"""The model: equal to transformers', nothing leaks between documents, adapters stand beside the frozen weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_weights, tiny_config
from flax import nnx
from tiny_families import FAMILIES

from conversion.hf.directory import write_model
from conversion.names import tensors
from transllm_jax.choices import Remat
from transllm_jax.errors import UserError
from transllm_jax.generation.engine import Engine
from transllm_jax.model import attention
from transllm_jax.model.attention import attend, attend_causally, causal_mask
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import LoraConfig, LoRALinear, project
from transllm_jax.model.parameters import (
    BASE_ROWS,
    Split,
    abstract,
    assemble,
    count,
    initial_adapters,
    load_frozen,
    merge,
)
from transllm_jax.model.rope import RopeScaling
from transllm_jax.model.vocabulary import Vocabulary
from transllm_jax.training.step import summed_loss

VOCAB, NEW, LENGTH = 61, 5, 24
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.25)


def base_split(config: LlamaConfig) -> Split:
    return assemble(config, load_frozen(config, random_weights(config)))


def random_trainable(
    config: LlamaConfig, lora: LoraConfig, new_rows: int, *, train_base: bool = False
) -> dict[str, np.ndarray]:
    """Adapters, new rows and perhaps base rows in the middle of training: nothing is zero."""
    rng = np.random.default_rng(3)
    shapes = abstract(config, lora, new_rows, train_base=train_base).trainable
    return {path: 0.2 * rng.standard_normal(leaf.shape, dtype=np.float32) for path, leaf in sorted(shapes.items())}


def trained_split(
    config: LlamaConfig, lora: LoraConfig = LORA, new_rows: int = NEW, *, train_base: bool = False
) -> Split:
    frozen = load_frozen(config, random_weights(config))
    trainable = random_trainable(config, lora, new_rows, train_base=train_base)
    return assemble(config, frozen, lora=lora, trainable=trainable)


@partial(jax.jit, static_argnames=("structure", "adapters", "base_only"))
def _logits(
    trainable: Any, frozen: Any, rows: tuple[jax.Array, ...], *, structure: Any, adapters: bool, base_only: bool
) -> jax.Array:
    model = merge(structure, trainable, frozen)
    return model.vocabulary.logits(model(*rows, adapters=adapters), base_only=base_only, adapters=adapters)


def logits(split: Split, rows: tuple[np.ndarray, ...], *, adapters: bool = True, base_only: bool = False) -> np.ndarray:
    """float32 [B, T, V (+ n)] for rows of (tokens, positions, segment ids)."""
    device_rows = tuple(map(jnp.asarray, rows))
    return np.asarray(
        _logits(
            split.trainable,
            split.frozen,
            device_rows,
            structure=split.structure,
            adapters=adapters,
            base_only=base_only,
        )
    )


def whole_rows(vocab_size: int = VOCAB, seed: int = 1) -> tuple[np.ndarray, ...]:
    """Two rows of one document each."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (2, LENGTH), dtype=np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(tokens)


@partial(jax.jit, static_argnames="structure")
def gradients(trainable: Any, frozen: Any, batch: Any, *, structure: Any) -> tuple[Any, Any]:
    """The summed loss's gradients of what trains and of what is frozen."""
    return jax.grad(lambda *trees: summed_loss(structure, *trees, batch), argnums=(0, 1))(trainable, frozen)


def merged_weights(config: LlamaConfig, lora: LoraConfig, trainable: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a plain model that computes what the base does with these adapters and vocabulary rows."""
    merged = random_weights(config)
    for path in merged:
        if path.endswith(".kernel"):
            stem = path.removesuffix("kernel")
            merged[path] = merged[path] + lora.alpha / lora.rank * trainable[stem + "a"] @ trainable[stem + "b"]
    for table, rows in (("base", "new"), ("output_base", "output_new")):
        if f"vocabulary.{table}" in merged:
            base = trainable.get(f"vocabulary.{table}_trained", merged[f"vocabulary.{table}"])
            both = [base, trainable[f"vocabulary.{rows}"]]
            merged[f"vocabulary.{table}"] = np.concatenate(both)
    return merged


def training_batch(vocab_size: int) -> dict[str, jax.Array]:
    """Two documents a row and padding, with every id of the vocabulary among tokens and labels."""
    order = np.random.default_rng(5).permutation(np.arange(3 * LENGTH) % vocab_size)[: 2 * LENGTH]
    tokens = order.reshape(2, LENGTH).astype(np.int32)
    tokens[:, :NEW] = np.arange(vocab_size - NEW, vocab_size)
    segments = np.repeat([1, 2, 0], [10, 11, 3])[None].repeat(2, axis=0).astype(np.int32)
    positions = np.concatenate([np.arange(10), np.arange(11), np.zeros(3)])[None].repeat(2, axis=0).astype(np.int32)
    labels = np.roll(tokens, -1, axis=1)
    weights = ((segments > 0) & (np.roll(segments, -1, axis=1) == segments)).astype(np.float32)
    batch = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segments,
        "labels": labels,
        "weights": weights,
    }
    return {field: jnp.asarray(values) for field, values in batch.items()}


# --- equal to transformers ------------------------------------------------------------------------------------------


@pytest.mark.reference
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_transformers(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = replace(tiny_config(VOCAB, tied=tied), num_key_value_heads=kv_heads, rope_theta=300.0, rms_norm_eps=1e-2)
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    write_model(tmp_path / "model", config, random_weights(config))
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )

    tokens, positions, segments = (array.copy() for array in whole_rows())
    # Row 0 is padded on its left. Row 1 starts at a position above 0 and has a gap, which shows that positions count.
    segments[0, :7] = 0
    positions[0] = np.maximum(np.arange(LENGTH) - 7, 0)
    positions[1] = np.arange(LENGTH) + 5 + 30 * (np.arange(LENGTH) > 10)
    with torch.no_grad():
        wanted = reference(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(segments).long(),
            position_ids=torch.tensor(positions).long(),
        ).logits.numpy()
    ours = logits(base_split(config), (tokens, positions, segments))

    real = segments > 0
    assert ours.shape == (2, LENGTH, VOCAB) and np.isfinite(ours).all()
    assert wanted[real].std() > 0.3
    assert np.abs(ours - wanted)[real].max() < 1e-4


@pytest.mark.reference
@pytest.mark.parametrize(
    ("config", "train_base"),
    [
        (tiny_config(VOCAB, tied=False), False),
        (tiny_config(VOCAB, tied=False), True),
        (tiny_config(VOCAB, tied=True), True),
        *((FAMILIES[name], False) for name in ("llama3-untied", "mistral-window", "qwen2.5-untied", "qwen3-biases")),
    ],
    ids=["new rows", "base rows too", "base rows too, tied", "llama3", "mistral", "qwen2", "qwen3"],
)
def test_gradients_are_those_of_transformers(tmp_path: Path, config: LlamaConfig, train_base: bool) -> None:
    """By the chain rule: with G the gradient of a merged kernel W + s a b, that of a is s G b', that of b is s a' G."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    structure, trainable, frozen = trained_split(config, train_base=train_base)
    larger = replace(config, vocab_size=VOCAB + NEW)
    of_base = random_trainable(config, LORA, NEW, train_base=train_base)
    write_model(tmp_path / "model", larger, merged_weights(config, LORA, of_base))
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )
    batch = training_batch(VOCAB + NEW)
    tokens, positions, segments = whole_rows(VOCAB + NEW)
    batch |= {"tokens": tokens, "positions": positions, "segment_ids": segments}
    ours, _ = gradients(trainable, frozen, batch, structure=structure)

    logits = reference(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(segments).long()).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(np.array(batch["labels"])).long().flatten(), reduction="none"
    )
    (losses * torch.tensor(np.array(batch["weights"])).flatten()).sum().backward()

    wanted = {path: np.zeros(values.shape, np.float32) for path, values in trainable.items()}
    parameters = dict(reference.named_parameters())
    for tensor in tensors(larger):
        gradient = parameters[tensor.name].grad.numpy()
        if tensor.path.endswith(".kernel"):
            stem, gradient = tensor.path.removesuffix("kernel"), LORA.scale * gradient.T
            a, b = (np.asarray(trainable[stem + name][tensor.layer]) for name in "ab")
            wanted[stem + "a"][tensor.layer], wanted[stem + "b"][tensor.layer] = gradient @ b.T, a.T @ gradient
        elif tensor.path.startswith("vocabulary."):
            wanted[tensor.path.replace("base", "new")] = gradient[VOCAB:]
            if train_base:
                wanted[f"{tensor.path}_trained"] = gradient[:VOCAB]
    assert wanted.keys() == ours.keys()
    for path, values in wanted.items():
        assert np.abs(values).max() > 1e-3
        assert np.abs(ours[path] - values).max() < 1e-4 * np.abs(values).max(), path


# --- the config -----------------------------------------------------------------------------------------------------

# For each field another value, and the weight that then does not fit (None: the weights fit, the logits differ).
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


def test_no_field_of_the_config_is_without_a_test() -> None:
    assert OTHER_VALUES.keys() == {field.name for field in fields(LlamaConfig)}


@pytest.mark.parametrize("field", [name for name, (_, misfit) in OTHER_VALUES.items() if misfit])
def test_weights_of_another_shape_than_the_config_are_refused(field: str) -> None:
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
        # The same shapes of all weights, cut into other heads.
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


def test_the_config_survives_the_way_to_config_json_and_back() -> None:
    for tied in (True, False):
        config = replace(
            tiny_config(VOCAB, tied=tied), rope_theta=500000.0, rms_norm_eps=1e-6, max_position_embeddings=77
        )
        assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_config_json_of_either_generation_of_transformers_is_read() -> None:
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
def test_what_would_be_computed_wrongly_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        LlamaConfig.from_hf(tiny_config(VOCAB).to_hf() | changes)


def test_a_missing_field_is_named() -> None:
    raw = tiny_config(VOCAB).to_hf()
    del raw["intermediate_size"]
    with pytest.raises(UserError, match="intermediate_size"):
        LlamaConfig.from_hf(raw)


# --- adapters and new rows beside the frozen weights ----------------------------------------------------------------


@pytest.mark.parametrize("train_base", [False, True], ids=["new rows", "base rows too"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_without_adapters_and_new_rows_it_is_the_original_model_bit_for_bit(tied: bool, train_base: bool) -> None:
    config = tiny_config(VOCAB, tied=tied)
    original = logits(base_split(config), whole_rows())
    trained = trained_split(config, train_base=train_base)
    assert np.array_equal(logits(trained, whole_rows(), adapters=False, base_only=True), original)
    assert np.abs(logits(trained, whole_rows())[..., :VOCAB] - original).max() > 0.1, "what is switched off counts"


def test_fresh_adapters_change_nothing() -> None:
    config = tiny_config(VOCAB)
    fresh = initial_adapters(config, LORA, seed=7)
    split = assemble(config, load_frozen(config, random_weights(config)), lora=LORA, trainable=fresh)
    assert np.array_equal(logits(split, whole_rows()), logits(base_split(config), whole_rows()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_copies_of_the_base_rows_change_nothing(dtype: Any) -> None:
    config = tiny_config(VOCAB, tied=False)
    frozen = load_frozen(config, random_weights(config), dtype)
    new = {path: np.ones((NEW, config.hidden_size), np.float32) for path in ("vocabulary.new", "vocabulary.output_new")}
    # The model's own start is the copy; a stage's, too.
    copies = {path: np.asarray(frozen[path.removesuffix("_trained")], np.float32) for path in BASE_ROWS}
    rows = whole_rows(VOCAB + NEW)
    assert (rows[0] >= VOCAB).any()
    with_copies = logits(assemble(config, frozen, trainable=new | copies), rows)
    assert np.array_equal(with_copies, logits(assemble(config, frozen, trainable=new), rows))
    # Without new rows as well, as an adapter from elsewhere may be.
    assert np.array_equal(
        logits(assemble(config, frozen, trainable=copies), whole_rows()),
        logits(assemble(config, frozen), whole_rows()),
    )


def test_a_model_that_trains_its_base_rows_begins_with_copies_of_them() -> None:
    for tied in (True, False):
        config = tiny_config(VOCAB, tied=tied)
        vocabulary = Vocabulary(config, NEW, train_base=True, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        assert vocabulary.base_trained[...].dtype == jnp.float32
        assert np.array_equal(vocabulary.base_trained[...], vocabulary.base[...].astype(jnp.float32))
        if not tied:
            ours, wanted = vocabulary.output_base_trained[...], vocabulary.output_base[...].astype(jnp.float32)
            assert ours.dtype == jnp.float32 and np.array_equal(ours, wanted)


def test_a_tied_model_has_one_set_of_trained_base_rows() -> None:
    rows = {
        tied: {
            path: leaf.shape
            for path, leaf in abstract(tiny_config(VOCAB, tied=tied), LORA, NEW, train_base=True).trainable.items()
            if path in BASE_ROWS
        }
        for tied in (True, False)
    }
    width = tiny_config(VOCAB).hidden_size
    assert rows == {True: {BASE_ROWS[0]: (VOCAB, width)}, False: dict.fromkeys(BASE_ROWS, (VOCAB, width))}
    # Not there unless asked for.
    assert not any(path in BASE_ROWS for path in abstract(tiny_config(VOCAB), LORA, NEW).trainable)


def test_fresh_adapters_are_a_function_of_the_seed() -> None:
    config = tiny_config(VOCAB)
    one, again, other = (initial_adapters(config, LORA, seed=seed) for seed in (7, 7, 8))
    assert one.keys() == abstract(config, LORA, 0).trainable.keys()
    for path, values in one.items():
        assert np.array_equal(values, again[path])
        assert values.dtype == np.float32
        if path.endswith(".b"):
            assert not values.any()
        else:
            limit = (3 / values.shape[1]) ** 0.5
            assert 0.8 * limit < np.abs(values).max() <= limit
            assert not np.array_equal(values, other[path])
    # Same shapes, drawn apart: k and v, and the two layers.
    assert not np.array_equal(one["blocks.attention.k.a"], one["blocks.attention.v.a"])
    assert not np.array_equal(one["blocks.mlp.up.a"][0], one["blocks.mlp.up.a"][1])


@pytest.mark.parametrize("train_base", [False, True], ids=["new rows", "base rows too"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_trained_model_is_the_model_of_its_merged_weights(tied: bool, train_base: bool) -> None:
    config = tiny_config(VOCAB, tied=tied)
    merged = merged_weights(config, LORA, random_trainable(config, LORA, NEW, train_base=train_base))
    larger = replace(config, vocab_size=VOCAB + NEW)
    rows_with_new_ids = whole_rows(VOCAB + NEW)
    assert (rows_with_new_ids[0] >= VOCAB).any()
    wanted = logits(assemble(larger, load_frozen(larger, merged)), rows_with_new_ids)
    ours = logits(trained_split(config, train_base=train_base), rows_with_new_ids)
    assert np.abs(ours - wanted).max() < 1e-4


def test_assemble_lists_all_that_is_wrong() -> None:
    config = tiny_config(VOCAB)
    frozen = load_frozen(config, random_weights(config))
    trainable = random_trainable(config, LORA, NEW)
    del trainable["blocks.attention.q.a"], trainable["blocks.mlp.down.b"]
    trainable["vocabulary.output_new"] = trainable["vocabulary.new"]
    trainable["blocks.mlp.up.b"] = trainable["blocks.mlp.up.b"][:, :, 1:]
    with pytest.raises(UserError) as caught:
        assemble(config, frozen, lora=LORA, trainable=trainable)
    message = str(caught.value)
    assert "blocks.attention.q.a is missing" in message and "blocks.mlp.down.b is missing" in message
    assert "vocabulary.output_new is not of this model" in message
    assert "blocks.mlp.up.b has shape (2, 3, 79), wanted (2, 3, 80)" in message
    with pytest.raises(UserError, match=r"blocks\.attention\.k\.a is not of this model"):
        assemble(config, frozen, lora=None, trainable=random_trainable(config, LORA, NEW))


def test_assemble_refuses_base_rows_that_do_not_fit() -> None:
    config = tiny_config(VOCAB, tied=False)
    frozen = load_frozen(config, random_weights(config))
    rows = {path: np.zeros((VOCAB, config.hidden_size), np.float32) for path in BASE_ROWS}
    for path, other in (BASE_ROWS, BASE_ROWS[::-1]):
        with pytest.raises(UserError, match=rf"{path} is missing"):
            assemble(config, frozen, trainable={other: rows[other]})
    with pytest.raises(UserError, match=r"output_base_trained has shape \(60, 48\), wanted \(61, 48\)"):
        assemble(config, frozen, trainable=rows | {BASE_ROWS[1]: rows[BASE_ROWS[1]][1:]})
    tied = tiny_config(VOCAB)
    with pytest.raises(UserError, match=r"vocabulary\.output_base_trained is not of this model"):
        assemble(tied, load_frozen(tied, random_weights(tied)), trainable=rows)


def test_load_frozen_lists_all_that_is_wrong_and_takes_the_weights_otherwise() -> None:
    config = tiny_config(VOCAB)
    weights = random_weights(config)
    weights["surplus"] = np.zeros(3, np.float32)
    weights["final_norm.scale"] = np.ones(47, np.float32)
    down = weights.pop("blocks.mlp.down.kernel")
    with pytest.raises(UserError) as caught:
        load_frozen(config, weights)
    message = str(caught.value)
    assert "surplus is not of this model" in message
    assert "final_norm.scale has shape (47,), wanted (48,)" in message
    assert "blocks.mlp.down.kernel is missing" in message

    del weights["surplus"]
    weights |= {"final_norm.scale": np.ones(48, np.float32), "blocks.mlp.down.kernel": down}
    kept = dict(weights)
    frozen = load_frozen(config, weights)
    assert not weights, "only one copy is held"
    assert frozen.keys() == kept.keys() and all(np.array_equal(frozen[path], kept[path]) for path in kept)


def test_assemble_copies_what_trains() -> None:
    config = tiny_config(VOCAB)
    frozen = load_frozen(config, random_weights(config))
    trainable = {path: jnp.asarray(value) for path, value in random_trainable(config, LORA, NEW).items()}
    split = assemble(config, frozen, lora=LORA, trainable=trainable)
    for values in split.trainable.values():
        values.delete()
    assert all(np.isfinite(values).all() for values in trainable.values())


# --- packing --------------------------------------------------------------------------------------------------------


def test_a_document_does_not_see_its_neighbours() -> None:
    split = trained_split(tiny_config(VOCAB))
    rng = np.random.default_rng(9)
    document = rng.integers(0, VOCAB + NEW, 8, dtype=np.int32)

    def row(start: int, neighbours: str) -> np.ndarray:
        """The document's logits from place `start` of a row whose other places hold padding or other documents."""
        tokens = rng.integers(0, VOCAB + NEW, (2, LENGTH), dtype=np.int32)
        segments = np.zeros_like(tokens)
        if neighbours != "padding":
            segments[:, :start], segments[:, start + 8 :] = 1, 3
        positions = np.where(segments == 3, np.arange(LENGTH) - start - 8, np.arange(LENGTH))
        at = slice(start, start + 8)
        tokens[0, at], segments[0, at], positions[0, at] = document, 2, np.arange(8)
        return logits(split, (tokens, positions.astype(np.int32), segments))[0, at]

    alone = row(6, "padding")
    assert alone.std() > 0.3
    for neighbours in ("padding", "documents", "documents"):
        assert np.array_equal(row(6, neighbours), alone)
    # At another place the same sums are taken in another order: equal to float32's rounding.
    for start in (0, 16):
        assert np.abs(row(start, "documents") - alone).max() < 1e-5


def test_a_token_does_not_see_later_ones() -> None:
    split = base_split(tiny_config(VOCAB))
    tokens, positions, segments = whole_rows()
    before = logits(split, (tokens, positions, segments))
    changed = tokens.copy()
    changed[:, 15:] = (changed[:, 15:] + 1) % VOCAB
    after = logits(split, (changed, positions, segments))
    assert np.array_equal(before[:, :15], after[:, :15])
    assert np.abs(before[:, 15:] - after[:, 15:]).max(axis=(0, 2)).min() > 0.01


# --- gradients and dropout ------------------------------------------------------------------------------------------


def test_no_gradient_reaches_frozen_weights_and_all_that_trains_gets_one() -> None:
    # Untied, so that each of the two base tables shows a gradient of its own.
    structure, trainable, frozen = trained_split(tiny_config(VOCAB, tied=False))
    batch = training_batch(VOCAB + NEW)

    of_trainable, of_frozen = gradients(trainable, frozen, batch, structure=structure)
    assert of_frozen.keys() == frozen.keys() and count(frozen) > count(trainable)
    for path, values in of_frozen.items():
        assert not np.asarray(values).any(), path
    for path, values in of_trainable.items():
        values = np.asarray(values)
        assert np.isfinite(values).all(), path
        # Every layer of an adapter, and every new row.
        assert (np.abs(values).reshape(len(values), -1).max(axis=1) > 1e-4).all(), path


def test_base_rows_that_train_get_gradients_in_place_of_the_frozen_ones() -> None:
    structure, trainable, frozen = trained_split(tiny_config(VOCAB, tied=False), train_base=True)
    batch = training_batch(VOCAB + NEW)
    of_trainable, of_frozen = gradients(trainable, frozen, batch, structure=structure)
    assert not any(np.asarray(values).any() for values in of_frozen.values())
    moved = {path: np.abs(np.asarray(of_trainable[path])).max(axis=1) for path in BASE_ROWS}
    # Read are the ids of a text's tokens, the last of each aside; in the output every row takes part.
    read = np.isin(np.arange(VOCAB), np.asarray(batch["tokens"])[np.asarray(batch["weights"]) > 0])
    assert 0 < read.sum() < VOCAB and np.array_equal(moved[BASE_ROWS[0]] > 0, read)
    assert (moved[BASE_ROWS[1]] > 1e-4).all()


def test_the_original_model_has_no_gradient_of_trained_base_rows() -> None:
    structure, trainable, frozen = trained_split(tiny_config(VOCAB), train_base=True)
    batch = training_batch(VOCAB)

    def loss(trainable: Any, of: Any) -> jax.Array:
        return summed_loss(of, trainable, frozen, batch, adapters=False)

    value, slopes = jax.jit(jax.value_and_grad(loss), static_argnames="of")(trainable, of=structure)
    assert not any(np.asarray(slopes[path]).any() for path in slopes if path != "vocabulary.new")
    # Its loss is that of the frozen rows: that of a model that trains no base rows, bit for bit.
    without = trained_split(tiny_config(VOCAB))
    same = {path: trainable[path] for path in without.trainable}
    assert value == jax.jit(loss, static_argnames="of")(same, of=without.structure)


def test_remat_takes_less_memory_to_the_same_loss_and_gradients() -> None:
    # Layers enough that what is kept of them is most of the memory.
    structure, trainable, frozen = trained_split(replace(tiny_config(VOCAB), num_hidden_layers=8))
    batch = training_batch(VOCAB + NEW)

    def compiled(remat: Remat) -> Any:
        def loss(trainable: Any) -> jax.Array:
            return summed_loss(structure, trainable, frozen, batch, remat=remat)

        return jax.jit(jax.value_and_grad(loss)).lower(trainable).compile()

    programs = [compiled(remat) for remat in get_args(Remat)]
    keeping, some, *fewer, recomputing = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert recomputing < 0.8 * some < 0.8 * 0.8 * keeping
    assert all(recomputing < kept < some for kept in fewer)
    (loss, gradient), *others = (program(trainable) for program in programs)
    for again, recomputed in others:
        assert np.allclose(loss, again, rtol=1e-6)
        for path, values in gradient.items():
            scale = np.abs(values).max()
            # The same operations, which are compiled anew beside others: float32 rounding, through eight layers.
            assert scale > 0 and np.abs(values - recomputed[path]).max() < 1e-5 * scale, path


def test_what_remat_does_not_know_is_refused() -> None:
    split = trained_split(tiny_config(VOCAB))
    known = ", ".join(get_args(Remat))
    with pytest.raises(ValueError, match=f"^remat is True; it must be one of {known}$"):
        summed_loss(*split, training_batch(VOCAB + NEW), remat=True)  # type: ignore[arg-type]


def test_dropout_takes_a_key() -> None:
    config = tiny_config(VOCAB)
    split = trained_split(config)
    undropped = assemble(
        config, split.frozen, lora=replace(LORA, dropout=0.0), trainable=random_trainable(config, LORA, NEW)
    )
    rows = tuple(map(jnp.asarray, whole_rows()))

    @partial(jax.jit, static_argnames="structure")
    def hidden(structure: Any, trainable: Any, frozen: Any, key: Any) -> jax.Array:
        return merge(structure, trainable, frozen)(*rows, dropout=key)

    plain = hidden(*split, None)
    one, same, other = (hidden(*split, jax.random.key(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert np.abs(one - plain).max() > 0.01 and np.abs(one - other).max() > 0.01
    # No rate: a key changes nothing.
    assert np.array_equal(hidden(*undropped, jax.random.key(1)), plain)


def layer_of(lora: LoraConfig, parts: Mapping[str, jax.Array]) -> LoRALinear:
    """A linear layer that holds the given kernel, a and b."""
    shapes = parts["kernel"].shape
    structure, _ = nnx.split(LoRALinear("up", *shapes, lora, rngs=nnx.Rngs(0)))
    layer: LoRALinear = nnx.merge(structure, dict(parts))
    return layer


@partial(jax.jit, static_argnames="function")
def outputs_and_gradients(function: Any, *arguments: Any) -> tuple[Any, Any]:
    """The outputs, and the gradients of all arguments of a scalar that weighs the outputs unequally."""

    def scalar(*arguments: Any) -> tuple[jax.Array, Any]:
        outputs = function(*arguments)
        return sum(jnp.sum(jnp.sin(output + place)) for place, output in enumerate(jax.tree.leaves(outputs))), outputs

    slopes, outputs = jax.grad(scalar, argnums=tuple(range(len(arguments))), has_aux=True)(*arguments)
    return outputs, slopes


def require_near(ours: Any, wanted: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert np.abs(right).max() > 0.1 and np.abs(left - right).max() < 1e-4 * np.abs(right).max()


@pytest.mark.parametrize("dropped", [False, True], ids=["no dropout", "dropout"])
def test_the_gradients_of_adapted_layers_are_those_of_their_formula(dropped: bool) -> None:
    rate, size_in, sizes_out = 0.25, 8, (6, 5, 5)
    lora = LoraConfig(rank=3, alpha=7.5, dropout=rate)
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x = drawn(4, 50, size_in)
    layers = [{"kernel": drawn(size_in, size), "a": drawn(size_in, 3), "b": drawn(3, size)} for size in sizes_out]
    kernels = [layer.pop("kernel") for layer in layers]
    key = jax.random.key(1) if dropped else None

    # With identities for a and b, and no kernel, what comes out is what the adapter is given.
    eye = jnp.eye(size_in)
    open_layer = layer_of(LoraConfig(size_in, size_in, rate), {"kernel": 0 * eye, "a": eye, "b": eye})
    given = np.asarray(open_layer(x, adapters=True, dropout=key))
    kept = given != 0
    factor = kept / (1 - rate) if dropped else np.ones(x.shape, np.float32)
    assert np.allclose(given, x * factor, atol=1e-6)
    assert abs(kept.mean() - (1 - rate if dropped else 1)) < 0.04

    def ours(x: jax.Array, layers: Any, kernels: Any) -> list[jax.Array]:
        modules = [layer_of(lora, {"kernel": w, **layer}) for w, layer in zip(kernels, layers, strict=True)]
        return project(modules, x, adapters=True, dropout=key)

    def formula(x: jax.Array, layers: Any, kernels: Any) -> list[jax.Array]:
        return [
            x @ w + lora.alpha / lora.rank * ((x * factor) @ layer["a"]) @ layer["b"]
            for w, layer in zip(kernels, layers, strict=True)
        ]

    outputs, (of_x, of_layers, of_kernels) = outputs_and_gradients(ours, x, layers, kernels)
    assert not any(np.asarray(slope).any() for slope in of_kernels), "kernels beside adapters are frozen"
    wanted, (*slopes, _) = outputs_and_gradients(formula, x, layers, kernels)
    require_near((outputs, of_x, of_layers), (wanted, *slopes))

    def switched_off(x: jax.Array, layers: Any, kernels: Any) -> list[jax.Array]:
        modules = [layer_of(lora, {"kernel": w, **layer}) for w, layer in zip(kernels, layers, strict=True)]
        return project(modules, x, adapters=False, dropout=key)

    outputs, (of_x, of_layers, of_kernels) = outputs_and_gradients(switched_off, x, layers, kernels)
    assert not any(np.asarray(slope).any() for slope in jax.tree.leaves(of_layers))
    # Without adapters a kernel may train.
    wanted, slopes = outputs_and_gradients(lambda x, kernels: [x @ w for w in kernels], x, kernels)
    require_near((outputs, of_x, of_kernels), (wanted, *slopes))


@pytest.mark.parametrize(
    ("rate", "dropped"), [(0.5, 128), (0.2, 51), (0.05, 13), (1e-6, 1)], ids=["half", "rounded", "small", "not 0"]
)
def test_dropout_drops_so_many_256ths_and_keeps_the_mean(rate: float, dropped: int) -> None:
    """Of a length that is no multiple of four, for four values come from one random number."""
    eye = jnp.eye(64)
    layer = layer_of(LoraConfig(64, 64, rate), {"kernel": 0 * eye, "a": eye, "b": eye})
    out = np.asarray(layer(jnp.ones((4, 402, 64)), adapters=True, dropout=jax.random.key(3)))
    assert set(np.unique(out)) == {0, np.float32(256 / (256 - dropped))}
    share = dropped / 256
    for part in np.split(out[:, :400], 4, axis=1):
        # Five standard deviations of a mean of so many draws.
        assert abs((part == 0).mean() - share) < 5 * (share / part.size) ** 0.5
    # Nor do two parts drop alike.
    first, second = (part == 0 for part in np.split(out[:, :202], 2, axis=1))
    assert abs((first & second).mean() - share**2) < 5 * share / first.size**0.5


def attention_inputs(length: int, dtype: Any = jnp.float32) -> tuple[list[jax.Array], np.ndarray]:
    """q, k and v of 4 heads on 2, and the segment ids of two rows: two documents and padding, and one document."""
    rng = np.random.default_rng(0)
    parts = [jnp.asarray(rng.standard_normal((2, count, length, 6)), dtype) for count in (4, 2, 2)]
    segments = np.ones((2, length), np.int32)
    segments[0, length // 3 : -2], segments[0, -2:] = 2, 0
    return parts, segments


def test_attention_and_its_gradients_are_those_of_the_formula() -> None:
    (q, k, v), segments = attention_inputs(9)
    allowed = (segments[:, :, None] == segments[:, None, :]) & (np.arange(9)[:, None] >= np.arange(9))

    def formula(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(part, 2, axis=1) for part in (k, v))
        scores = jnp.where(allowed[:, None], q @ k.swapaxes(-1, -2) / 6**0.5, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1) @ v

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, causal_mask(jnp.asarray(segments)))

    def in_blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_causally(q, k, v, jnp.asarray(segments))

    wanted = outputs_and_gradients(formula, q, k, v)
    require_near(outputs_and_gradients(plain, q, k, v), wanted)
    require_near(outputs_and_gradients(in_blocks, q, k, v), wanted)


@pytest.mark.parametrize("window", [None, 2, 4, 6, 50])
@pytest.mark.parametrize("block", [4, 5], ids=lambda block: f"blocks of {block}")
def test_attention_in_blocks_is_the_plain_one_under_every_mask(
    monkeypatch: pytest.MonkeyPatch, block: int, window: int | None
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "MOST_BLOCKS", 12)
    (q, k, v), segments = attention_inputs(12)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, causal_mask(jnp.asarray(segments), window))

    def in_blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_causally(q, k, v, jnp.asarray(segments), window)

    require_near(outputs_and_gradients(in_blocks, q, k, v), outputs_and_gradients(plain, q, k, v))


def test_attention_in_blocks_skips_what_is_not_seen_and_keeps_no_weights() -> None:
    (q, k, v), segments = attention_inputs(512)

    def kept_and_computed(window: int | None) -> tuple[int, int]:
        """Numbers kept for the backward pass, and scores computed in the forward pass."""

        def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attend_causally(q, k, v, jnp.asarray(segments), window)

        _, pull = jax.vjp(ours, q, k, v)
        forward = jax.make_jaxpr(ours)(q, k, v)
        scores = re.findall(r"f32\[2,2,(\d+),(\d+)\] = exp", str(forward))
        return sum(leaf.size for leaf in jax.tree.leaves(pull)), sum(int(rows) * int(keys) for rows, keys in scores)

    square = 2 * 512 * 512  # of the two query heads on a key head
    kept, computed = kept_and_computed(None)
    # q, k, v, the segment ids, and a number a query: far less than the weights, of which there are 4 squares.
    assert kept == q.size + k.size + v.size + segments.size + q.size // 6
    assert computed == square * 5 // 8
    # In blocks of 128, of which each sees itself and what is less than 128 before it.
    assert kept_and_computed(128) == (kept, 2 * 128 * (128 + 3 * 255))


def test_attention_in_bfloat16_is_as_near_to_the_truth_in_blocks_as_plain() -> None:
    parts, segments = attention_inputs(300, jnp.bfloat16)

    def errors(function: Any, *more: Any) -> list[float]:
        ours = outputs_and_gradients(lambda q, k, v: function(q, k, v, *more), *parts)
        wanted = outputs_and_gradients(
            lambda q, k, v: attend(q, k, v, causal_mask(jnp.asarray(segments))),
            *(part.astype(jnp.float32) for part in parts),
        )
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(ours))
        return [
            float(np.abs(left.astype(np.float32) - right).mean())
            for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True)
        ]

    plain = errors(attend, causal_mask(jnp.asarray(segments)))
    blocked = errors(attend_causally, jnp.asarray(segments))
    assert all(0 < ours < 1.5 * theirs for ours, theirs in zip(blocked, plain, strict=True))


@pytest.mark.parametrize("field", ["vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -2, "many", 1.5, True])
def test_sizes_that_are_no_sizes_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        LlamaConfig.from_hf({**tiny_config(300).to_hf(), field: value})
