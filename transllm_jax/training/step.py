"""One optimizer step as a pure function, and the loss that it minimises."""

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
from transllm_jax.training.recovery import Teaching, recovery_loss, weights_of

# tokens, positions, segment_ids, labels [B, T] int32 and weights [B, T] float32 (see data.rows.packing). Optional, for
# losses by source: sources [B] int32, the number of each row's source.
Batch = dict[str, jax.Array]
_FIELDS = ("tokens", "positions", "segment_ids", "labels", "weights", "sources")
# Tables of the base vocabulary that may train, and the trainable copies of them.
_BASE_TABLES = ("vocabulary.base", "vocabulary.output_base", *BASE_ROWS)

# Options of the TPU compiler: gather a layer's weights while the layer before it computes.
_GATHER_AHEAD: dict[str, str | bool] = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}


def compiler_options(layout: Layout) -> dict[str, str | bool] | None:
    """Compiler options of a step for the devices of a layout.

    None for v5e, whose compiler gathers ahead by itself; with the options it takes more memory and no less time.
    """
    if layout.platform != "tpu" or layout.size() == 1 or layout.device_kind == "TPU v5 lite":
        return None
    return _GATHER_AHEAD


class TrainState(NamedTuple):
    """All that training changes, which is all that a checkpoint holds.

    step: int32, batches so far. skipped: int32, how many updates were skipped. skipped_in_a_row: int32, how many of the
    latest in succession.
    """

    trainable: Flat
    optimizer: Any
    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class Metrics(NamedTuple):
    """Measurements of a step's batch.

    loss: mean nats per trained token, without z-loss, and with the divergence of tokens that the original teaches;
    tokens: the sum of the weights; gradient_norm: before clipping; padding: the number of places without a token;
    finite: whether loss and norm are finite, otherwise the update was skipped; source_loss and source_tokens [S]: sums
    of weighted nats and of weights, by source.
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
    """The state at step 0: the arrays that train, and fresh moments."""
    # Three separate arrays, because the same buffer cannot be donated twice.
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
    teaching: Teaching | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The objective that training minimises, a scalar, and each token's weight * -log p(label) in nats, [B, T].

    Only `trainable` gets a gradient. With `adapters=False` they are those of the original model with its frozen base
    rows; labels may still be new ids. teaching: which rows the original model teaches; their tokens' losses are, or
    include, weight * KL(original || trained).
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
    # A table's gradient costs as much as the logits, so it is computed only for a table that trains.
    trains = {
        "train_base": f"vocabulary.{end}base{copy}" in trainable,
        "train_new": f"vocabulary.{end}new" in trainable,
    }
    weights = None if teaching is None else weights_of(teaching, batch, vocabulary.base.shape[0])
    total, losses = cross_entropy(
        hidden,
        base,
        new,
        batch["labels"],
        batch["weights"] if weights is None else weights.labels,
        padding=vocabulary.padding,
        z_loss=z_loss,
        layout=model.layout,
        **trains,
    )
    if teaching is None or weights is None:
        return total, losses
    more, taught = recovery_loss(model, teaching, hidden, batch, weights.taught, **trains)
    # Reported are nats, whatever their weight.
    return total + more, losses + taught / teaching.weight


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
    """The last hidden states [B, T, D] of a batch's tokens; the batch needs no labels or weights.

    With `adapters=False` they are those of the original model.
    """
    model = merge(structure, trainable, frozen)
    return model(batch["tokens"], batch["positions"], batch["segment_ids"], adapters=adapters)


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
    teaching: Teaching | None = None,
    shardings: tuple[TrainState, Metrics] | None = None,
    options: dict[str, str | bool] | None = None,
) -> Step:
    """The compiled step (state, frozen, batch) -> (state, metrics).

    The state is donated; `frozen` is an argument that is neither donated nor differentiated. A batch of B rows is
    computed in `accumulate` consecutive parts of B / accumulate rows. The parts' sums are divided once by the weight of
    the batch, so the result is that of the whole batch.
    If `accumulate` > 1 the batch's fields are [accumulate, B / accumulate, ..], so that each part can be sharded.
    shardings: those of the next state and the metrics on a mesh. options: the compiler's. sources: how many there are.
    teaching: which rows the original model teaches.
    The dropout key is a function of (seed, step, part), so a resumed run drops the same units as an undisturbed one.
    If loss or gradient norm is not finite, the arrays stay as they were, bit for bit, and the step counts. The
    optimizer is told by its argument `finite`, and then keeps its moments in the same way.
    """
    part_sums = partial(_part_sums, structure, remat=remat, z_loss=z_loss, sources=sources, teaching=teaching)

    def step(state: TrainState, frozen: Flat, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = {field: batch[field] for field in _FIELDS if field in batch}
        key = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None
        sums = _batch_sums(part_sums, state.trainable, frozen, batch, key, accumulate, sources)
        tokens = jnp.sum(batch["weights"])
        divisor = jnp.where(tokens > 0, tokens, 1.0)
        padding = merge(structure, state.trainable, frozen).vocabulary.padding

        def hold(changes: Flat) -> Flat:
            # If base rows train, those without a token stay as they are.
            return {
                path: zero_padding(change, padding) if path in _BASE_TABLES else change
                for path, change in changes.items()
            }

        gradient = hold(jax.tree.map(lambda g: g / divisor, sums.gradient))
        norm, loss = optax.tree.norm(gradient), jnp.sum(sums.losses) / divisor
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, moments = optimizer.update(gradient, state.optimizer, state.trainable, finite=finite)
        # `hold` again, because weight decay would change the rows without a token.
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


class _Sums(NamedTuple):
    """Sums over a batch or a part of it: the gradient of the objective, and losses and weights by source [S]."""

    gradient: Flat
    losses: jax.Array
    weights: jax.Array


def _batch_sums(
    part_sums: Callable[[Flat, Flat, Batch, jax.Array | None], _Sums],
    trainable: Flat,
    frozen: Flat,
    batch: Batch,
    key: jax.Array | None,
    accumulate: int,
    sources: int,
) -> _Sums:
    """The sums over a batch, from those of its parts one after the other. key: the step's dropout key."""

    def key_of(number: jax.Array | int) -> jax.Array | None:
        return None if key is None else jax.random.fold_in(key, number)

    if accumulate == 1:
        return part_sums(trainable, frozen, batch, key_of(0))
    if batch["tokens"].ndim != 3 or len(batch["tokens"]) != accumulate:
        raise ValueError(f"a batch of tokens {batch['tokens'].shape} is not in {accumulate} parts")

    def add(sums: _Sums, inputs: tuple[jax.Array, Batch]) -> tuple[_Sums, None]:
        number, part = inputs
        return jax.tree.map(jnp.add, sums, part_sums(trainable, frozen, part, key_of(number))), None

    # Summed in float32, whatever dtype the parts are computed in.
    zeros = _Sums(
        jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), trainable),
        *(jnp.zeros(sources, jnp.float32) for _ in range(2)),
    )
    sums, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), batch))
    return sums


