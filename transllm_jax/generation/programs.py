"""The compiled programs of generation, and what they hold on the device.

A prompt is read at a desk, piece by piece (`read_piece`). Then it gets a slot (`admit`). A burst generates several
tokens for all slots (`burst`). Shapes depend on the number of rows, the size of the cache and the width of a piece
alone, so there are few programs; all settings of a request are arrays by slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transllm_jax.generation.request import WHOLE, Mode
from transllm_jax.generation.sampling import GREEDY, Draw, choose, draw_of
from transllm_jax.model.cache import Cache, decode, empty_cache, read
from transllm_jax.model.layout import Layout
from transllm_jax.model.llama import Block
from transllm_jax.model.parameters import Flat, Split, merge

# Tokens that the device generates before the host checks which rows are done (and moves a progress bar).
BURST = 16
# How many stop tokens a slot has room for. More need another program.
STOPS = 8


class Desk(NamedTuple):
    """Prompts that are being read: the cache [L, R, K, S, H] and each one's last hidden state [R, D]."""

    cache: Cache
    hidden: jax.Array


class Slots(NamedTuple):
    """Answers that are being generated, B of them.

    length [B]: tokens of the text that are in the cache. last [B]: the token after them. made [B]: tokens of the answer
    so far, limit [B]: the most that it may have. active [B]: whether it goes on. stops [B, STOPS]: ids that end it, -1
    in unused places. seen [B, V]: which tokens the text has; kept only where a repetition penalty asks for it.
    """

    cache: Cache
    length: jax.Array
    last: jax.Array
    made: jax.Array
    limit: jax.Array
    active: jax.Array
    stops: jax.Array
    seen: jax.Array
    draw: Draw


class Entry(NamedTuple):
    """What rows of the desk take to their slots: slot [R] (B: none), length [R], limit [R], stops, seen and draw."""

    slot: jax.Array
    length: jax.Array
    limit: jax.Array
    stops: jax.Array
    seen: jax.Array
    draw: Draw


class Made(NamedTuple):
    """What the host learns: ids and log-probabilities [B, n], of which the first `number` [B] are new; active [B]."""

    ids: jax.Array
    logprobs: jax.Array
    number: jax.Array
    active: jax.Array


def readable(layout: Layout, made: Made) -> Made:
    """What the host reads, replicated on each device, so that every process can read it."""
    if layout.replicated is None:
        return made
    return Made(*(jax.lax.with_sharding_constraint(array, layout.replicated) for array in made))


@partial(jax.jit, static_argnames=("structure", "rows", "size"))
def empty_desk(trainable: Flat, frozen: Flat, *, structure: Any, rows: int, size: int) -> Desk:
    """A desk for `rows` prompts, with `size` places each."""
    model = merge(structure, trainable, frozen)
    hidden = jnp.zeros((rows, model.config.hidden_size), model.vocabulary.dtype)
    return Desk(empty_cache(model, rows, size), hidden)


@partial(jax.jit, static_argnames=("structure", "mode", "rows", "size", "stops"))
def empty_slots(
    trainable: Flat, frozen: Flat, *, structure: Any, mode: Mode, rows: int, size: int, stops: int
) -> Slots:
    """`rows` slots without an answer, with `size` places each and room for `stops` stop tokens."""
    model = merge(structure, trainable, frozen)
    number = jnp.zeros(rows, jnp.int32)
    return Slots(
        cache=empty_cache(model, rows, size),
        length=number,
        last=number,
        made=number,
        limit=number,
        active=jnp.zeros(rows, bool),
        stops=jnp.full((rows, stops), -1, jnp.int32),
        seen=jnp.zeros((rows, vocabulary_size(model, mode)), bool),
        draw=jax.tree.map(jnp.asarray, draw_of([GREEDY] * rows)),
    )


def vocabulary_size(model: Any, mode: Mode) -> int:
    """The number of ids that a mode chooses from."""
    return int(model.config.vocab_size + (0 if mode.base_only else model.vocabulary.new_rows))


@partial(jax.jit, static_argnames=("structure", "mode"), donate_argnames=("desk",))
def read_piece(
    trainable: Flat,
    frozen: Flat,
    desk: Desk,
    tokens: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    totals: jax.Array,
    *,
    structure: Any,
    mode: Mode,
) -> Desk:
    """Read a piece [R, W] of each prompt at the desk; see `cache.read`. A row with count 0 stays as it is."""
    model = merge(structure, trainable, frozen)
    hidden, cache = read(model, desk.cache, tokens, starts, counts, totals, adapters=mode.adapters)
    return Desk(cache, jnp.where((counts > 0)[:, None], hidden, desk.hidden))


@partial(jax.jit, static_argnames=("structure", "mode"), donate_argnames=("slots",))
def admit(
    trainable: Flat, frozen: Flat, slots: Slots, desk: Desk, entry: Entry, *, structure: Any, mode: Mode
) -> tuple[Slots, Made]:
    """Put prompts from the desk into their slots, and choose the first token of each answer (`Made` by desk row)."""
    model = merge(structure, trainable, frozen)
    logits = model.vocabulary.choices(desk.hidden, base_only=mode.base_only, adapters=mode.adapters)
    taken = entry.slot < len(slots.last)
    first, logprobs = choose(logits, entry.draw, jnp.zeros_like(entry.slot), entry.seen, taken)
    active = taken & ~_ends(first, entry.stops) & (entry.limit > 1)

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[entry.slot].set(new, mode="drop", unique_indices=True)

    seen = entry.seen.at[jnp.arange(len(first)), first].set(True)
    slots = Slots(
        cache=slots.cache.copied(desk.cache, entry.slot, jnp.where(taken, entry.length, 0), model.layout),
        length=put(slots.length, entry.length),
        last=put(slots.last, first),
        made=put(slots.made, jnp.ones_like(first)),
        limit=put(slots.limit, entry.limit),
        active=put(slots.active, active),
        stops=put(slots.stops, entry.stops),
        seen=put(slots.seen, seen),
        draw=Draw(*map(put, slots.draw, entry.draw)),
    )
    return slots, readable(model.layout, Made(first[:, None], logprobs[:, None], taken.astype(jnp.int32), active))


