"""Adapters and vocabulary rows beside the frozen weights, and how `assemble` puts a model together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_weights, tiny_config
from flax import nnx
from tiny_splits import (
    LORA,
    NEW,
    VOCAB,
    base_split,
    logits,
    merged_weights,
    random_trainable,
    trained_split,
    whole_rows,
)

from transllm_jax.errors import UserError
from transllm_jax.model.parameters import BASE_ROWS, abstract, assemble, initial_adapters, load_frozen
from transllm_jax.model.vocabulary import Vocabulary


@pytest.mark.parametrize("train_base", [False, True], ids=["new rows", "base rows too"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_switched_off_it_is_the_original_model_bit_for_bit(tied: bool, train_base: bool) -> None:
    config = tiny_config(VOCAB, tied=tied)
    original = logits(base_split(config), whole_rows())
    trained = trained_split(config, train_base=train_base)
    assert np.array_equal(logits(trained, whole_rows(), adapters=False, base_only=True), original)
    assert np.abs(logits(trained, whole_rows())[..., :VOCAB] - original).max() > 0.1, (
        "adapters and new rows have an effect"
    )


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
    # Training of base rows begins with copies.
    copies = {path: np.asarray(frozen[path.removesuffix("_trained")], np.float32) for path in BASE_ROWS}
    rows = whole_rows(VOCAB + NEW)
    assert (rows[0] >= VOCAB).any()
    with_copies = logits(assemble(config, frozen, trainable=new | copies), rows)
    assert np.array_equal(with_copies, logits(assemble(config, frozen, trainable=new), rows))
    # The same without new rows, which an adapter from elsewhere may lack.
    assert np.array_equal(
        logits(assemble(config, frozen, trainable=copies), whole_rows()),
        logits(assemble(config, frozen), whole_rows()),
    )


def test_trained_base_rows_begin_as_copies() -> None:
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
    # There are none by default.
    assert not any(path in BASE_ROWS for path in abstract(tiny_config(VOCAB), LORA, NEW).trainable)


def test_fresh_adapters_depend_on_the_seed() -> None:
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
    # Arrays of the same shape are drawn independently: k and v, and the two layers.
    assert not np.array_equal(one["blocks.attention.k.a"], one["blocks.attention.v.a"])
    assert not np.array_equal(one["blocks.mlp.up.a"][0], one["blocks.mlp.up.a"][1])


@pytest.mark.parametrize("train_base", [False, True], ids=["new rows", "base rows too"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_trained_model_equals_its_merged_weights(tied: bool, train_base: bool) -> None:
    config = tiny_config(VOCAB, tied=tied)
    merged = merged_weights(config, LORA, random_trainable(config, LORA, NEW, train_base=train_base))
    larger = replace(config, vocab_size=VOCAB + NEW)
    rows_with_new_ids = whole_rows(VOCAB + NEW)
    assert (rows_with_new_ids[0] >= VOCAB).any()
    wanted = logits(assemble(larger, load_frozen(larger, merged)), rows_with_new_ids)
    ours = logits(trained_split(config, train_base=train_base), rows_with_new_ids)
    assert np.abs(ours - wanted).max() < 1e-4


def test_assemble_lists_everything_wrong() -> None:
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


def test_load_frozen_lists_everything_wrong_or_takes_the_weights() -> None:
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
    assert not weights, "load_frozen takes the arrays, so that only one copy is held"
    assert frozen.keys() == kept.keys() and all(np.array_equal(frozen[path], kept[path]) for path in kept)


def test_assemble_copies_what_trains() -> None:
    config = tiny_config(VOCAB)
    frozen = load_frozen(config, random_weights(config))
    trainable = {path: jnp.asarray(value) for path, value in random_trainable(config, LORA, NEW).items()}
    split = assemble(config, frozen, lora=LORA, trainable=trainable)
    for values in split.trainable.values():
        values.delete()
    assert all(np.isfinite(values).all() for values in trainable.values())
