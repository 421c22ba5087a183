"""Continuous batching: a fixed number of slots, each with one answer. A finished answer's slot takes the next prompt.

What holds of an answer, to the bit: it depends on its request and on the number of slots, and on nothing else. Each
piece of a prompt, and each token of an answer, is computed by a program of one shape, whose rows do not affect each
other. Another number of slots is another program, whose sums may be taken in another order. Few requests get few slots
(see `Engine`); work that is done in parts says how many there are of all (`at_once`), and so keeps to one number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from transllm_jax.generation.programs import (
    BURST,
    STOPS,
    Desk,
    Entry,
    Made,
    Slots,
    admit,
    burst,
    empty_desk,
    empty_slots,
    lowered,
    read_piece,
)
from transllm_jax.generation.request import ORIGINAL, WHOLE, Mode, Request, Result
from transllm_jax.generation.row import Row
from transllm_jax.generation.sampling import GREEDY, draw_of
from transllm_jax.model.cache import CHUNK, unstacked
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import Layout
from transllm_jax.model.parameters import Split

__all__ = ["BURST", "ORIGINAL", "WHOLE", "Engine", "Mode", "Request", "Result", "lowered", "padded_batch_size"]

# A prompt is read in pieces of the last of these widths; what is left is padded to the first of them that holds it.
PIECES = (32, 64, 128)
# Prompts that are read at once on an accelerator, for each part into which the mesh cuts a batch. On a CPU one prompt
# alone is enough work.
AT_DESK = 8
# On a CPU the layers are taken apart (see `cache.unstacked`), which takes this much memory at most: 4 GiB.
MOST_APART = 2**32


def padded_batch_size(size: int, layout: Layout) -> int:
    """A batch size, rounded up so that the mesh divides it."""
    return -(-size // layout.batch_parts) * layout.batch_parts


class _Device:
    """What the engine has on the devices while it works, for one mode, number of slots and size of cache.

    read: the ids of the whole pieces that each row of the desk has in its cache. A prompt that begins with them is read
    from there on: a prefix that prompts share is computed once.
    """

    def __init__(self, engine: Engine, mode: Mode, rows: int, size: int, stops: int) -> None:
        self.mode, self.rows, self.size, self.stops = mode, rows, size, stops
        self.desk_rows = min(engine.desk_rows, rows)
        split = engine.split
        options: dict[str, Any] = {"structure": split.structure, "size": size}
        arrays = split.trainable, split.frozen
        self.desk: Desk = empty_desk(*arrays, rows=self.desk_rows, **options)
        self.slots: Slots = empty_slots(*arrays, rows=rows, mode=mode, stops=stops, **options)
        self.read: list[list[int]] = [[] for _ in range(self.desk_rows)]

    def serves(self, mode: Mode, rows: int, size: int, stops: int) -> bool:
        """Whether it has so many slots, and room for texts of a size and for so many stop tokens, in a mode."""
        return self.mode == mode and self.rows == rows and self.size >= size and self.stops >= stops


class Engine:
    """Generates with one model. Prompts and answers are token ids; ids without a token are never chosen.

    batch_size: the most slots, which are the rows of each step. A run over fewer requests has the smallest power of two
    that holds them: few numbers, since each needs its own programs. Every number is rounded up so that the mesh divides
    it. cache_size: the least size of the cache, in tokens of a row; it grows by doubling, and each size needs its own
    programs. decode: ids to text, for stop strings.
    """

    def __init__(
        self,
        split: Split,
        config: LlamaConfig,
        *,
        batch_size: int = 32,
        cache_size: int = CHUNK,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.split, self.config = split, config
        model = split.merge()
        layout = model.layout
        self.batch_size = padded_batch_size(batch_size, layout)
        self.cache_size = min(cache_size, config.context)
        self._layout = layout
        # The most prompts that are read at once.
        self.desk_rows = layout.batch_parts * (1 if layout.platform == "cpu" else AT_DESK)
        # The names of the programs that were used; each is compiled once.
        self.programs: set[str] = set()
        self._decode = decode
        self._device: _Device | None = None
        blocks = sum(leaf.nbytes for leaf in jax.tree.leaves(model.blocks))
        apart = layout.mesh is None and layout.platform == "cpu" and blocks <= MOST_APART
        self._layers: Any = None if apart else ()

    # --- what is asked ----------------------------------------------------------------------------------------------

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

        An answer depends on its prompt, and on the number of slots that so many prompts get (see `Engine`). `on_tokens`
        and `between` are as in `run`. Prompts that are alike are sampled differently.
        Raises UserError for a prompt that leaves no room in the model's context.
        """
        requests = [
            Request(prompt, max_new_tokens, stop, sampling=mode.sampling.for_row(row))
            for row, prompt in enumerate(prompts)
        ]
        answers: list[list[int]] = [[] for _ in prompts]
        for number, result in self.run(requests, mode=mode, on_tokens=on_tokens, between=between):
            answers[number] = result.ids
        return answers

    def stream(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop: Sequence[int], mode: Mode = WHOLE
    ) -> Iterator[list[int]]:
        """Yield the answer to one prompt as it grows: all its tokens so far, after each burst.

        It is the answer of `generate` to this prompt alone. What was read of the prompt is kept: a conversation's next
        prompt, which begins with it, is read from there on.
        """
        request = Request(prompt, max_new_tokens, stop, sampling=mode.sampling.for_row(0))
        request.check(self.config.context)
        size = len(prompt) + max_new_tokens
        device = self._device_for(mode, 1, size, len(stop))
        for rows in self._rounds(iter([request]), device, lambda count: None, lambda: None):
            yield list(rows[0].ids)

    def run(
        self,
        requests: Iterable[Request],
        *,
        mode: Mode = WHOLE,
        longest: int | None = None,
        stops: int = STOPS,
        at_once: int | None = None,
        on_tokens: Callable[[int], None] = lambda count: None,
        between: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Result]]:
        """Yield the number of a request, from 0, and its answer, as answers finish.

        Requests are taken from the iterable one at a time, when a slot is free. longest: the most tokens of a prompt
        and its answer together, which decides on the size of the cache, and stops: the most stop tokens; without
        `longest` all requests are looked at first. at_once: how many requests need slots (see `Engine`); without it
        their number, or with `longest`, when it is unknown, `batch_size`. A run over the rest of some requests gives
        the answers of a run over all of them, to the bit, if `at_once` is the number of all.

        `on_tokens` is called with the number of tokens generated since its last call (for progress). `between` is
        called before each burst but the first, and before a slot is taken again; it may raise to stop there.
        Raises UserError for a request that the model's context has no room for.
        """
        if longest is None:
            requests = list(requests)
            for request in requests:
                self.check(request)
            longest = max((len(one.prompt) + one.max_new_tokens for one in requests), default=0)
            stops = max((len(one.stop) for one in requests), default=0)
            at_once = len(requests) if at_once is None else at_once
        if longest:
            device = self._device_for(mode, at_once, longest, stops)
            for rows in self._rounds(iter(requests), device, on_tokens, between):
                yield from ((row.number, row.result()) for row in rows if row.reason is not None)
            # Only a conversation needs what was read; a large cache would be in the way of other work.
            self._device = None

    def check(self, request: Request) -> None:
        """Raise UserError if the model's context has no room for a request."""
        request.check(self.config.context, decodes=self._decode is not None)

    def warm_up(self, longest: int, *, mode: Mode = WHOLE, at_once: int | None = None) -> None:
        """Compile all programs for prompts and answers of together up to `longest` tokens.

        at_once: for a run over so many requests; without it, for `batch_size` slots. Such a run compiles nothing then.
        """
        self.cache_size = max(self.cache_size, longest)
        device = self._device_for(mode, at_once, longest, STOPS)
        size = device.desk_rows
        for width in PIECES:
            self._read(device, np.zeros((size, width), np.int32), *np.zeros((3, size), np.int32))
        self._admit(device, {}, {})
        self._burst(device, [None] * device.rows, hurry=False)

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _rounds(
        self,
        requests: Iterator[Request],
        device: _Device,
        on_tokens: Callable[[int], None],
        between: Callable[[], None],
    ) -> Iterator[list[Row]]:
        """Yield the rows that got tokens, after each admission and each burst; one with a reason has left its slot."""
        # Donated arrays are gone if a call is interrupted, so nothing is kept but what a whole call left.
        self._device = None
        waiting = enumerate(requests)
        following = next(waiting, None)
        slots: list[Row | None] = [None] * device.rows
        bursts = 0
        try:
            while following is not None or any(slots):
                while following is not None and None in slots:
                    if following[0] >= device.rows:
                        between()
                    free = [slot for slot, row in enumerate(slots) if row is None][: device.desk_rows]
                    placed: dict[int, Row] = {}
                    while following is not None and free:
                        self._check_size(following[1], device)
                        placed[free.pop(0)] = Row(*following)
                        following = next(waiting, None)
                    slots[:] = [placed.get(slot, row) for slot, row in enumerate(slots)]
                    self._admit(device, placed, self._read_prompts(device, list(placed.values())))
                    yield self._freed(slots, list(placed.values()), on_tokens)
                if any(slots):
                    if bursts:
                        between()
                    bursts += 1
                    running = [row for row in slots if row is not None]
                    self._burst(device, slots, hurry=following is not None)
                    yield self._freed(slots, running, on_tokens)
        except GeneratorExit:
            self._device = device
            raise
        self._device = device

    def _freed(self, slots: list[Row | None], changed: list[Row], on_tokens: Callable[[int], None]) -> list[Row]:
        """Free the slots of the rows that ended, at a stop string too; return all rows that got tokens."""
        on_tokens(sum(row.new for row in changed))
        for row in changed:
            if row.request.stop_strings and self._decode is not None:
                row.look(self._decode)
        slots[:] = [None if row is None or row.reason is not None else row for row in slots]
        return changed

    def _check_size(self, request: Request, device: _Device) -> None:
        self.check(request)
        if len(request.prompt) + request.max_new_tokens > device.size or len(request.stop) > device.stops:
            raise ValueError(
                f"a request of {len(request.prompt)} tokens is longer than was announced, or has more stops"
            )

    def _device_for(self, mode: Mode, at_once: int | None, longest: int, stops: int) -> _Device:
        mode, rows = replace(mode, sampling=GREEDY), self._rows(at_once)
        if self._device is None or not self._device.serves(mode, rows, longest, stops):
            # Freed first, so that two caches are never in memory.
            self._device = None
            size = CHUNK
            while size < max(longest, self.cache_size):
                size *= 2
            size = min(size, -(-self.config.context // CHUNK) * CHUNK)
            self._device = _Device(self, mode, rows, size, STOPS if stops <= STOPS else 1 << (stops - 1).bit_length())
        return self._device

    def _rows(self, at_once: int | None) -> int:
        """The number of slots where so many are wanted."""
        if at_once is None:
            return self.batch_size
        return min(padded_batch_size(1 << max(at_once - 1, 0).bit_length(), self._layout), self.batch_size)

    # --- calls of the programs --------------------------------------------------------------------------------------

    def _call(self, device: _Device, name: str, rows: int, program: Callable[..., Any], *arguments: Any) -> Any:
        which = "the original" if device.mode.base_only else "the model"
        self.programs.add(f"{name}, {which}, {rows} rows, cache of {device.size}, {device.stops} stops")
        split = self.split
        return program(split.trainable, split.frozen, *arguments, structure=split.structure, mode=device.mode)

    def _read_prompts(self, device: _Device, rows: Sequence[Row]) -> dict[int, int]:
        """Read the prompts at the desk; return the row of the desk of each, by its place in `rows`.

        Each prompt takes the row of the desk whose text it shares most with, and is read from the first piece on that
        differs. The last piece is always read: the answer begins from its state.
        """
        whole = PIECES[-1]
        places: dict[int, int] = {}
        left: dict[int, Sequence[int]] = {}
        starts, totals = np.zeros((2, device.desk_rows), np.int32)
        for number, row in enumerate(rows):
            prompt = row.request.prompt
            known = prompt[: len(prompt) - 1] if self._shares(prompt) else ()
            shared = {
                place: _shared(device.read[place], known) // whole * whole
                for place in range(device.desk_rows)
                if place not in left
            }
            place = max(shared, key=lambda place: shared[place])
            places[number], starts[place], left[place] = place, shared[place], prompt[shared[place] :]
            totals[place] = len(prompt)
            device.read[place] = list(prompt[: len(prompt) // whole * whole]) if self._shares(prompt) else []
        while left:
            # Rows whose next piece has another width wait: a piece's width depends on its prompt alone.
            width = _width(len(next(iter(left.values()))))
            tokens = np.zeros((device.desk_rows, width), np.int32)
            counts = np.zeros(device.desk_rows, np.int32)
            for place, ids in list(left.items()):
                if _width(len(ids)) == width:
                    counts[place] = min(len(ids), width)
                    tokens[place, : counts[place]] = ids[:width]
                    left[place] = ids[width:]
            self._read(device, tokens, starts.copy(), counts, totals)
            starts += counts
            left = {place: ids for place, ids in left.items() if ids}
        return places

    def _shares(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt's length leaves the keys of its beginning alone: dynamic RoPE scaling does not."""
        scaling = self.config.rope_scaling
        dynamic = scaling is not None and scaling.rope_type == "dynamic"
        return not dynamic or len(prompt) <= self.config.max_position_embeddings

    def _read(self, device: _Device, tokens: np.ndarray, *rows: np.ndarray) -> None:
        name = f"a piece of {tokens.shape[1]} tokens"
        device.desk = self._call(device, name, device.desk_rows, read_piece, device.desk, tokens, *rows)

    def _admit(self, device: _Device, placed: Mapping[int, Row], places: Mapping[int, int]) -> None:
        """Give the prompts at the desk their slots, and take the first tokens of their answers.

        placed: the rows by slot. places: the row of the desk of each, by its place in `placed`.
        """
        size, rows = device.desk_rows, list(placed.values())
        at = {place: number for number, place in places.items()}
        given = [rows[at[place]].request if place in at else Request((), 0) for place in range(size)]
        slot = np.full(size, device.rows, np.int32)
        slot[list(at)] = [list(placed)[number] for number in at.values()]
        stops = np.full((size, device.stops), -1, np.int32)
        seen = np.zeros((size, device.slots.seen.shape[1]), bool)
        for place, request in enumerate(given):
            stops[place, : len(request.stop)] = request.stop
            if request.sampling.repetition_penalty != 1:
                # An id that the mode does not choose from, as in a prompt for the original model, has no logit.
                seen[place, [token for token in request.prompt if token < seen.shape[1]]] = True
        lengths = np.array([len(request.prompt) for request in given], np.int32)
        limits = np.array([request.max_new_tokens for request in given], np.int32)
        draw = draw_of([request.sampling for request in given], [request.scored for request in given])
        entry: Any = Entry(slot, lengths, limits, stops, seen, draw)  # type: ignore[arg-type]
        device.slots, made = self._call(device, "an admission", device.rows, admit, device.slots, device.desk, entry)
        _hand_out(made, {place: rows[number] for number, place in places.items()})

    def _burst(self, device: _Device, slots: Sequence[Row | None], *, hurry: bool) -> None:
        """More tokens for the answers in the slots."""
        if self._layers is None:
            self._layers = unstacked(self.split.merge())
        running = np.array([row is not None for row in slots])
        given = self._layers, device.slots, running, np.bool_(hurry)
        device.slots, made = self._call(device, f"a burst of {BURST} tokens", device.rows, burst, *given)
        _hand_out(made, {slot: row for slot, row in enumerate(slots) if row is not None})


def _width(left: int) -> int:
    """The width of the next piece of a prompt of which so many tokens are left."""
    return next((width for width in PIECES if width >= left), PIECES[-1])


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids at their beginnings are the same."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def _hand_out(made: Made, rows: Mapping[int, Row]) -> None:
    """Give each row its new tokens, by its place in what was made."""
    ids, logprobs, counts, active = map(np.asarray, made)
    for place, row in rows.items():
        count = int(counts[place])
        row.take(ids[place, :count].tolist(), logprobs[place, :count].tolist(), bool(active[place]))
