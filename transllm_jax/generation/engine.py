"""Batched generation: prefill, then tokens in short compiled bursts, with few distinct shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transllm_jax.errors import UserError
from transllm_jax.generation.sampling import GREEDY, Sampling, choose
from transllm_jax.model.cache import Cache, decode, prefill
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import Layout
from transllm_jax.model.parameters import Flat, Split, merge

# Prompts are padded to a multiple of this, so that few shapes are compiled.
PROMPT_MULTIPLE = 64
# Tokens that the device generates before the host checks which rows are done (and moves a progress bar).
BURST = 16


@dataclass(frozen=True)
class Mode:
    """Which model answers: the trained one, or (`adapters=False, base_only=True`) the original inside it."""

    adapters: bool = True
    base_only: bool = False
    sampling: Sampling = GREEDY


WHOLE = Mode()
ORIGINAL = Mode(adapters=False, base_only=True)


class _State(NamedTuple):
    """last [B] and out [B, new] token ids, done [B], stops [k] token ids, rows [B] row numbers in the job, step []."""

    last: jax.Array
    out: jax.Array
    done: jax.Array
    stops: jax.Array
    rows: jax.Array
    step: jax.Array
    cache: Cache


def padded_batch_size(size: int, layout: Layout) -> int:
    """A batch size, rounded up so that the mesh divides it."""
    return -(-size // layout.batch_parts) * layout.batch_parts


def _readable(layout: Layout, state: _State) -> _State:
    """The state with all that the host reads replicated on each device, so that every process can read it."""
    if layout.replicated is None:
        return state
    out, done, step = (
        jax.lax.with_sharding_constraint(array, layout.replicated) for array in (state.out, state.done, state.step)
    )
    return state._replace(out=out, done=done, step=step)


@partial(jax.jit, static_argnames=("structure", "room", "mode"))
def _start(
    trainable: Flat,
    frozen: Flat,
    tokens: jax.Array,
    valid: jax.Array,
    stops: jax.Array,
    rows: jax.Array,
    *,
    structure: Any,
    room: int,
    mode: Mode,
) -> _State:
    model = merge(structure, trainable, frozen)
    hidden, cache = prefill(model, tokens, valid, tokens.shape[1] + room, adapters=mode.adapters)
    logits = model.vocabulary.choices(hidden, base_only=mode.base_only, adapters=mode.adapters)
    first = choose(logits, mode.sampling, rows, jnp.int32(0))
    # A row without a prompt is padding.
    done = jnp.isin(first, stops) | ~valid.any(axis=1)
    out = jnp.zeros((tokens.shape[0], room), jnp.int32).at[:, 0].set(first)
    return _readable(model.layout, _State(first, out, done, stops, rows, jnp.int32(1), cache))


@partial(jax.jit, static_argnames=("structure", "mode"), donate_argnames=("state",))
def _burst(trainable: Flat, frozen: Flat, state: _State, *, structure: Any, mode: Mode) -> _State:
    model = merge(structure, trainable, frozen)
    limit = jnp.minimum(state.step + BURST, state.out.shape[1])

    def proceed(state: _State) -> jax.Array:
        return (state.step < limit) & ~state.done.all()

    def one(state: _State) -> _State:
        hidden, cache = decode(model, state.last, state.cache, adapters=mode.adapters)
        logits = model.vocabulary.choices(hidden, base_only=mode.base_only, adapters=mode.adapters)
        chosen = choose(logits, mode.sampling, state.rows, state.step)
        chosen = jnp.where(state.done, state.stops[0], chosen)
        out = jax.lax.dynamic_update_index_in_dim(state.out, chosen, state.step, axis=1)
        done = state.done | jnp.isin(chosen, state.stops)
        return _State(chosen, out, done, state.stops, state.rows, state.step + 1, cache)

    return _readable(model.layout, jax.lax.while_loop(proceed, one, state))


class Engine:
    """Generates with one model. Prompts and answers are lists of token ids; ids without a token are never chosen."""

    def __init__(self, split: Split, config: LlamaConfig, *, batch_size: int = 32) -> None:
        self.split = split
        self.config = config
        self.batch_size = batch_size

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[int],
        mode: Mode = WHOLE,
        on_tokens: Callable[[int], None] = lambda count: None,
        between: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """Answers in the order of the prompts, each without its stop token.

        `on_tokens` is called with the number of tokens generated since its last call (for progress). `between` is
        called between two batches; it may raise to stop there.
        Raises UserError for a prompt that leaves no room in the model's context.
        """
        if not prompts:
            return []
        answers: list[list[int]] = [[] for _ in prompts]
        for rows, state in self._batches(prompts, max_new_tokens, stop, mode, on_tokens, between):
            for row, ids in zip(rows, np.asarray(state.out), strict=False):
                answers[row] = _until(ids[: int(state.step)].tolist(), stop)
        return answers

    def stream(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop: Sequence[int], mode: Mode = WHOLE
    ) -> Iterator[list[int]]:
        """Yield the answer to one prompt as it grows: all its tokens so far, after each burst."""
        state = self._begin([prompt], [0], 1, max_new_tokens, stop, mode)
        while True:
            yield _until(np.asarray(state.out)[0, : int(state.step)].tolist(), stop)
            if np.all(state.done) or int(state.step) >= max_new_tokens:
                return
            state = self._advance(state, mode)

    def _batches(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[int],
        mode: Mode,
        on_tokens: Callable[[int], None],
        between: Callable[[], None],
    ) -> Iterator[tuple[list[int], _State]]:
        # Prompts of similar length share a batch, for little padding. The sort is stable, so the batches are fixed.
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        size = min(self.batch_size, len(prompts))
        for start in range(0, len(order), size):
            if start:
                between()
            rows = order[start : start + size]
            state = self._begin([prompts[row] for row in rows], rows, size, max_new_tokens, stop, mode)
            on_tokens(len(rows))
            while not np.all(state.done) and int(state.step) < max_new_tokens:
                before, active = int(state.step), int(np.count_nonzero(~np.asarray(state.done)[: len(rows)]))
                state = self._advance(state, mode)
                on_tokens((int(state.step) - before) * active)
            yield rows, state

    def _begin(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        size: int,
        max_new_tokens: int,
        stop: Sequence[int],
        mode: Mode,
    ) -> _State:
        if not stop or max_new_tokens < 1:
            raise ValueError("generation needs a stop token and room for a new one")
        longest = max(len(prompt) for prompt in prompts)
        if min(len(prompt) for prompt in prompts) == 0:
            raise UserError("generation: an empty prompt; give at least one token")
        if longest + max_new_tokens > self.config.context:
            raise UserError(
                f"generation: a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of "
                f"{self.config.context}; shorten the prompt or lower max_new_tokens"
            )
        width = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        size = padded_batch_size(size, self.split.layout)
        tokens = np.zeros((size, width), np.int32)
        valid = np.zeros((size, width), bool)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = prompt
            valid[row, width - len(prompt) :] = True
        numbers = np.zeros(size, np.int32)
        numbers[: len(rows)] = rows
        return _start(
            self.split.trainable,
            self.split.frozen,
            tokens,
            valid,
            np.asarray(list(stop), np.int32),
            numbers,
            structure=self.split.structure,
            room=max_new_tokens,
            mode=mode,
        )

    def _advance(self, state: _State, mode: Mode) -> _State:
        return _burst(self.split.trainable, self.split.frozen, state, structure=self.split.structure, mode=mode)


def lowered(
    split: Split, batch_size: int, width: int, new_tokens: int, mode: Mode = WHOLE
) -> tuple[Callable[[], Any], Callable[[], Any], Any]:
    """The two programs of generation, from shapes: functions that lower them, and the shapes of the state between them.

    The first program reads prompts [B, width]; the second generates a burst of tokens. The layout's devices need not
    exist: the programs are only compiled.
    """
    layout = split.layout
    shape = partial(jax.ShapeDtypeStruct, sharding=layout.replicated)
    given = (
        shape((batch_size, width), jnp.int32),
        shape((batch_size, width), jnp.bool_),
        shape((2,), jnp.int32),
        shape((batch_size,), jnp.int32),
    )
    options: dict[str, Any] = {"structure": split.structure, "mode": mode}
    start = partial(_start.lower, split.trainable, split.frozen, *given, room=new_tokens, **options)
    made = jax.eval_shape(
        partial(_start, structure=split.structure, room=new_tokens, mode=mode), split.trainable, split.frozen, *given
    )
    where = _shardings(layout)
    state = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), made, where)
    return start, partial(_burst.lower, split.trainable, split.frozen, state, **options), state


def _shardings(layout: Layout) -> _State:
    """The shardings of a state: the cache is divided by rows and heads, the rest is replicated."""
    copied: Any = layout.replicated
    heads: Any = layout.cache_sharding
    return _State(copied, copied, copied, copied, copied, copied, Cache(heads, heads, copied, copied))


def _until(ids: list[int], stop: Sequence[int]) -> list[int]:
    """The ids before the first stop token."""
    for place, token in enumerate(ids):
        if token in stop:
            return ids[:place]
    return ids
