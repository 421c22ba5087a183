"""One optimizer step as a pure function, and the loss that it descends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transllm_jax.model.parameters import BASE_ROWS, Flat, merge
from transllm_jax.model.vocabulary import held
from transllm_jax.training.loss import cross_entropy

# tokens, positions, segment_ids, labels [B, T] int32 and weights [B, T] float32; see transllm_jax.data.packing.
Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that training changes, and all that a checkpoint holds."""

    trainable: Flat
    optimizer: Any
    step: jax.Array


class Metrics(NamedTuple):
    """loss in nats a trained token, the count of trained tokens, and the gradient's norm before clipping."""

    loss: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array


def initial_state(trainable: Flat, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 of a stage: the arrays that train, and fresh moments."""
    return TrainState(trainable, optimizer.init(trainable), jnp.int32(0))


def summed_loss(
    structure: Any,
    trainable: Flat,
    frozen: Flat,
    batch: Batch,
    *,
    dropout: jax.Array | None = None,
    remat: bool = False,
    adapters: bool = True,
) -> jax.Array:
    """The weighted sum of -log p(label) over a batch, in nats.

    With `adapters=False` of the original model: its frozen base rows (labels may be new ids still).
    """
    model = merge(structure, trainable, frozen)
    hidden = model(
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        dropout=dropout,
        remat=remat,
        adapters=adapters,
    )
    base, new = model.vocabulary.output_tables(adapters=adapters)
    train_base = model.vocabulary.train_base and adapters
    return cross_entropy(
        hidden,
        base,
        new,
        batch["labels"],
        batch["weights"],
        train_base=train_base,
        padding=model.vocabulary.padding,
    )


@partial(jax.jit, static_argnames=("structure", "adapters"))
def hidden_states(structure: Any, trainable: Flat, frozen: Flat, batch: Batch, *, adapters: bool = True) -> jax.Array:
    """The states before the output, [B, T, D], of a batch's tokens; of the batch, labels and weights are not needed.

    With `adapters=False` those of the original model.
    """
    model = merge(structure, trainable, frozen)
    return model(batch["tokens"], batch["positions"], batch["segment_ids"], adapters=adapters)


def make_step(
    structure: Any, optimizer: optax.GradientTransformation, *, seed: int, dropout: bool, remat: bool
) -> Callable[[TrainState, Flat, Batch], tuple[TrainState, Metrics]]:
    """The compiled step (state, frozen, batch) -> (state, metrics).

    The state is donated; `frozen` is an argument that is neither donated nor differentiated. The dropout key is a
    function of (seed, step), so a resumed run drops what the undisturbed one did.
    """

    def step(state: TrainState, frozen: Flat, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None

        def loss(trainable: Flat) -> jax.Array:
            return summed_loss(structure, trainable, frozen, batch, dropout=key, remat=remat)

        tokens = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        total, gradient = jax.value_and_grad(loss)(state.trainable)
        padding = merge(structure, state.trainable, frozen).vocabulary.padding

        def hold(changes: Flat) -> Flat:
            # Base rows without a token stay as they are, where base rows train.
            return {path: held(change, padding) if path in BASE_ROWS else change for path, change in changes.items()}

        gradient = hold(jax.tree.map(lambda g: g / tokens, gradient))
        updates, moments = optimizer.update(gradient, state.optimizer, state.trainable)
        # Weight decay would move them, too.
        trainable = optax.apply_updates(state.trainable, hold(updates))
        metrics = Metrics(total / tokens, tokens, optax.tree.norm(gradient))
        return TrainState(trainable, moments, state.step + 1), metrics

    return jax.jit(step, donate_argnums=(0,))