@partial(jax.jit, static_argnames=("structure", "mode"), donate_argnames=("slots",))
def burst(
    trainable: Flat,
    frozen: Flat,
    layers: Sequence[Block],
    slots: Slots,
    running: jax.Array,
    hurry: jax.Array,
    steps: jax.Array,
    *,
    structure: Any,
    mode: Mode,
) -> tuple[Slots, Made]:
    """Generate up to `steps` [] tokens, at most BURST, for each active slot.

    layers: see `cache.unstacked`; may be empty. running, bool [B]: slots that the host has not taken back. hurry, bool
    []: return as soon as an answer ends, because a prompt waits for its slot.
    """
    model = merge(structure, trainable, frozen)
    rows = len(slots.last)
    slots = slots._replace(active=slots.active & running)
    began = slots.active

    def proceed(carry: tuple[Slots, Made, jax.Array]) -> jax.Array:
        slots, _, step = carry
        return (step < steps) & slots.active.any() & ~(hurry & (began & ~slots.active).any())

    def one(carry: tuple[Slots, Made, jax.Array]) -> tuple[Slots, Made, jax.Array]:
        slots, made, step = carry
        active = slots.active
        hidden, cache = decode(model, layers, slots.cache, slots.last, slots.length, active, adapters=mode.adapters)
        logits = model.vocabulary.choices(hidden, base_only=mode.base_only, adapters=mode.adapters)
        chosen, logprob = choose(logits, slots.draw, slots.made, slots.seen, active)
        more = active.astype(jnp.int32)
        penalised = jnp.any((slots.draw.repetition_penalty != 1) & active)
        seen = jax.lax.cond(penalised, lambda: slots.seen.at[jnp.arange(rows), chosen].set(True), lambda: slots.seen)
        slots = slots._replace(
            cache=cache,
            length=slots.length + more,
            last=jnp.where(active, chosen, slots.last),
            made=slots.made + more,
            active=active & ~_ends(chosen, slots.stops) & (slots.made + 1 < slots.limit),
            seen=seen,
        )
        made = Made(
            jax.lax.dynamic_update_index_in_dim(made.ids, chosen, step, axis=1),
            jax.lax.dynamic_update_index_in_dim(made.logprobs, logprob, step, axis=1),
            made.number + more,
            slots.active,
        )
        return slots, made, step + 1

    nothing = Made(
        jnp.zeros((rows, BURST), jnp.int32), jnp.zeros((rows, BURST)), jnp.zeros(rows, jnp.int32), slots.active
    )
    slots, made, _ = jax.lax.while_loop(proceed, one, (slots, nothing, jnp.int32(0)))
    return slots, readable(model.layout, made)


def _ends(chosen: jax.Array, stops: jax.Array) -> jax.Array:
    """Whether each chosen id [B] is one of the row's stops [B, STOPS]."""
    return (chosen[:, None] == stops).any(axis=1)


def lowered(
    split: Split, batch_size: int, width: int, new_tokens: int, mode: Mode = WHOLE
) -> tuple[Callable[[], Any], Callable[[], Any], Any]:
    """The programs of reading and of generating, from shapes: functions that lower them, and the shapes of the slots.

    The first program reads prompts [B, width] as one piece; the second generates a burst of tokens. The layout's
    devices need not exist: the programs are only compiled.
    """
    from transllm_jax.model.cache import CHUNK

    layout = split.layout
    size = -(-(width + new_tokens) // CHUNK) * CHUNK
    shape = partial(jax.ShapeDtypeStruct, sharding=layout.replicated)
    rows = shape((batch_size,), jnp.int32)

    def placed(tree: Any) -> Any:
        """The cache is divided by rows and heads, the rest is replicated."""

        def place(leaf: Any) -> Any:
            at = layout.cache_sharding if len(leaf.shape) == 5 else layout.replicated
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

        return jax.tree.map(place, tree)

    def made(program: Any, **options: Any) -> Any:
        given = partial(program, structure=split.structure, rows=batch_size, size=size, **options)
        return placed(jax.eval_shape(given, split.trainable, split.frozen))

    desk, slots = made(empty_desk), made(empty_slots, mode=mode, stops=STOPS)
    options: dict[str, Any] = {"structure": split.structure, "mode": mode}
    tokens = shape((batch_size, width), jnp.int32)
    piece = partial(read_piece.lower, split.trainable, split.frozen, desk, tokens, rows, rows, rows, **options)
    given = shape((batch_size,), jnp.bool_), shape((), jnp.bool_), shape((), jnp.int32)
    tokens_of = partial(burst.lower, split.trainable, split.frozen, (), slots, *given, **options)
    return piece, tokens_of, slots
