"""Cross-entropy over two blocks in chunks: the plain one's value and gradients, without the plain one's memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transllm_jax.training import loss

VOCAB, NEW, WIDTH = 11, 4, 8
TOKENS = (3, 4)


def plain_losses(hidden: jax.Array, base: jax.Array, new: jax.Array | None, labels: Any) -> tuple[jax.Array, jax.Array]:
    """The definition, all logits of one table: -log p(label) and log(Z) of each token."""
    table = base if new is None else jnp.concatenate([base, new])
    scores = (hidden @ table.T).astype(jnp.float32)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], axis=-1)[..., 0]
    return losses, jax.nn.logsumexp(scores, axis=-1)


def plain(
    hidden: jax.Array, base: jax.Array, new: jax.Array | None, labels: Any, weights: Any, z_loss: float = 0.0
) -> jax.Array:
    losses, log_z = plain_losses(hidden, base, new, labels)
    return jnp.sum(weights * (losses + z_loss * log_z**2))


def cross_entropy(*arguments: Any, **options: Any) -> jax.Array:
    """What is descended, without the tokens' losses."""
    return loss.cross_entropy(*arguments, **options)[0]


def inputs(new_rows: int | None, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    size = VOCAB + (new_rows or 0)
    labels = rng.permutation(np.arange(np.prod(TOKENS)) % size).reshape(TOKENS)
    weights = rng.choice([0.0, 0.25, 1.0, 1.5], TOKENS)
    if new_rows:
        assert (weights[labels >= VOCAB] > 0).any() and (weights[labels < VOCAB] > 0).any()
    return {
        "hidden": jnp.asarray(scale * rng.standard_normal((*TOKENS, WIDTH)), jnp.float32),
        "base": jnp.asarray(rng.standard_normal((VOCAB, WIDTH)), jnp.float32),
        "new": None if new_rows is None else jnp.asarray(rng.standard_normal((new_rows, WIDTH)), jnp.float32),
        "labels": jnp.asarray(labels, jnp.int32),
        "weights": jnp.asarray(weights, jnp.float32),
    }


@partial(jax.jit, static_argnames=("function", "chunk", "train_base", "z_loss"))
def value_and_gradients(
    function: Any, given: dict[str, Any], chunk: int | None = None, train_base: bool = False, z_loss: float = 0.0
) -> tuple[Any, ...]:
    """(value, gradient of hidden, gradient of new, that of base if it trains); the value's own gradient is not 1."""
    rest = {name: given[name] for name in ("labels", "weights")}
    options: dict[str, Any] = {} if chunk is None else {"chunk": chunk}
    if z_loss:
        options["z_loss"] = z_loss
    if train_base and function is cross_entropy:
        options["train_base"] = True

    def scaled(hidden: jax.Array, new: jax.Array | None, base: jax.Array) -> jax.Array:
        return 2.5 * function(hidden=hidden, new=new, base=base, **rest, **options)

    names = [name for name in ("hidden", "new", "base") if given[name] is not None and (name != "base" or train_base)]
    places = tuple(("hidden", "new", "base").index(name) for name in names)
    value, slopes = jax.value_and_grad(scaled, argnums=places)(given["hidden"], given["new"], given["base"])
    return value, *slopes


# 12 tokens: a chunk of 4 divides them, 5 does not, 256 holds them all.
@pytest.mark.parametrize("train_base", [False, True], ids=["base frozen", "base trained"])
@pytest.mark.parametrize(("new_rows", "chunk"), [(NEW, 4), (NEW, 5), (NEW, 256), (None, 5)])
def test_value_and_gradients_are_the_plain_ones(new_rows: int | None, chunk: int, train_base: bool) -> None:
    given = inputs(new_rows)
    ours = value_and_gradients(cross_entropy, given, chunk, train_base)
    wanted = value_and_gradients(plain, given, train_base=train_base)
    assert len(ours) == len(wanted) == (2 if new_rows is None else 3) + train_base
    for left, right in zip(ours, wanted, strict=True):
        assert left.shape == right.shape and np.abs(right).max() > 0.1
        assert np.abs(left - right).max() < 1e-5 * np.abs(right).max()
    # The value outside of a gradient takes another way.
    alone = jax.jit(partial(cross_entropy, chunk=chunk))(**given)
    assert alone.dtype == jnp.float32 and np.allclose(2.5 * alone, wanted[0], rtol=1e-6)


@pytest.mark.parametrize("train_base", [False, True], ids=["base frozen", "base trained"])
@pytest.mark.parametrize("new_rows", [NEW, None])
def test_z_loss_is_the_plain_one(new_rows: int | None, train_base: bool) -> None:
    given = inputs(new_rows)
    # Large enough that it is most of the value and of every gradient.
    ours = value_and_gradients(cross_entropy, given, 5, train_base, 0.3)
    wanted = value_and_gradients(plain, given, None, train_base, 0.3)
    without = value_and_gradients(cross_entropy, given, 5, train_base)
    assert len(ours) == len(wanted) == (2 if new_rows is None else 3) + train_base
    for left, right, other in zip(ours, wanted, without, strict=True):
        assert np.abs(right - other).max() > 0.1 * np.abs(right).max()
        # float32, sums in another order.
        assert np.abs(left - right).max() < 1e-5 * np.abs(right).max()
    # Outside of a gradient, too; and what is reported of the tokens is without it.
    value, losses = jax.jit(partial(loss.cross_entropy, chunk=5, z_loss=0.3))(**given)
    assert np.allclose(2.5 * value, wanted[0], rtol=1e-6)
    assert np.allclose(jnp.sum(losses), plain(**given), rtol=1e-6)


@pytest.mark.parametrize("chunk", [4, 5, 256])
def test_the_losses_of_the_tokens_stand_where_the_tokens_do(chunk: int) -> None:
    given = inputs(NEW)
    wanted, _ = plain_losses(given["hidden"], given["base"], given["new"], given["labels"])
    wanted = np.where(given["weights"] > 0, given["weights"] * wanted, 0)
    assert len(set(wanted.flat)) > 5
    rest = {name: values for name, values in given.items() if name != "hidden"}

    def scored(hidden: jax.Array, *, slope_of: int) -> tuple[jax.Array, jax.Array]:
        total, losses = loss.cross_entropy(hidden, chunk=chunk, **rest)
        return (total, jnp.sum(losses))[slope_of], losses

    # Read inside of a gradient and outside, which take two ways.
    alone = jax.jit(partial(loss.cross_entropy, chunk=chunk))(**given)[1]
    slopes, inside = jax.jit(jax.grad(partial(scored, slope_of=0), has_aux=True))(given["hidden"])
    for losses in (alone, inside):
        assert losses.shape == TOKENS and losses.dtype == jnp.float32
        assert np.allclose(losses, wanted, rtol=1e-5, atol=1e-6)
    # They are for reading: descended is the objective.
    assert np.asarray(slopes).any()
    none, _ = jax.jit(jax.grad(partial(scored, slope_of=1), has_aux=True))(given["hidden"])
    assert not np.asarray(none).any()


def test_new_rows_that_are_held_get_no_gradient_and_change_no_bit_of_the_rest() -> None:
    given = inputs(NEW)

    def slopes(train_new: bool) -> Any:
        def total(hidden: jax.Array, new: jax.Array) -> jax.Array:
            return cross_entropy(**given | {"hidden": hidden, "new": new}, chunk=5, train_new=train_new)

        gradient = jax.grad(total, argnums=(0, 1))
        products = [shape for shape in _shapes(jax.make_jaxpr(gradient)(given["hidden"], given["new"]).jaxpr)]
        return *jax.jit(gradient)(given["hidden"], given["new"]), products.count((NEW, WIDTH))

    hidden, new, shapes = slopes(True)
    same, none, fewer = slopes(False)
    assert np.array_equal(hidden, same) and np.asarray(new).any() and not np.asarray(none).any()
    assert fewer < shapes, "the gradient that is not wanted is not computed"


def test_training_the_base_rows_changes_no_bit_of_the_rest() -> None:
    given = inputs(NEW)
    frozen, trained = (value_and_gradients(cross_entropy, given, 5, train_base) for train_base in (False, True))
    assert all(np.array_equal(left, right) for left, right in zip(frozen, trained[:3], strict=True))


def test_frozen_base_rows_get_no_gradient() -> None:
    given = inputs(NEW)
    base = given.pop("base")
    assert not np.asarray(jax.grad(lambda base: cross_entropy(base=base, **given))(base)).any()


def test_nothing_weighted_is_zero_with_zero_gradients() -> None:
    given = inputs(NEW) | {"weights": jnp.zeros(TOKENS)}
    value, *gradients = value_and_gradients(cross_entropy, given, 5, True)
    assert value == 0
    assert [gradient.shape for gradient in gradients] == [(*TOKENS, WIDTH), (NEW, WIDTH), (VOCAB, WIDTH)]
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_chunks_without_weighted_tokens_are_not_computed() -> None:
    given = inputs(NEW)
    weighted = np.zeros(TOKENS, bool)
    weighted.flat[[1, 4, 6, 11]] = True
    given["weights"] = jnp.where(weighted, given["weights"] + 0.5, 0)
    # Whatever touched an unweighted token would be NaN, even with weight 0.
    poisoned = given | {"hidden": jnp.where(weighted[..., None], given["hidden"], jnp.nan)}
    ours = value_and_gradients(cross_entropy, poisoned, 4, True)
    wanted = value_and_gradients(plain, given, train_base=True)
    assert len(ours) == len(wanted) == 4
    for left, right in zip(ours, wanted, strict=True):
        assert np.abs(left - right).max() < 1e-5 * np.abs(right).max()
    assert (np.asarray(ours[1])[~weighted] == 0).all()
    # The weighted tokens by themselves, bit for bit.
    alone = {name: given[name][weighted] for name in ("hidden", "labels", "weights")}
    apart = value_and_gradients(cross_entropy, given | alone, 4, True)
    assert all(np.array_equal(apart[place], ours[place]) for place in (0, 2, 3))
    assert np.array_equal(apart[1], np.asarray(ours[1])[weighted])


@pytest.mark.parametrize("new_rows", [None, NEW])
def test_large_logits_do_not_overflow(new_rows: int | None) -> None:
    given = inputs(new_rows, scale=300.0)
    assert float(jnp.abs(given["hidden"] @ given["base"].T).max()) > 500
    ours = value_and_gradients(cross_entropy, given, 5)
    wanted = value_and_gradients(plain, given)
    for left, right in zip(ours, wanted, strict=True):
        assert np.isfinite(left).all() and np.abs(left - right).max() < 1e-5 * np.abs(right).max()


def test_bfloat16_is_finite_and_near() -> None:
    given = inputs(NEW)
    short = {
        name: values.astype(jnp.bfloat16) if name in ("hidden", "base", "new") else values
        for name, values in given.items()
    }
    value, *gradients = value_and_gradients(cross_entropy, short, 5, True)
    wanted, *right = value_and_gradients(plain, given, train_base=True)
    assert value.dtype == jnp.float32 and abs(value - wanted) < 0.01 * wanted
    for ours, exact in zip(gradients, right, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(ours.astype(jnp.float32) - exact).max() < 0.03 * np.abs(exact).max()


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of all values that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (out.aval.shape for out in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


def test_the_logits_of_all_tokens_never_exist() -> None:
    tokens, vocabulary, chunk = 64, 50, 8
    hidden, base, new = jnp.ones((tokens, WIDTH)), jnp.ones((vocabulary, WIDTH)), jnp.ones((NEW, WIDTH))
    labels, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens)

    def largest(function: Any) -> int:
        gradient = jax.grad(lambda hidden, new: function(hidden, base, new, labels, weights), argnums=(0, 1))
        return max(int(np.prod(shape)) for shape in _shapes(jax.make_jaxpr(gradient)(hidden, new).jaxpr))

    assert largest(plain) >= tokens * vocabulary, "the search finds them where they are"
    assert largest(partial(cross_entropy, chunk=chunk)) <= max(tokens * WIDTH, chunk * vocabulary)


def test_a_gradient_of_the_whole_table_exists_only_where_it_is_asked_for() -> None:
    tokens, vocabulary, chunk = 24, 50, 8
    hidden, base, new = jnp.ones((tokens, WIDTH)), jnp.ones((vocabulary, WIDTH)), jnp.ones((NEW, WIDTH))
    labels, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens)

    def has_a_table(train_base: bool) -> bool:
        def loss(hidden: jax.Array, new: jax.Array, base: jax.Array) -> jax.Array:
            return cross_entropy(hidden, base, new, labels, weights, chunk, train_base=train_base)

        gradient = jax.grad(loss, argnums=(0, 1, 2) if train_base else (0, 1))
        return (vocabulary, WIDTH) in _shapes(jax.make_jaxpr(gradient)(hidden, new, base).jaxpr)

    assert has_a_table(True) and not has_a_table(False)
