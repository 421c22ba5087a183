"""One optimizer step as a pure function, and the loss that it descends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transllm_jax.choices import Remat
from transllm_jax.model.layout import Layout
from transllm_jax.model.parameters import BASE_ROWS, Flat, merge
from transllm_jax.model.vocabulary import zero_padding
from transllm_jax.training.loss import cross_entropy
from transllm_jax.training.optimizer import Rate

# tokens, positions, segment_ids, labels [B, T] int32 and weights [B, T] float32 (see data.rows.packing), and
# where losses are told apart by source, sources [B] int32: the number of each row's source.
Batch = dict[str, jax.Array]
_FIELDS = ("tokens", "positions", "segment_ids", "labels", "weights", "sources")
# Tables of the base vocabulary, and copies of them, that may train.
_BASE_TABLES = ("vocabulary.base", "vocabulary.output_base", *BASE_ROWS)


# For a TPU's compiler: a layer's weights are gathered while the one before it computes.
_GATHER_AHEAD: dict[str, str | bool] = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}


def compiler_options(layout: Layout) -> dict[str, str | bool] | None:
    """What a step's compiler is told for the devices of a layout.

    That of v5e gathers ahead by itself; told to, it takes more memory and no less time.
    """
    if layout.platform != "tpu" or layout.size() == 1 or layout.device_kind == "TPU v5 lite":
        return None
    return _GATHER_AHEAD


class TrainState(NamedTuple):
    """All that training changes, and all that a checkpoint holds.

    step int32 counts batches, skipped int32 those whose update was skipped, skipped_in_a_row int32 the last of them.
    """

    trainable: Flat
    optimizer: Any
    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class Metrics(NamedTuple):
    """What a step says of its batch.

    loss: mean nats a trained token, without z-loss; tokens: the sum of the weights; gradient_norm: before clipping;
    padding: the places without a token; finite: whether loss and norm are, without which nothing was updated;
    source_loss and source_tokens [S]: sums of weighted nats and of weights, by source.
    """

    loss: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array
    padding: jax.Array
    finite: jax.Array
    source_loss: jax.Array
    source_tokens: jax.Array


# The compiled step: (state, frozen arrays, batch) -> (state, metrics).
Step = Callable[[TrainState, Flat, Batch], tuple[TrainState, Metrics]]


def initial_state(trainable: Flat, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 of a stage: the arrays that train, and fresh moments."""
    # Three arrays, not one three times: what is donated may not be given twice.
    return TrainState(trainable, optimizer.init(trainable), *(jnp.int32(0) for _ in range(3)))


