"""Batches by number: batch k is a pure function of (seed, k), so no iterator state can be lost.

Grain computes it by index arithmetic: a source's rows are shuffled in a new order in each of its epochs, sources are
interleaved in proportion to their weights, and B consecutive elements make a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from itertools import pairwise
from math import ceil, gcd
from typing import Any

import grain
import numpy as np

from transllm_jax.data.rows.packing import FIELDS, Rows
from transllm_jax.errors import UserError

# By name: the arrays of `data.rows.packing.FIELDS` [B, T], and `sources` [B], the source of each row.
Batch = dict[str, np.ndarray]


class Proportions(grain.transforms.DatasetSelectionMap):
    """Which source element n of a mixture comes from, and how many elements came from it before, by arithmetic.

    Exact: among the sum(parts) elements from any multiple of sum(parts) on, source i occurs exactly parts[i] times.
    (Grain's own `mix` rounds weights to a hundredth of the smallest, so an epoch in proportion to the rows would not
    see every row once.)
    """

    def __init__(self, parts: Sequence[int]) -> None:
        divisor = gcd(*parts)
        self.parts = tuple(part // divisor for part in parts)

    def __len__(self) -> int:
        return sys.maxsize

    def counts(self, n: int) -> tuple[int, ...]:
        """How many of the first n elements come from each source; their sum is n."""
        # Each source takes its share, rounded up, of the elements that the sources before it have left.
        result = []
        rest, left = sum(self.parts), n
        for part in self.parts:
            after = left * (rest - part) // rest
            result.append(left - after)
            left, rest = after, rest - part
        return tuple(result)

    def __getitem__(self, n: int) -> tuple[int, int]:
        before, after = self.counts(n), self.counts(n + 1)
        source = next(i for i, (old, new) in enumerate(zip(before, after, strict=True)) if new > old)
        return source, before[source]


class Batches:
    """Batches of packed rows from one or several sources: `batches[k]` for any k >= 0, in any order.

    sources: (name, rows, weight); weights are relative shares of the mixture's rows; None for all of them means in
    proportion to the numbers of rows, so that every row occurs once per epoch. batch_size: B, rows. seed: any integer
    >= 0. A source that is smaller than its share repeats, in a new order in each epoch. Raises UserError for a source
    without rows or with a weight that is not above 0.
    """

    def __init__(self, sources: Sequence[tuple[str, Rows, float | None]], batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: it must be at least 1")
        if not sources:
            raise ValueError("a mixture needs at least one source")
        self.names = [name for name, _, _ in sources]
        if len(set(self.names)) != len(self.names):
            raise UserError(f"two sources of a mixture have one name: {', '.join(self.names)}; rename one")
        self.batch_size = batch_size
        self.seed = seed
        self._rows = [rows for _, rows, _ in sources]
        for name, rows in zip(self.names, self._rows, strict=True):
            if len(rows) == 0:
                raise UserError(f"source {name!r} gave no rows to train on: give it more text or take it out")
        if len({rows.row_length for rows in self._rows}) != 1:
            raise ValueError(f"sources differ in row length: {[rows.row_length for rows in self._rows]}")
        self._proportions = Proportions(_parts(sources))
        self._index = self._build()

    def _build(self) -> Any:
        """A Grain dataset of index pairs: element k is int64 [B, 2], (source, row) of each row of batch k."""
        columns = []
        for source, rows in enumerate(self._rows):
            # A seed per source: with the same seed, sources of the same size would have the same order.
            seed = int(np.random.SeedSequence([self.seed, source]).generate_state(1)[0])
            # Grain's shuffle depends on the epoch, so that each epoch has its own order.
            column = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
            columns.append(column.map(lambda row, source=source: np.array([source, row], np.int64)))
        return grain.MapDataset.select_from_datasets(columns, self._proportions).batch(self.batch_size)

    def rows(self, k: int) -> np.ndarray:
        """int64 [B, 2]: the (source index, row index) of every row of batch k."""
        if k < 0:
            raise IndexError(f"batch {k}: batches count from 0")
        return np.asarray(self._index[k])

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        """Batch k: tokens, positions, segment_ids, labels int32 [B, T], weights float32 [B, T], sources int32 [B]."""
        return self.select_rows(k, np.arange(self.batch_size))

    def select_rows(self, k: int, places: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of batch k at these places, 0 to B - 1: those that a host's devices hold.

        Batch k is the same for every number of hosts.
        """
        chosen = self.rows(k)[places]
        rows = [self._rows[source].row(int(row)) for source, row in chosen]
        batch = {field: np.stack([row[field] for row in rows]) for field in FIELDS}
        return {**batch, "sources": chosen[:, 0].astype(np.int32)}

    def places(self, k: int) -> list[str]:
        """Where the examples of batch k come from, row by row: `source: file:line file:line`."""
        return [
            f"{self.names[source]}: {' '.join(self._rows[source].places(int(row)))}" for source, row in self.rows(k)
        ]

    def most_rows(self, sources: Sequence[int], size: int, steps: int) -> int:
        """The most rows of these sources among `size` consecutive ones, of those that the first `steps` batches are cut
        into; size divides the batch."""

        def before(n: int) -> int:
            counts = self._proportions.counts(n)
            return sum(counts[source] for source in sources)

        edges = [before(n) for n in range(0, steps * self.batch_size + 1, size)]
        return max(after - earlier for earlier, after in pairwise(edges))

    def epoch(self, k: int) -> dict[str, float]:
        """By source: how many times its rows were seen before batch k (1.5: one and a half times)."""
        counts = self._proportions.counts(k * self.batch_size)
        return {name: count / len(rows) for name, count, rows in zip(self.names, counts, self._rows, strict=True)}

    @property
    def shares(self) -> dict[str, float]:
        """By source: its share of the rows, 0 to 1."""
        parts = self._proportions.parts
        return {name: part / sum(parts) for name, part in zip(self.names, parts, strict=True)}

    @property
    def steps_per_epoch(self) -> int:
        """The fewest batches in which every source is read to its end at least once.

        With default weights that is all rows / B, rounded up; with others the source with the smallest share compared
        with its size decides.
        """
        parts = self._proportions.parts
        total = sum(parts)
        longest = max(Fraction(len(rows) * total, part) for rows, part in zip(self._rows, parts, strict=True))
        steps = max(1, ceil(longest / self.batch_size))
        while min(self.epoch(steps).values()) < 1:  # shares are exact only over a whole period
            steps += 1
        return steps


