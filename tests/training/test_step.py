"""The step: what moves and what does not, accumulation, skipped updates, losses by source, full fine-tuning."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_weights, tiny_config

from transllm_jax.choices import Remat
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import LoraConfig
from transllm_jax.model.parameters import BASE_ROWS, Split, abstract, assemble, load_frozen, merge
from transllm_jax.training.optimizer import OptimizerConfig, group, make_optimizer, schedule
from transllm_jax.training.step import (
    Batch,
    Metrics,
    TrainState,
    batch_losses,
    hidden_states,
    initial_state,
    make_step,
)

# A frozen array that was given away with the state.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")

VOCAB, NEW, ROWS, LENGTH = 40, 5, 8, 12
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.2)
RATES = OptimizerConfig(1e-2, steps=8, warmup_steps=3, new_rows_multiplier=2.0, weight_decay=0.01)
# Optimizers that remember the last gradient; and that always give 1.
GRADIENTS = optax.GradientTransformationExtraArgs(
    lambda parameters: jax.tree.map(jnp.zeros_like, parameters),
    lambda gradient, state, parameters=None, *, finite: (gradient, gradient),
)
ONES = optax.GradientTransformationExtraArgs(
    lambda parameters: (),
    lambda gradient, state, parameters=None, *, finite: (jax.tree.map(jnp.ones_like, gradient), state),
)
FAMILY = replace(tiny_config(VOCAB, tied=False), attention_bias=True, mlp_bias=True)


def adapted_split(*, train_base: bool = False, tied: bool = True) -> Split:
    """Adapters and new rows in the middle of training: nothing is zero."""
    config = tiny_config(VOCAB, tied=tied)
    rng = np.random.default_rng(1)
    shapes = abstract(config, LORA, NEW, train_base=train_base).trainable
    trainable = {path: 0.1 * rng.standard_normal(leaf.shape, dtype=np.float32) for path, leaf in sorted(shapes.items())}
    return assemble(config, load_frozen(config, random_weights(config)), lora=LORA, trainable=trainable)


def full_split(config: LlamaConfig = FAMILY, dtype: Any = jnp.float32, **options: Any) -> Split:
    """All weights train, and new rows."""
    frozen = load_frozen(config, random_weights(config), dtype)
    rows = {path: leaf.shape for path, leaf in abstract(config, None, NEW).trainable.items()}
    rng = np.random.default_rng(1)
    drawn = {path: 0.1 * rng.standard_normal(shape, dtype=np.float32) for path, shape in sorted(rows.items())}
    return assemble(config, frozen, trainable={**frozen, **drawn}, **options)


def batch_of(rows: int = ROWS, seed: int = 0) -> Batch:
    """Random tokens of the whole vocabulary; very different numbers of them count in each row, one of them 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB + NEW, (rows, LENGTH), dtype=np.int32)
    counted = rng.permutation(np.arange(rows) * (LENGTH - 1) // max(rows - 1, 1))
    weights = (np.arange(LENGTH) < counted[:, None]).astype(np.float32)
    batch = {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
        "segment_ids": np.ones_like(tokens),
        "labels": np.roll(tokens, -1, axis=1),
        "weights": weights,
        "sources": np.arange(rows, dtype=np.int32) % 3,
    }
    return {field: jnp.asarray(values) for field, values in batch.items()}


def rows_of(batch: Batch, chosen: Any) -> Batch:
    return {field: values[chosen] for field, values in batch.items()}


def in_parts(batch: Batch, accumulate: int) -> Batch:
    """A batch as a step with `accumulate` takes it: its rows in so many parts, one after the other."""
    if accumulate == 1:
        return batch
    return {field: values.reshape(accumulate, -1, *values.shape[1:]) for field, values in batch.items()}


def tree_bytes(tree: Any) -> dict[str, bytes]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def near(ours: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Relative to each array's largest value: float32, sums in another order."""
    assert ours.keys() == wanted.keys()
    for path, values in wanted.items():
        scale = np.abs(values).max()
        assert scale > 0 and np.abs(np.asarray(ours[path]) - values).max() < tolerance * scale, path


@cache
def stepper(accumulate: int = 1, dropout: bool = False, z_loss: float = 0.0) -> Any:
    return make_step(
        adapted_split().structure,
        GRADIENTS,
        schedule(RATES),
        seed=11,
        dropout=dropout,
        remat="none",
        accumulate=accumulate,
        z_loss=z_loss,
        sources=3,
    )


def gradient_of(step: Any, batch: Batch, split: Split | None = None) -> tuple[dict[str, np.ndarray], Metrics]:
    """The gradient that a step gives its optimizer, and the step's metrics."""
    split = split or adapted_split()
    state, metrics = step(initial_state(split.trainable, GRADIENTS), split.frozen, batch)
    return {path: np.asarray(values) for path, values in state.optimizer.items()}, metrics


# --- the schedule ---------------------------------------------------------------------------------------------------


def test_the_rates_of_each_schedule() -> None:
    def rates(**changes: Any) -> list[float]:
        config = OptimizerConfig(0.5, steps=20, warmup_steps=4, final_fraction=0.2)
        rate = schedule(replace(config, **changes))
        compiled = jax.jit(rate)
        values = [float(rate(step)) for step in range(23)]
        # As the step computes them: of a number on the device.
        assert np.allclose(values, [compiled(jnp.int32(step)) for step in range(23)], rtol=1e-6)
        return values

    rising = [0.1, 0.2, 0.3, 0.4]
    cosine = [0.1 + 0.4 * (1 + np.cos(np.pi * step / 16)) / 2 for step in range(17)]
    linear = [0.5 - 0.4 * step / 16 for step in range(17)]
    stable = [0.5] * 12 + [0.5 - 0.4 * step / 5 for step in range(6)]
    for changes, wanted in (
        ({}, rising + cosine),
        ({"schedule": "linear"}, rising + linear),
        # Steps 4 to 14 at the peak, 15 the first of the last five, which is still there.
        ({"schedule": "wsd", "decay_steps": 5}, rising + stable[1:]),
        ({"schedule": "constant"}, rising + [0.5] * 17),
        ({"schedule": "constant", "warmup_steps": 0}, [0.5] * 21),
        ({"warmup_steps": 0, "schedule": "linear"}, [0.5 - 0.4 * step / 20 for step in range(21)]),
        ({"warmup_steps": 0, "schedule": "wsd", "decay_steps": 20}, [0.5 - 0.4 * step / 20 for step in range(21)]),
    ):
        values = rates(**changes)
        assert np.allclose(values, [*wanted, wanted[-1], wanted[-1]], rtol=1e-5), changes
    # Nothing but warm-up ends just below the peak.
    assert np.isclose(rates(warmup_steps=20)[19], 0.5 * 20 / 21, rtol=1e-5)


@pytest.mark.parametrize("decay_steps", [0, 17])
def test_a_decay_that_does_not_fit_is_refused(decay_steps: int) -> None:
    with pytest.raises(ValueError, match=f"decay_steps is {decay_steps}; schedule wsd wants 1 to 16"):
        OptimizerConfig(0.5, steps=20, warmup_steps=4, schedule="wsd", decay_steps=decay_steps)


def test_the_rate_is_that_of_the_state_and_not_of_the_parts() -> None:
    """An optimizer that always gives 1: what moves is the rate."""
    rate = schedule(RATES)
    for accumulate in (1, 4):
        split = adapted_split()
        step = make_step(split.structure, ONES, rate, seed=0, dropout=False, remat="none", accumulate=accumulate)
        for number in (0, 2, 5):
            trainable = jax.tree.map(jnp.zeros_like, split.trainable)
            state = initial_state(trainable, ONES)._replace(step=jnp.int32(number))
            state, _ = step(state, split.frozen, in_parts(batch_of(), accumulate))
            assert int(state.step) == number + 1
            for path, values in state.trainable.items():
                assert np.allclose(values, -float(rate(number)), rtol=1e-6), path


# --- accumulation ---------------------------------------------------------------------------------------------------


def test_parts_of_a_batch_give_what_the_whole_batch_gives() -> None:
    batch = batch_of()
    wanted, whole = gradient_of(stepper(), batch)
    assert whole.tokens == batch["weights"].sum() > 0
    for accumulate in (2, 8):
        ours, metrics = gradient_of(stepper(accumulate), in_parts(batch, accumulate))
        near(ours, wanted)
        assert metrics.tokens == whole.tokens and np.array_equal(metrics.source_tokens, whole.source_tokens)
        for field in ("loss", "gradient_norm", "source_loss"):
            assert np.allclose(getattr(metrics, field), getattr(whole, field), rtol=1e-5), field
    # What a mean of the parts' means would give is far from it.
    parts = [gradient_of(stepper(), rows_of(batch, slice(at, at + 4))) for at in (0, 4)]
    assert not np.isclose((parts[0][1].loss + parts[1][1].loss) / 2, whole.loss, rtol=1e-3)
    for path, values in wanted.items():
        mean = (parts[0][0][path] + parts[1][0][path]) / 2
        assert np.abs(mean - values).max() > 1e-2 * np.abs(values).max(), path


@pytest.mark.parametrize("batch", [batch_of(), in_parts(batch_of(), 4)], ids=["whole", "in 4"])
def test_a_batch_that_is_not_in_the_parts_of_the_step_is_refused(batch: Batch) -> None:
    split = adapted_split()
    shape = re.escape(str(batch["tokens"].shape))
    with pytest.raises(ValueError, match=f"^a batch of tokens {shape} is not in 2 parts"):
        stepper(2)(initial_state(split.trainable, GRADIENTS), split.frozen, batch)


def test_each_part_drops_by_its_own_key_of_seed_step_and_part() -> None:
    one = rows_of(batch_of(), np.array([1, 2]))
    batch = {field: jnp.concatenate([values, values]) for field, values in one.items()}
    batch["sources"] = jnp.array([0, 0, 1, 1])
    split = adapted_split()
    losses = {}
    for dropout in (False, True):
        state = initial_state(adapted_split().trainable, GRADIENTS)._replace(step=jnp.int32(5))
        _, metrics = stepper(2, dropout)(state, split.frozen, in_parts(batch, 2))
        losses[dropout] = np.asarray(metrics.source_loss)
    assert losses[False][0] == losses[False][1] > 0
    assert abs(losses[True][0] - losses[True][1]) > 1e-3

    @jax.jit
    def summed(part: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(11), 5), part)
        return jnp.sum(batch_losses(*split, one, dropout=key)[1])

    wanted = [float(summed(jnp.int32(part))) for part in (0, 1)]
    assert np.allclose(losses[True][:2], wanted, rtol=1e-5)


# --- what is reported -----------------------------------------------------------------------------------------------


def test_losses_by_source_add_up_to_the_whole() -> None:
    batch = batch_of()
    # Weights other than 0 and 1, as where a source counts less.
    batch["weights"] = batch["weights"] * jnp.where(batch["sources"] == 1, 0.25, 1.0)[:, None]
    _, metrics = gradient_of(stepper(), batch)
    split = adapted_split()
    _, losses = jax.jit(batch_losses, static_argnums=0)(*split, batch)
    for number in range(3):
        rows = np.asarray(batch["sources"]) == number
        assert np.isclose(metrics.source_loss[number], np.asarray(losses)[rows].sum(), rtol=1e-5)
        assert metrics.source_tokens[number] == np.asarray(batch["weights"])[rows].sum() > 0
    assert metrics.tokens == metrics.source_tokens.sum()
    assert np.isclose(metrics.loss, metrics.source_loss.sum() / metrics.tokens, rtol=1e-6)
    assert metrics.finite
    # A batch that does not say is one source.
    del batch["sources"]
    _, alone = gradient_of(stepper(), batch)
    assert np.isclose(alone.loss, metrics.loss, rtol=1e-6) and not alone.source_loss[1:].any()
    assert alone.source_tokens.tolist() == [metrics.tokens, 0, 0]


def test_z_loss_is_descended_and_not_reported() -> None:
    plain, metrics = gradient_of(stepper(), batch_of())
    ours, reported = gradient_of(stepper(z_loss=0.5), batch_of())
    parted, _ = gradient_of(stepper(2, z_loss=0.5), in_parts(batch_of(), 2))
    assert reported.loss == metrics.loss and np.array_equal(reported.source_loss, metrics.source_loss)
    split, batch = adapted_split(), batch_of()

    @jax.jit
    @jax.grad
    def wanted(trainable: Any) -> jax.Array:
        model = merge(split.structure, trainable, split.frozen)
        hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        log_z = jax.nn.logsumexp(model.vocabulary.logits(hidden), axis=-1)
        return 0.5 * jnp.sum(batch["weights"] * log_z**2) / jnp.sum(batch["weights"])

    extra = wanted(split.trainable)
    near(ours, {path: values + extra[path] for path, values in plain.items()})
    near(parted, ours)


# --- what is not finite ---------------------------------------------------------------------------------------------


def test_an_update_that_is_not_finite_leaves_every_byte() -> None:
    split = adapted_split()
    optimizer = make_optimizer(RATES)
    step = make_step(split.structure, optimizer, schedule(RATES), seed=1, dropout=False, remat="none")
    good = batch_of()
    broken = good | {"weights": good["weights"] * np.float32(3e38)}
    state, metrics = step(initial_state(split.trainable, optimizer), split.frozen, good)
    assert metrics.finite and (int(state.skipped), int(state.skipped_in_a_row)) == (0, 0)
    before = tree_bytes((state.trainable, state.optimizer))
    for number in (1, 2):
        state, metrics = step(state, split.frozen, broken)
        assert not metrics.finite and not np.isfinite(metrics.loss)
        assert tree_bytes((state.trainable, state.optimizer)) == before, "the count of moments, too"
        assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (1 + number, number, number)
    state, metrics = step(state, split.frozen, good)
    assert metrics.finite and (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (4, 2, 0)
    after = tree_bytes((state.trainable, state.optimizer))
    assert all(after[path] != before[path] for path in before if "EmptyState" not in path)
    state, _ = step(state, split.frozen, broken)
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (3, 1)


def test_a_gradient_that_is_not_finite_is_enough() -> None:
    split = adapted_split()
    before = tree_bytes(split.trainable)
    step = stepper(z_loss=1.5e38)
    state, metrics = step(initial_state(split.trainable, GRADIENTS), split.frozen, batch_of())
    assert np.isfinite(metrics.loss) and not np.isfinite(metrics.gradient_norm) and not metrics.finite
    assert tree_bytes(state.trainable) == before and int(state.skipped) == 1


def test_moments_are_those_of_optax_or_stay() -> None:
    parameters = {"vocabulary.new": jnp.linspace(-1, 1, 3000).reshape(30, 100)}
    ours, theirs = (
        make_optimizer(RATES),
        optax.chain(
            optax.clip_by_global_norm(RATES.clip_norm),
            optax.scale_by_adam(RATES.beta1, RATES.beta2),
            optax.add_decayed_weights(RATES.weight_decay),
            optax.scale(RATES.new_rows_multiplier),
        ),
    )
    state, wanted_state = ours.init(parameters), theirs.init(parameters)
    for number in range(3):
        gradient = jax.tree.map(lambda values: jnp.cos(values * (9 + number)), parameters)  # noqa: B023
        _, kept = ours.update(gradient, state, parameters, finite=jnp.bool_(False))
        assert tree_bytes(kept) == tree_bytes(state)
        update, state = ours.update(gradient, state, parameters, finite=jnp.bool_(True))
        wanted, wanted_state = theirs.update(gradient, wanted_state, parameters)
        assert tree_bytes(update) == tree_bytes(wanted)
        assert list(tree_bytes(state).values()) == list(tree_bytes(wanted_state).values())


def test_weight_decay_leaves_scales_and_biases_alone() -> None:
    paths = ["final_norm.scale", "blocks.attention.q.bias", "blocks.attention.q.kernel", "blocks.attention.q.a"]
    arrays = {path: jnp.ones((2, 3)) for path in [*paths, "vocabulary.new"]}
    optimizer = make_optimizer(replace(RATES, weight_decay=0.5, new_rows_multiplier=1.0))
    update, _ = optimizer.update(jax.tree.map(jnp.zeros_like, arrays), optimizer.init(arrays), arrays)
    decayed = {path for path, change in update.items() if np.any(change)}
    assert decayed == {"blocks.attention.q.kernel", "blocks.attention.q.a", "vocabulary.new"}


def test_to_be_able_to_skip_copies_nothing() -> None:
    split = abstract(replace(tiny_config(VOCAB), num_hidden_layers=1), LORA, 5000)
    optimizer = make_optimizer(RATES)
    step = make_step(split.structure, optimizer, schedule(RATES), seed=0, dropout=False, remat="none")
    state = jax.eval_shape(lambda arrays: initial_state(arrays, optimizer), split.trainable)
    program = step.lower(state, split.frozen, jax.eval_shape(lambda: batch_of(1))).compile()
    memory = program.memory_analysis()
    rows = 5000 * 48 * 4
    # The rows' gradient, and one array of their size beside it; copies of the moments would be two more.
    assert rows < memory.temp_size_in_bytes < 2.5 * rows
    assert memory.alias_size_in_bytes > 3 * rows, "rows and moments are updated where they are"


# --- what trains ----------------------------------------------------------------------------------------------------


def after_steps(split: Split, config: OptimizerConfig = RATES, **options: Any) -> TrainState:
    """The state after two steps; nothing frozen has changed."""
    optimizer = make_optimizer(config)
    frozen = tree_bytes(split.frozen)
    step = make_step(
        split.structure, optimizer, schedule(config), seed=0, dropout=False, **{"remat": "none", **options}
    )
    state = initial_state(split.trainable, optimizer)
    for number in range(2):
        state, metrics = step(state, split.frozen, batch_of(4, seed=number))
        assert metrics.finite
    assert tree_bytes(split.frozen) == frozen
    return state


def moments(state: TrainState) -> list[str]:
    """The paths of what the optimizer keeps two moments of."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state.optimizer)
    names = [str(path[-1].key) for path, leaf in leaves if leaf.ndim]
    assert sorted(names) == sorted(2 * sorted(set(names)))
    return sorted(set(names))


ADAPTERS = {
    f"blocks.{part}.{name}.{factor}"
    for part, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down")))
    for name in names
    for factor in "ab"
}
NEW_ROWS = {"vocabulary.new", "vocabulary.output_new"}


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
    split = full_split() if case.startswith("full") else adapted_split(train_base=case == "all", tied=False)
    if case in ("none", "full, embeddings held"):
        split = split.hold(path for path in split.trainable if path.startswith("vocabulary"))
    before = tree_bytes(split.trainable)
    everything = tree_bytes({**split.trainable, **split.frozen})
    state = after_steps(split)
    after = tree_bytes(state.trainable)
    assert {path[2:-2] for path in after} == wanted == set(moments(state))
    assert all(after[path] != before[path] for path in before)
    # Held rows are still there, bit for bit.
    frozen = tree_bytes(split.frozen)
    assert frozen.keys() | after.keys() == everything.keys() and everything | frozen == everything


def test_each_array_is_of_its_group() -> None:
    assert {group(path) for path in ADAPTERS} == {"adapters"}
    assert {group(path) for path in NEW_ROWS | set(BASE_ROWS)} == {"new_rows"}
    assert {group(path) for path in random_weights(FAMILY)} == {"weights"}
    # The weights' rate has no multiplier.
    parameters = {path: jnp.ones(2) for path in ("vocabulary.base", "vocabulary.new", "blocks.mlp.up.kernel")}
    optimizer = make_optimizer(replace(RATES, new_rows_multiplier=3.0, weight_decay=0.0))
    updates, _ = optimizer.update(parameters, optimizer.init(parameters), parameters)
    # Adam's first step is the gradient's sign; the rate is the step's to apply.
    assert np.allclose(updates["vocabulary.base"], 1) and np.allclose(updates["blocks.mlp.up.kernel"], 1)
    assert np.allclose(updates["vocabulary.new"], 3)


def test_only_what_trains_can_be_held() -> None:
    with pytest.raises(ValueError, match=r"^blocks\.mlp\.up\.kernel, vocabulary\.base: not among what trains$"):
        adapted_split().hold(["vocabulary.new", "vocabulary.base", "blocks.mlp.up.kernel"])


def _products(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of all matrix products of a program, inner programs included."""
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


def test_frozen_weights_cost_no_product_of_their_gradient() -> None:
    split = adapted_split(tied=False)

    def pairs(shapes: Any) -> set[tuple[int, ...]]:
        """Whichever side stands first: a gradient may be computed transposed."""
        return {tuple(sorted(shape)) for shape in shapes}

    kernels = pairs(leaf.shape[1:] for path, leaf in split.frozen.items() if path.endswith("kernel"))
    tables = pairs([(VOCAB, 48), (NEW, 48)])
    assert kernels == {(48, 64), (32, 48), (48, 80)}
    # Parts of 24 tokens, which is no size of the model.
    for accumulate in (1, 4):
        shapes = pairs(products(split, accumulate=accumulate))
        assert not shapes & kernels and shapes & tables == {(NEW, 48)}
    assert not pairs(products(split.hold(["vocabulary.output_new"]))) & (kernels | tables)
    # The search finds them where they are.
    assert pairs(products(full_split())) >= kernels | tables
    assert pairs(products(adapted_split(train_base=True))) & (kernels | tables) == tables


def test_what_each_remat_computes_again() -> None:
    split = adapted_split()
    none, some, full = (products(split, remat) for remat in ("none", "projections", "full"))
    projections = [shape for shape in none if shape[0] == ROWS * LENGTH]
    assert len(projections) > 20
    assert [shape for shape in some if shape[0] == ROWS * LENGTH] == projections
    # Attention keeps no weights: its own backward pass makes them again, whatever else is kept.
    assert len(some) == len(none)
    assert len(full) > len(none) + 10
    # Those of gate and up; of q, k and v; of q. What down gives nobody needs. Each with its adapter's second product,
    # for the first is kept.
    attention, feed_forward, queries = (products(split, remat) for remat in ("attention", "feed_forward", "queries"))
    of = ROWS * LENGTH

    def again(found: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return sorted((Counter(found) - Counter(none)).elements())

    assert again(attention) == 4 * [(of, 80)]
    assert again(feed_forward) == 4 * [(of, 32)] + 2 * [(of, 64)]
    assert again(queries) == 2 * [(of, 64)]


# --- full fine-tuning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FAMILY, replace(tiny_config(VOCAB), model_type="qwen3")], ids=["untied", "tied"])
@pytest.mark.parametrize("remat", ["none", "projections"])
def test_full_fine_tuning_has_the_gradient_of_the_plain_loss(config: LlamaConfig, remat: Remat) -> None:
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
    step = make_step(
        split.structure, GRADIENTS, schedule(RATES), seed=0, dropout=False, remat=remat, accumulate=2, sources=3
    )
    ours, _ = gradient_of(step, in_parts(batch, 2), split)
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
    # Computed is in bfloat16, as with frozen weights, and with the same result.
    batch = batch_of(4)
    hidden = hidden_states(*split, batch)
    assert hidden.dtype == jnp.bfloat16
    assert np.array_equal(hidden, hidden_states(*assemble(config, frozen, trainable=rows), batch))
    # A rate at which no step is visible in bfloat16.
    state = after_steps(split, replace(RATES, learning_rate=1e-6))
    for path, values in state.trainable.items():
        assert values.dtype == jnp.float32
        assert 0 < np.abs(np.asarray(values) - started[path]).max() < 1e-5, path
    norm = "blocks.mlp_norm.scale"
    assert np.array_equal(state.trainable[norm].astype(jnp.bfloat16), frozen[norm])


def test_base_rows_without_a_token_stay_in_full_fine_tuning() -> None:
    split = full_split(padding=((VOCAB - 4, VOCAB),))
    before = {path: np.array(split.trainable[path]) for path in ("vocabulary.base", "vocabulary.output_base")}
    state = after_steps(split)
    for path, values in before.items():
        moved = (np.asarray(state.trainable[path]) != values).any(axis=1)
        assert not moved[-4:].any() and moved[:-4].all(), path


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


def test_a_path_that_is_in_both_is_taken_from_what_trains() -> None:
    split = full_split()
    wrong = jax.tree.map(jnp.zeros_like, split.trainable)
    batch = batch_of(4)
    assert np.array_equal(hidden_states(split.structure, split.trainable, wrong, batch), hidden_states(*split, batch))
