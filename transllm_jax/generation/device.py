"""The desk and the slots that an engine has on the devices for one mode, and the calls of the programs over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from transllm_jax.generation.programs import (
    BURST,
    Desk,
    Entry,
    Made,
    Slots,
    admit,
    burst,
    empty_desk,
    empty_slots,
    read_piece,
)
from transllm_jax.generation.request import Mode, Request
from transllm_jax.generation.row import Row
from transllm_jax.generation.sampling import GREEDY, draw_of
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.llama import Block
from transllm_jax.model.parameters import Split

# A prompt is read in pieces of the last of these widths; what is left is padded to the first of them that holds it.
PIECES = (32, 64, 128)


class Device:
    """What an engine has on the devices while it works, for one mode, number of slots and size of cache.

    layers: gives the layers apart (see `cache.unstacked`); called for the first burst. programs: gets the names of the
    programs that are used. read: the ids of the whole pieces that each row of the desk has in its cache. A prompt that
    begins with them is read from there on: a prefix that prompts share is computed once.
    """

    def __init__(
        self,
        split: Split,
        config: LlamaConfig,
        mode: Mode,
        *,
        rows: int,
        desk_rows: int,
        size: int,
        stops: int,
        layers: Callable[[], Sequence[Block]],
        programs: set[str],
    ) -> None:
        self.mode, self.rows, self.size, self.stops = replace(mode, sampling=GREEDY), rows, size, stops
        self.desk_rows = min(desk_rows, rows)
        self._split, self._config, self._layers, self._programs = split, config, layers, programs
        options: dict[str, Any] = {"structure": split.structure, "size": size}
        arrays = split.trainable, split.frozen
        self.desk: Desk = empty_desk(*arrays, rows=self.desk_rows, **options)
        self.slots: Slots = empty_slots(*arrays, rows=rows, mode=self.mode, stops=stops, **options)
        self.read: list[list[int]] = [[] for _ in range(self.desk_rows)]

    def serves(self, mode: Mode, rows: int, size: int, stops: int) -> bool:
        """Whether it has so many slots, and room for texts of a size and for so many stop tokens, in a mode."""
        return (
            self.mode == replace(mode, sampling=GREEDY)
            and self.rows == rows
            and self.size >= size
            and self.stops >= stops
        )

    def warm_up(self) -> None:
        """Call all programs once, which compiles them."""
        for width in PIECES:
            self._read(np.zeros((self.desk_rows, width), np.int32), *np.zeros((3, self.desk_rows), np.int32))
        self.admit({}, {})
        self.burst([None] * self.rows, hurry=False)

    def reading(self, rows: Sequence[Row], places: dict[int, int]) -> Iterator[None]:
        """Read the prompts of rows at the desk; yield after each piece. It need not be taken to its end.

        places: gets the row of the desk of each, by its place in `rows`. Each prompt takes the row of the desk whose
        text it shares most with, and is read from the first piece on that differs. The last piece is always read: the
        answer begins from its state.
        """
        whole = PIECES[-1]
        left: dict[int, Sequence[int]] = {}
        prompts: dict[int, Sequence[int]] = {}
        starts, totals = np.zeros((2, self.desk_rows), np.int32)
        for number, row in enumerate(rows):
            prompt = row.request.prompt
            known = prompt[: len(prompt) - 1] if self._shares(prompt) else ()
            shared = {
                place: _shared(self.read[place], known) // whole * whole
                for place in range(self.desk_rows)
                if place not in left
            }
            place = max(shared, key=lambda place: shared[place])
            places[number], starts[place], left[place] = place, shared[place], prompt[shared[place] :]
            totals[place], prompts[place] = len(prompt), prompt
            self.read[place] = list(prompt[: shared[place]])
        while left:
            # Rows whose next piece has another width wait: a piece's width depends on its prompt alone.
            width = _width(len(next(iter(left.values()))))
            tokens = np.zeros((self.desk_rows, width), np.int32)
            counts = np.zeros(self.desk_rows, np.int32)
            for place, ids in list(left.items()):
                if _width(len(ids)) == width:
                    counts[place] = min(len(ids), width)
                    tokens[place, : counts[place]] = ids[:width]
                    left[place] = ids[width:]
            self._read(tokens, starts.copy(), counts, totals)
            starts += counts
            for place, prompt in prompts.items():
                if self._shares(prompt):
                    self.read[place] = list(prompt[: starts[place] // whole * whole])
            left = {place: ids for place, ids in left.items() if ids}
            yield

    def admit(self, placed: Mapping[int, Row], places: Mapping[int, int]) -> None:
        """Give prompts at the desk their slots, and take the first tokens of their answers.

        placed: the rows by slot. places: the row of the desk of each, by its place in `placed`.
        """
        size, rows = self.desk_rows, list(placed.values())
        at = {place: number for number, place in places.items()}
        given = [rows[at[place]].request if place in at else Request((), 0) for place in range(size)]
        slot = np.full(size, self.rows, np.int32)
        slot[list(at)] = [list(placed)[number] for number in at.values()]
        stops = np.full((size, self.stops), -1, np.int32)
        seen = np.zeros((size, self.slots.seen.shape[1]), bool)
        for place, request in enumerate(given):
            stops[place, : len(request.stop)] = request.stop
            if request.sampling.repetition_penalty != 1:
                # An id that the mode does not choose from, as in a prompt for the original model, has no logit.
                seen[place, [token for token in request.prompt if token < seen.shape[1]]] = True
        lengths = np.array([len(request.prompt) for request in given], np.int32)
        limits = np.array([request.max_new_tokens for request in given], np.int32)
        draw = draw_of([request.sampling for request in given], [request.scored for request in given])
        entry: Any = Entry(slot, lengths, limits, stops, seen, draw)  # type: ignore[arg-type]
        self.slots, made = self._call("an admission", self.rows, admit, self.slots, self.desk, entry)
        _hand_out(made, {place: rows[number] for number, place in places.items()})

    def burst(self, slots: Sequence[Row | None], *, hurry: bool, steps: int = BURST) -> None:
        """Up to `steps` more tokens for the answers in the slots; `hurry`: fewer, if one of them ends."""
        running = np.array([row is not None for row in slots])
        given = self._layers(), self.slots, running, np.bool_(hurry), np.int32(steps)
        self.slots, made = self._call(f"a burst of {BURST} tokens", self.rows, burst, *given)
        _hand_out(made, {slot: row for slot, row in enumerate(slots) if row is not None})

    def _shares(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt's length leaves the keys of its beginning alone: dynamic RoPE scaling does not."""
        scaling = self._config.rope_scaling
        dynamic = scaling is not None and scaling.rope_type == "dynamic"
        return not dynamic or len(prompt) <= self._config.max_position_embeddings

    def _read(self, tokens: np.ndarray, *rows: np.ndarray) -> None:
        name = f"a piece of {tokens.shape[1]} tokens"
        self.desk = self._call(name, self.desk_rows, read_piece, self.desk, tokens, *rows)

    def _call(self, name: str, rows: int, program: Callable[..., Any], *arguments: Any) -> Any:
        which = "the original" if self.mode.base_only else "the model"
        self._programs.add(f"{name}, {which}, {rows} rows, cache of {self.size}, {self.stops} stops")
        split = self._split
        return program(split.trainable, split.frozen, *arguments, structure=split.structure, mode=self.mode)