def _parts(sources: Sequence[tuple[str, Rows, float | None]]) -> list[int]:
    """Shares as whole numbers: the numbers of rows, or the weights times a common factor."""
    weights = [weight for _, _, weight in sources]
    if all(weight is None for weight in weights):
        return [len(rows) for _, rows, _ in sources]
    fractions = []
    for name, _, weight in sources:
        if weight is None:
            raise UserError(f"source {name!r} has no weight but others have: give all of them one, or none")
        if not 0 < weight < float("inf"):
            raise UserError(f"source {name!r} has weight {weight}: it must be above 0, or take the source out")
        # The float 0.1 is not exactly a tenth; its decimal text is.
        fractions.append(Fraction(str(weight)))
    factor = 1
    for fraction in fractions:
        factor = factor * fraction.denominator // gcd(factor, fraction.denominator)
    return [int(fraction * factor) for fraction in fractions]


class Prefetcher:
    """Makes the batches after the current one in a thread, while the current step runs."""

    def __init__(self, batches: Callable[[int], Batch], last: int, depth: int = 2) -> None:
        """batches: makes batch k, for k below `last`. depth: number of batches made ahead."""
        self._make, self._last, self._depth = batches, last, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._waiting: dict[int, Future[Batch]] = {}

    def __getitem__(self, k: int) -> Batch:
        """Batch k; starts making those after it. An error in making batch k is raised here."""
        for number in range(k, max(min(k + 1 + self._depth, self._last), k + 1)):
            if number not in self._waiting:
                self._waiting[number] = self._pool.submit(self._make, number)
        return self._waiting.pop(k).result()

    def close(self) -> None:
        """Stop making batches."""
        self._pool.shutdown(cancel_futures=True)
