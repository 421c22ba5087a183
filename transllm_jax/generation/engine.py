"""Continuous batching: a fixed number of slots, each with one answer. A finished answer's slot takes the next prompt.

What holds of an answer, to the bit: it depends on its request and on the number of slots, and on nothing else. Each
piece of a prompt, and each token of an answer, is computed by a program of one shape, whose rows do not affect each
other. Another number of slots is another program, whose sums may be taken in another order. Few requests get few slots
(see `Engine`); work that is done in parts says how many there are of all (`at_once`), and so keeps to one number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax

from transllm_jax.generation.device import PIECES, Batch, Device
from transllm_jax.generation.programs import BURST, STOPS, lowered
from transllm_jax.generation.request import ORIGINAL, WHOLE, Growing, Mode, Request, Result
from transllm_jax.generation.row import Row
from transllm_jax.model.cache import CHUNK, unstacked
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import Layout
from transllm_jax.model.llama import Block
from transllm_jax.model.parameters import Split

__all__ = [
    "BURST",
    "ORIGINAL",
    "PIECES",
    "WHOLE",
    "Batch",
    "Engine",
    "Mode",
    "Request",
    "Result",
    "lowered",
    "padded_batch_size",
]

# Prompts that are read at once on an accelerator, for each part into which the mesh cuts a batch. On a CPU one prompt
# alone is enough work.
AT_DESK = 8
# On a CPU the layers are taken apart (see `cache.unstacked`), which takes this much memory at most: 4 GiB.
MOST_APART = 2**32


def padded_batch_size(size: int, layout: Layout) -> int:
    """A batch size, rounded up so that the mesh divides it."""
    return -(-size // layout.batch_parts) * layout.batch_parts


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
        self._device: Device | None = None
        blocks = sum(leaf.nbytes for leaf in jax.tree.leaves(model.blocks))
        apart = layout.mesh is None and layout.platform == "cpu" and blocks <= MOST_APART
        self._apart: Sequence[Block] | None = None if apart else ()

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
    ) -> Iterator[Growing]:
        """Yield the answer to one prompt as it grows: all its tokens so far, after each burst.

        It is the answer of `generate` to this prompt alone. What was read of the prompt is kept: a conversation's next
        prompt, which begins with it, is read from there on.
        """
        request = Request(prompt, max_new_tokens, stop, sampling=mode.sampling.for_row(0))
        request.check(self.config.context)
        size = len(prompt) + max_new_tokens
        device = self._device_for(mode, 1, size, len(stop))
        for rows in self._rounds(iter([request]), device, lambda count: None, lambda: None):
            yield Growing(list(rows[0].ids), rows[0].stopped_by)

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
        self._device_for(mode, at_once, longest, STOPS).warm_up()

    def batch(self, longest: int, *, mode: Mode = WHOLE, stops: int = STOPS) -> Batch:
        """`batch_size` slots of their own for texts of up to `longest` tokens: for work whose end is not known.

        Several may be used in turn, one for each mode. Requests have to be checked (`check`) before they are admitted.
        """
        return Batch(self._new_device(mode, self.batch_size, longest, stops), self._decode)

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _rounds(
        self,
        requests: Iterator[Request],
        device: Device,
        on_tokens: Callable[[int], None],
        between: Callable[[], None],
    ) -> Iterator[list[Row]]:
        """Yield the rows that got tokens, after each admission and each burst; one with a reason has left its slot."""
        # Donated arrays are gone if a call is interrupted, so nothing is kept but what a whole call left.
        self._device = None
        waiting = enumerate(requests)
        following = next(waiting, None)
        batch = Batch(device, self._decode)
        bursts = 0
        try:
            while following is not None or batch.running:
                while following is not None and batch.room:
                    if following[0] >= device.rows:
                        between()
                    rows: list[Row] = []
                    while following is not None and len(rows) < batch.room:
                        self._check_size(following[1], device)
                        rows.append(Row(*following))
                        following = next(waiting, None)
                    for _ in batch.admitting(rows):
                        pass
                    on_tokens(sum(row.new for row in rows))
                    yield rows
                if batch.running:
                    if bursts:
                        between()
                    bursts += 1
                    rows = batch.burst(hurry=following is not None)
                    on_tokens(sum(row.new for row in rows))
                    yield rows
        except GeneratorExit:
            self._device = device
            raise
        self._device = device

    def _check_size(self, request: Request, device: Device) -> None:
        self.check(request)
        if len(request.prompt) + request.max_new_tokens > device.size or len(request.stop) > device.stops:
            raise ValueError(
                f"a request of {len(request.prompt)} tokens is longer than was announced, or has more stops"
            )

    def _device_for(self, mode: Mode, at_once: int | None, longest: int, stops: int) -> Device:
        rows = self._rows(at_once)
        if self._device is None or not self._device.serves(mode, rows, longest, stops):
            # Freed first, so that two caches are never in memory.
            self._device = None
            self._device = self._new_device(mode, rows, longest, stops)
        return self._device

    def _new_device(self, mode: Mode, rows: int, longest: int, stops: int) -> Device:
        size = CHUNK
        while size < max(longest, self.cache_size):
            size *= 2
        return Device(
            self.split,
            self.config,
            mode,
            rows=rows,
            desk_rows=self.desk_rows,
            size=min(size, -(-self.config.context // CHUNK) * CHUNK),
            stops=STOPS if stops <= STOPS else 1 << (stops - 1).bit_length(),
            layers=self._layers,
            programs=self.programs,
        )

    def _layers(self) -> Sequence[Block]:
        if self._apart is None:
            self._apart = unstacked(self.split.merge())
        return self._apart

    def _rows(self, at_once: int | None) -> int:
        """The number of slots where so many are wanted."""
        if at_once is None:
            return self.batch_size
        return min(padded_batch_size(1 << max(at_once - 1, 0).bit_length(), self._layout), self.batch_size)
