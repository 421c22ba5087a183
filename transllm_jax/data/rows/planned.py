"""The rows of a source: which examples share a row is planned once and stored; rows are read by index.

The plan needs the token cache's properties of each example, but no tokens. It leaves out duplicates, found over all
shards, and keeps to a token budget.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from transllm_jax.data.clean.near_duplicates import SIZE, keep_first
from transllm_jax.data.rows.array_file import read_arrays, write_arrays
from transllm_jax.data.rows.packing import fill, plan
from transllm_jax.data.rows.token_cache import ShardTokens
from transllm_jax.disk import sha256_of_json
from transllm_jax.errors import UserError

_FORMAT = 3  # of a stored plan
# Prefixes of names in `PlannedRows.counts`: of reasons for bad rows, and of fields that are not read.
SKIPPED, IGNORED = "bad row: ", "field: "


@dataclass(frozen=True)
class Selection:
    """Which part of a source is trained on, and how it is packed.

    row_length: T. tokens: train on at most this many, in items chosen at random by the seed; None for all. exact: leave
    out items that are equal to an earlier one. near: leave out items whose estimated Jaccard similarity to an earlier
    one is at least this. window: see `data.rows.packing.plan`.
    """

    row_length: int
    tokens: int | None = None
    exact: bool = True
    near: float | None = None
    seed: int = 0
    window: int = 256


def plan_path(shards: Sequence[ShardTokens], selection: Selection, directory: Path) -> Path:
    """The path of the plan of these shards, which need not exist yet."""
    key = [_FORMAT, asdict(selection), [shard.path.name for shard in shards]]
    return directory / f"plan-{sha256_of_json(key)[:24]}.npz"


class PlannedRows:
    """Packed rows of tokenised shards, read from disk by index in any order."""

    def __init__(self, shards: Sequence[ShardTokens], selection: Selection, directory: Path) -> None:
        """Reads the plan from `directory`, or makes and stores it; it may have no rows.

        Raises UserError if a file is damaged or the directory cannot be written to.
        """
        self.shards, self.selection = list(shards), selection
        # The number of the first example of each shard.
        self._firsts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        path = plan_path(self.shards, selection, directory)
        if not path.is_file():
            self._plan(path)
        try:
            self._starts, self._members, counts = read_arrays(path, ["starts", "members", "counts"])
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): remove it and run again; it is made again") from error
        self.counts: dict[str, int] = json.loads(str(counts))

    def _plan(self, path: Path) -> None:
        counts: Counter[str] = sum((Counter(shard.counts) for shard in self.shards), Counter())
        for shard in self.shards:
            counts.update({f"{SKIPPED}{reason}": count for reason, count in shard.skipped.items()})
            counts.update({f"{IGNORED}{name}": count for name, count in shard.ignored.items()})
        counts["items"] = sum(shard.items for shard in self.shards)
        lengths = np.concatenate([shard.lengths for shard in self.shards])
        kept = np.flatnonzero(self._chosen(lengths, counts))
        rows = plan(lengths[kept], self.selection.row_length, window=self.selection.window)
        counts["examples"] = len(kept)
        counts["tokens"] = int(lengths[kept].sum(dtype=np.int64))
        for name in ("trained", "bytes"):
            counts[name] = int(self._joined(name)[kept].sum(dtype=np.int64))
        arrays = {
            "starts": np.cumsum([0, *map(len, rows)]),
            "members": kept[np.fromiter(chain.from_iterable(rows), np.int64, len(kept))],
            "counts": np.array(json.dumps(counts)),
        }
        write_arrays(path, arrays)

    def _chosen(self, lengths: np.ndarray, counts: Counter[str]) -> np.ndarray:
        """Which examples are trained on, bool [examples]."""
        items = np.cumsum([0, *(shard.items for shard in self.shards)])
        of_item = np.concatenate(
            [shard.column("item") + first for shard, first in zip(self.shards, items[:-1], strict=True)]
        )
        # An item without examples was left out already; later items are no duplicates of it.
        keep = np.zeros(items[-1], bool)
        keep[of_item] = True
        if self.selection.exact or self.selection.near is not None:
            present = np.flatnonzero(keep)
            exact = self._joined("exact")[present] if self.selection.exact else np.arange(len(present), dtype=np.uint64)
            near = None if self.selection.near is None else self._signatures(keep, items)
            kept = keep_first(exact, near, self.selection.near or 1.0)
            keep[present] = kept.keep
            counts["exact duplicates"], counts["near duplicates"] = kept.exact, kept.near
            counts["unchecked"] = kept.unchecked
        if self.selection.tokens is not None:
            sizes = np.bincount(of_item, weights=lengths, minlength=len(keep)).astype(np.int64)
            candidates = np.flatnonzero(keep)
            order = np.random.default_rng(self.selection.seed).permutation(candidates)
            within = order[np.cumsum(sizes[order]) <= self.selection.tokens]
            counts["over the budget"] = len(candidates) - len(within)
            keep[:] = False
            keep[within] = True
        return keep[of_item]

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([shard.column(name) for shard in self.shards])

    def _signatures(self, present: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The signatures of the items that are present, uint32 [n, SIZE]; they are large, so never in memory twice."""
        joined = np.empty((int(present.sum()), SIZE), np.uint32)
        done = 0
        for shard, first in zip(self.shards, items[:-1], strict=True):
            some = shard.column("near")[present[first : first + shard.items]]
            joined[done : done + len(some)] = some
            done += len(some)
        return joined

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def row_length(self) -> int:
        """T, in tokens."""
        return self.selection.row_length

    @property
    def token_count(self) -> int:
        """Tokens of all rows, without padding."""
        return self.counts["tokens"]

    @property
    def padded_fraction(self) -> float:
        """The share of positions that hold no token, 0 to 1."""
        return 1 - self.token_count / (len(self) * self.row_length) if len(self) else 0.0

    def row(self, number: int) -> dict[str, np.ndarray]:
        """A row's arrays [T], by the names in `data.rows.packing.FIELDS`. Raises UserError if the cache is damaged."""
        examples = [
            example for shard, numbers in self._members_of(number) for example in self.shards[shard].examples(numbers)
        ]
        packed = fill(examples, [range(len(examples))], self.row_length)
        return packed.row(0)

    def _members_of(self, number: int) -> list[tuple[int, list[int]]]:
        """The examples of a row as (shard, numbers in that shard): they ascend, so those of a shard are adjacent."""
        members = self._members[self._starts[number] : self._starts[number + 1]]
        shards = np.searchsorted(self._firsts, members, side="right") - 1
        return [(int(shard), (members[shards == shard] - self._firsts[shard]).tolist()) for shard in np.unique(shards)]

    def bytes(self, number: int) -> int:
        """The UTF-8 bytes of the text that is trained on in a row."""
        return sum(self.shards[shard].bytes_of(numbers) for shard, numbers in self._members_of(number))

    def places(self, number: int) -> list[str]:
        """Where the items of a row come from, as `file:line`."""
        return [place for shard, numbers in self._members_of(number) for place in self.shards[shard].places(numbers)]
