"""What trains and what is held: which arrays move, what it costs, and full fine-tuning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_weights, tiny_config
from tiny_steps import (
    ADAPTERS,
    FAMILY,
    GRADIENTS,
    LENGTH,
    NEW_ROWS,
    RATES,
    ROWS,
    batch_of,
    full_split,
    gradient_of,
    in_parts,
    near,
)
from tiny_training import LORA, NEW, VOCAB, adapted_split, tree_bytes

from transllm_jax.choices import Remat
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.parameters import BASE_ROWS, Split, abstract, assemble, load_frozen, merge
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from transllm_jax.training.step import TrainState, hidden_states, initial_state, make_step

# XLA gives this warning if a frozen array is donated with the state.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")

TABLES = {"vocabulary.base", "vocabulary.output_base"}


def after_steps(split: Split, config: OptimizerConfig = RATES) -> TrainState:
    """The state after two steps, which change nothing frozen."""
    optimizer = make_optimizer(config)
    frozen = tree_bytes(split.frozen)
    step = make_step(split.structure, optimizer, schedule(config), seed=0, dropout=False, remat="none")
    state = initial_state(split.trainable, optimizer)
    for number in range(2):
        state, metrics = step(state, split.frozen, batch_of(4, seed=number))
        assert metrics.finite
    assert tree_bytes(split.frozen) == frozen
    return state


def moments(state: TrainState) -> list[str]:
    """The paths of the arrays of which the optimizer keeps two moments."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state.optimizer)
    names = [str(path[-1].key) for path, leaf in leaves if leaf.ndim]
    assert sorted(names) == sorted(2 * sorted(set(names)))
    return sorted(set(names))


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ("new", ADAPTERS | NEW_ROWS),
        ("all", ADAPTERS | NEW_ROWS | set(BASE_ROWS)),
        ("none", ADAPTERS),
        ("full", set(random_weights(FAMILY)) | NEW_ROWS),
        ("full, embeddings held", {path for path in random_weights(FAMILY) if not path.startswith("vocabulary")}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_moves_is_exactly_what_trains(case: str, wanted: set[str]) -> None:
    if case.startswith("full"):
        split = full_split(padding=((VOCAB - 4, VOCAB),))
    else:
        split = adapted_split(train_base=case == "all", tied=False)
    tables = {path: np.array(split.trainable[path]) for path in TABLES & split.trainable.keys()}
    if case in ("none", "full, embeddings held"):
        split = split.freeze(path for path in split.trainable if path.startswith("vocabulary"))
    before = tree_bytes(split.trainable)
    everything = tree_bytes({**split.trainable, **split.frozen})
    state = after_steps(split)
    after = tree_bytes(state.trainable)
    assert {path[2:-2] for path in after} == wanted == set(moments(state))
    assert all(after[path] != before[path] for path in before)
    # Held rows are unchanged, bit for bit.
    frozen = tree_bytes(split.frozen)
    assert frozen.keys() | after.keys() == everything.keys() and everything | frozen == everything
    if case == "full":
        # Only rows that have a token move.
        assert tables.keys() == TABLES
        for path, rows in tables.items():
            moved = (np.asarray(state.trainable[path]) != rows).any(axis=1)
            assert not moved[-4:].any() and moved[:-4].all(), path


def test_only_what_trains_can_be_held() -> None:
    with pytest.raises(ValueError, match=r"^blocks\.mlp\.up\.kernel, vocabulary\.base: not among what trains$"):
        adapted_split().freeze(["vocabulary.new", "vocabulary.base", "blocks.mlp.up.kernel"])


def _products(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shape of each matrix product of a program and of its inner programs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _products(inner)


def products(split: Split, remat: Remat = "none", accumulate: int = 1) -> list[tuple[int, ...]]:
    options: dict[str, Any] = {"seed": 0, "dropout": False, "remat": remat, "accumulate": accumulate}
    step = make_step(split.structure, GRADIENTS, schedule(RATES), **options)
    batch = in_parts(batch_of(), accumulate)
    program = jax.make_jaxpr(step)(initial_state(split.trainable, GRADIENTS), split.frozen, batch)
    return list(_products(program.jaxpr))


def test_frozen_weights_cost_no_product_for_a_gradient() -> None:
    split = adapted_split(tied=False)

    def pairs(shapes: Any) -> set[tuple[int, ...]]:
        """The shapes, sorted: a gradient may be computed transposed."""
        return {tuple(sorted(shape)) for shape in shapes}

    kernels = pairs(leaf.shape[1:] for path, leaf in split.frozen.items() if path.endswith("kernel"))
    tables = pairs([(VOCAB, 48), (NEW, 48)])
    assert kernels == {(48, 64), (32, 48), (48, 80)}
    # 4 parts have 24 tokens each, which is no size of the model.
    for accumulate in (1, 4):
        shapes = pairs(products(split, accumulate=accumulate))
        assert not shapes & kernels and shapes & tables == {(NEW, 48)}
    assert not pairs(products(split.freeze(["vocabulary.output_new"]))) & (kernels | tables)
    # These models have such products, and `products` finds them.
    assert pairs(products(full_split())) >= kernels | tables
    assert pairs(products(adapted_split(train_base=True))) & (kernels | tables) == tables


def test_what_each_remat_recomputes() -> None:
    split = adapted_split()
    none, some, full = (products(split, remat) for remat in ("none", "projections", "full"))
    projections = [shape for shape in none if shape[0] == ROWS * LENGTH]
    assert len(projections) > 20
    assert [shape for shape in some if shape[0] == ROWS * LENGTH] == projections
    # Attention never keeps its weights: its backward pass recomputes them.
    assert len(some) == len(none)
    assert len(full) > len(none) + 10
    # Recomputed are gate and up; q, k and v; q. The result of down is not needed. With each product comes the second
    # one of its adapter, whose first one is kept.
    attention, feed_forward, queries = (products(split, remat) for remat in ("attention", "feed_forward", "queries"))
    of = ROWS * LENGTH

    def again(found: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return sorted((Counter(found) - Counter(none)).elements())

    assert again(attention) == 4 * [(of, 80)]
    assert again(feed_forward) == 4 * [(of, 32)] + 2 * [(of, 64)]
    assert again(queries) == 2 * [(of, 64)]


@pytest.mark.parametrize("config", [FAMILY, replace(tiny_config(VOCAB), model_type="qwen3")], ids=["untied", "tied"])
def test_full_fine_tuning_has_the_gradient_of_the_plain_loss(config: LlamaConfig) -> None:
    split, batch = full_split(config), batch_of()
    assert split.trainable.keys() > abstract(config, None, NEW).frozen.keys() and not split.frozen

    @jax.jit
    @jax.grad
    def wanted(trainable: Any) -> jax.Array:
        model = merge(split.structure, trainable, {})
        hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        scores = jax.nn.log_softmax(model.vocabulary.logits(hidden))
        chosen = jnp.take_along_axis(scores, batch["labels"][..., None], axis=-1)[..., 0]
        return -jnp.sum(batch["weights"] * chosen) / jnp.sum(batch["weights"])

    plain = {path: np.asarray(values) for path, values in wanted(split.trainable).items()}
    remats: tuple[Remat, ...] = ("none", "projections")
    for remat in remats:
        step = make_step(
            split.structure, GRADIENTS, schedule(RATES), seed=0, dropout=False, remat=remat, accumulate=2, sources=3
        )
        ours, _ = gradient_of(step, in_parts(batch, 2), full_split(config))
        near(ours, plain, 2e-5)


def test_a_full_step_in_bfloat16_keeps_float32_masters() -> None:
    config = replace(FAMILY, num_hidden_layers=1)
    frozen = load_frozen(config, random_weights(config), jnp.bfloat16)
    before = tree_bytes(frozen)
    rows = {path: np.full((NEW, 48), 0.05, np.float32) for path in sorted(NEW_ROWS)}
    split = assemble(config, frozen, trainable={**frozen, **rows})
    assert not split.frozen and tree_bytes(frozen) == before
    assert all(values.dtype == jnp.bfloat16 for values in frozen.values())
    started = {path: np.asarray(values) for path, values in split.trainable.items()}
    assert {values.dtype for values in started.values()} == {np.dtype(np.float32)}
    # It is computed in bfloat16, with the same result as with frozen weights.
    batch = batch_of(4)
    hidden = hidden_states(*split, batch)
    assert hidden.dtype == jnp.bfloat16
    assert np.array_equal(hidden, hidden_states(*assemble(config, frozen, trainable=rows), batch))
    # At this rate no step is visible in bfloat16.
    state = after_steps(split, replace(RATES, learning_rate=1e-6))
    for path, values in state.trainable.items():
        assert values.dtype == jnp.float32
        assert 0 < np.abs(np.asarray(values) - started[path]).max() < 1e-5, path
    norm = "blocks.mlp_norm.scale"
    assert np.array_equal(state.trainable[norm].astype(jnp.bfloat16), frozen[norm])


def test_full_fine_tuning_takes_all_weights_and_no_adapters() -> None:
    config = FAMILY
    frozen = load_frozen(config, random_weights(config))
    some = {path: values for path, values in frozen.items() if not path.startswith(("final", "blocks.attention_norm"))}
    with pytest.raises(UserError) as caught:
        assemble(config, frozen, trainable=some | {"vocabulary.base_trained": frozen["vocabulary.base"]})
    for part in (
        "blocks.attention_norm.scale is missing",
        "final_norm.scale is missing",
        "vocabulary.base_trained is not of this model",
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="either adapters or full fine-tuning"):
        assemble(config, frozen, lora=LORA, trainable=frozen)


def test_a_path_in_both_is_taken_from_what_trains() -> None:
    split = full_split()
    wrong = jax.tree.map(jnp.zeros_like, split.trainable)
    batch = batch_of(4)
    assert np.array_equal(hidden_states(split.structure, split.trainable, wrong, batch), hidden_states(*split, batch))