def _part_sums(
    structure: Any,
    trainable: Flat,
    frozen: Flat,
    part: Batch,
    key: jax.Array | None,
    *,
    remat: Remat,
    z_loss: float,
    sources: int,
    teaching: Teaching | None,
) -> _Sums:
    """The sums over a part of a batch. key: the part's dropout key."""

    def objective(trainable: Flat) -> tuple[jax.Array, jax.Array]:
        return batch_losses(
            structure, trainable, frozen, part, dropout=key, remat=remat, z_loss=z_loss, teaching=teaching
        )

    (_, losses), gradient = jax.value_and_grad(objective, has_aux=True)(trainable)
    return _Sums(
        gradient,
        _by_source(losses, part.get("sources"), sources),
        _by_source(part["weights"], part.get("sources"), sources),
    )


def _by_source(values: jax.Array, source: jax.Array | None, count: int) -> jax.Array:
    """Sums [S] of values [B, T] over the rows of each source. source [B]: each row's source; if None, source 0."""
    rows = jnp.sum(values, axis=1, dtype=jnp.float32)
    if source is None:
        source = jnp.zeros(rows.shape, jnp.int32)
    # Not by scattering: a sum in a fixed order is the same on every run and device.
    return jnp.sum(jnp.where(jnp.arange(count)[:, None] == source, rows, 0), axis=1)