class Batch:
    """The answers in the slots of a device. Others are admitted while they go on.

    decode: ids to text, for stop strings.
    """

    def __init__(self, device: Device, decode: Callable[[Sequence[int]], str] | None = None) -> None:
        self.device, self._decode = device, decode
        self._slots: list[Row | None] = [None] * device.rows

    @property
    def running(self) -> list[Row]:
        """The rows in the slots."""
        return [row for row in self._slots if row is not None]

    @property
    def room(self) -> int:
        """How many prompts can be admitted together now."""
        return min(self._slots.count(None), self.device.desk_rows)

    def admitting(self, rows: Sequence[Row]) -> Iterator[None]:
        """Read the prompts of up to `room` rows; yield after each piece. Bursts may come in between.

        When it ends, each of them has a slot and its first token. A row that was taken back meanwhile gets none; if all
        were, it ends at once.
        """
        places: dict[int, int] = {}
        for _ in self.device.reading(rows, places):
            if all(row.reason is not None for row in rows):
                return
            yield
        kept = [number for number, row in enumerate(rows) if row.reason is None]
        free = [slot for slot, row in enumerate(self._slots) if row is None]
        placed = dict(zip(free, [rows[number] for number in kept], strict=False))
        self._slots[:] = [placed.get(slot, row) for slot, row in enumerate(self._slots)]
        self.device.admit(placed, {at: places[number] for at, number in enumerate(kept)})
        self._free([rows[number] for number in kept])

    def burst(self, *, hurry: bool = False, steps: int = BURST) -> list[Row]:
        """More tokens for all rows (see `Device.burst`), which are returned. One with a reason has left its slot."""
        running = self.running
        self.device.burst(self._slots, hurry=hurry, steps=steps)
        self._free(running)
        return running

    def take_back(self, row: Row) -> None:
        """End an answer that nobody waits for."""
        if row.reason is None:
            row.reason = "stop"
            self._free([])

    def _free(self, changed: Sequence[Row]) -> None:
        """Free the slots of the rows that ended; those that changed may also have ended at a stop string."""
        for row in changed:
            if row.request.stop_strings and self._decode is not None:
                row.look(self._decode)
        self._slots[:] = [None if row is None or row.reason is not None else row for row in self._slots]


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