def batch_losses(
    structure: Any,
    trainable: Flat,
    frozen: Flat,
    batch: Batch,
    *,
    dropout: jax.Array | None = None,
    remat: Remat = "none",
    adapters: bool = True,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """The objective that training descends, a scalar, and each token's weight * -log p(label) in nats, [B, T].

    Only `trainable` gets a gradient. With `adapters=False` of the original model: its frozen base rows (labels may be
    new ids still).
    """
    model = merge(structure, trainable, jax.lax.stop_gradient(frozen))
    hidden = model(
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        dropout=dropout,
        remat=remat,
        adapters=adapters,
    )
    vocabulary = model.vocabulary
    base, new = vocabulary.output_rows(adapters=adapters)
    copy = "_trained" if vocabulary.train_base and adapters else ""
    end = "" if vocabulary.tied else "output_"
    return cross_entropy(
        hidden,
        base,
        new,
        batch["labels"],
        batch["weights"],
        # A table's gradient costs as much as the logits: it is computed only for a table that trains.
        train_base=f"vocabulary.{end}base{copy}" in trainable,
        train_new=f"vocabulary.{end}new" in trainable,
        padding=vocabulary.padding,
        z_loss=z_loss,
        layout=model.layout,
    )


def summed_loss(
    structure: Any,
    trainable: Flat,
    frozen: Flat,
    batch: Batch,
    *,
    dropout: jax.Array | None = None,
    remat: Remat = "none",
    adapters: bool = True,
) -> jax.Array:
    """The weighted sum of -log p(label) over a batch, in nats; see `batch_losses`."""
    total, _ = batch_losses(structure, trainable, frozen, batch, dropout=dropout, remat=remat, adapters=adapters)
    return total


@partial(jax.jit, static_argnames=("structure", "adapters"))
def hidden_states(structure: Any, trainable: Flat, frozen: Flat, batch: Batch, *, adapters: bool = True) -> jax.Array:
    """The states before the output, [B, T, D], of a batch's tokens; of the batch, labels and weights are not needed.

    With `adapters=False` those of the original model.
    """
    model = merge(structure, trainable, frozen)
    return model(batch["tokens"], batch["positions"], batch["segment_ids"], adapters=adapters)


class _Sums(NamedTuple):
    """Of a batch or a part of it: the gradient of the objective, and by source [S] the losses and the weights."""

    gradient: Flat
    losses: jax.Array
    weights: jax.Array


def make_step(
    structure: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    rate: Rate,
    *,
    seed: int,
    dropout: bool,
    remat: Remat,
    accumulate: int = 1,
    z_loss: float = 0.0,
    sources: int = 1,
    shardings: tuple[TrainState, Metrics] | None = None,
    options: dict[str, str | bool] | None = None,
) -> Step:
    """The compiled step (state, frozen, batch) -> (state, metrics).

    The state is donated; `frozen` is an argument that is neither donated nor differentiated. A batch of B rows is
    computed in `accumulate` parts of B / accumulate rows that follow one another, whose sums are divided once by the
    batch's weight: the result is that of the whole batch.
    With `accumulate` > 1 the batch's fields are [accumulate, B / accumulate, ..]: so can each part be cut over devices.
    `shardings` say where the next state and the metrics lie on a mesh; `options` are the compiler's.
    The dropout key is a function of (seed, step, part), so a resumed run drops what the undisturbed one did.
    Where loss or gradient norm is not finite, the arrays stay as they were, bit for bit, and the step counts; the
    optimizer, which is told by its argument `finite`, does the same with its moments.
    """

    def part_sums(trainable: Flat, frozen: Flat, part: Batch, key: jax.Array | None) -> _Sums:
        def objective(trainable: Flat) -> tuple[jax.Array, jax.Array]:
            return batch_losses(structure, trainable, frozen, part, dropout=key, remat=remat, z_loss=z_loss)

        (_, losses), gradient = jax.value_and_grad(objective, has_aux=True)(trainable)
        return _Sums(
            gradient,
            _by_source(losses, part.get("sources"), sources),
            _by_source(part["weights"], part.get("sources"), sources),
        )

    def batch_sums(trainable: Flat, frozen: Flat, batch: Batch, key: jax.Array | None) -> _Sums:
        def key_of(number: jax.Array | int) -> jax.Array | None:
            return None if key is None else jax.random.fold_in(key, number)

        if accumulate == 1:
            return part_sums(trainable, frozen, batch, key_of(0))
        if batch["tokens"].ndim != 3 or len(batch["tokens"]) != accumulate:
            raise ValueError(f"a batch of tokens {batch['tokens'].shape} is not in {accumulate} parts")

        def add(sums: _Sums, inputs: tuple[jax.Array, Batch]) -> tuple[_Sums, None]:
            number, part = inputs
            return jax.tree.map(jnp.add, sums, part_sums(trainable, frozen, part, key_of(number))), None

        # float32, whatever the parts are computed in.
        zeros = _Sums(
            jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), trainable),
            *(jnp.zeros(sources, jnp.float32) for _ in range(2)),
        )
        sums, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), batch))
        return sums

    def step(state: TrainState, frozen: Flat, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = {field: batch[field] for field in _FIELDS if field in batch}
        key = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None
        sums = batch_sums(state.trainable, frozen, batch, key)
        tokens = jnp.sum(batch["weights"])
        divisor = jnp.where(tokens > 0, tokens, 1.0)
        padding = merge(structure, state.trainable, frozen).vocabulary.padding

        def hold(changes: Flat) -> Flat:
            # Base rows without a token stay as they are, where base rows train.
            return {
                path: zero_padding(change, padding) if path in _BASE_TABLES else change
                for path, change in changes.items()
            }

        gradient = hold(jax.tree.map(lambda g: g / divisor, sums.gradient))
        norm, loss = optax.tree.norm(gradient), jnp.sum(sums.losses) / divisor
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, moments = optimizer.update(gradient, state.optimizer, state.trainable, finite=finite)
        # Weight decay would move them, too.
        updates = jax.tree.map(lambda update: -rate(state.step) * update, hold(updates))
        changed = optax.apply_updates(state.trainable, updates)
        trainable = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state.trainable)
        skipped = jnp.int32(~finite)
        following = TrainState(
            trainable,
            moments,
            state.step + 1,
            state.skipped + skipped,
            (state.skipped_in_a_row + 1) * skipped,
        )
        empty = jnp.sum(batch["segment_ids"] == 0, dtype=jnp.int32)
        return following, Metrics(loss, tokens, norm, empty, finite, sums.losses, sums.weights)

    return jax.jit(step, donate_argnums=(0,), out_shardings=shardings, compiler_options=options)


def _by_source(values: jax.Array, source: jax.Array | None, count: int) -> jax.Array:
    """Sums [S] over the rows of each source, of values [B, T] and the rows' sources [B]; without these all is 0's."""
    rows = jnp.sum(values, axis=1, dtype=jnp.float32)
    if source is None:
        source = jnp.zeros(rows.shape, jnp.int32)
    # Not by scattering: a sum in a fixed order is the same on every run and device.
    return jnp.sum(jnp.where(jnp.arange(count)[:, None] == source, rows, 0), axis=1)
