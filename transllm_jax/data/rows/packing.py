"""Packing: puts several whole examples into each row of a fixed length.

The plan depends only on lengths, so it can be computed, stored and read without the tokens. No example is split:
`transllm_jax.data.rows.examples` has cut or dropped, and counted, what is too long for a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

IGNORED = 0  # label where nothing is predicted; its weight is 0, and its value is never used


# The arrays of packed rows, and of a batch of them.
FIELDS = ("tokens", "positions", "segment_ids", "labels", "weights")


class Rows(Protocol):
    """Rows by index: in memory (`PackedRows`), or planned over a token cache (`data.rows.planned.PlannedRows`)."""

    def __len__(self) -> int: ...

    @property
    def row_length(self) -> int: ...

    @property
    def token_count(self) -> int: ...

    @property
    def padded_fraction(self) -> float: ...

    def row(self, number: int) -> dict[str, np.ndarray]: ...

    def places(self, number: int) -> list[str]: ...


class HasTokens(Protocol):
    """What packing needs of an example (`transllm_jax.data.rows.examples.Example` is one)."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def mask(self) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class PackedRows:
    """R rows of T tokens.

    tokens: int32 [R, T], 0 on padding. positions: int32 [R, T], from 0 in every example, 0 on padding.
    segment_ids: int32 [R, T], 1, 2, ... in a row, 0 on padding. labels: int32 [R, T], the next token of the
    same example, 0 at its last position and on padding. weights: float32 [R, T], 1 where the label is
    trained, else 0.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        shapes = {field.name: getattr(self, field.name).shape for field in fields(self)}
        if len(set(shapes.values())) != 1 or self.tokens.ndim != 2:
            raise ValueError(f"the arrays of packed rows must all be [R, T]: {shapes}")

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def batch(self, first: int, size: int) -> dict[str, np.ndarray]:
        """Rows first .. first + size as [size, T] arrays; a short batch is padded, so that all have the same shape."""
        return {
            field: np.pad(values, [(0, size - len(values)), (0, 0)])
            for field in FIELDS
            for values in [getattr(self, field)[first : first + size]]
        }

    def row(self, number: int) -> dict[str, np.ndarray]:
        """One row's arrays [T], by name."""
        return {field: getattr(self, field)[number] for field in FIELDS}

    def places(self, number: int) -> list[str]:
        """Where the examples of a row come from; here only the row's number is known."""
        return [f"row {number + 1}"]

    @property
    def row_length(self) -> int:
        """T, in tokens."""
        return int(self.tokens.shape[1])

    @property
    def padded_fraction(self) -> float:
        """The share of positions that hold no token, 0 to 1 (0 for no rows)."""
        return float((self.segment_ids == 0).mean()) if self.segment_ids.size else 0.0

    @property
    def token_count(self) -> int:
        """Tokens of all rows, without padding."""
        return int((self.segment_ids > 0).sum())


def plan(lengths: Sequence[int] | np.ndarray, row_length: int, *, window: int = 256) -> list[list[int]]:
    """First-fit: every example goes into the first of at most `window` open rows that has room for it.

    lengths: tokens of each example, 1 to row_length. row_length: T. Returns rows as lists of example indices, in the
    order in which the rows were opened; indices ascend within a row. If no open row has room and `window` rows are
    open, the fullest is closed (the oldest of equally full ones). Deterministic; O(examples x window) in numpy. Raises
    ValueError for an example that no row can hold.
    """
    if row_length < 1 or window < 1:
        raise ValueError(f"row_length and window must be at least 1: {row_length}, {window}")
    rows: list[list[int]] = []
    row_of_slot = np.full(window, -1, np.int64)
    space = np.zeros(window, np.int64)  # by slot: tokens still free in its open row; 0 in a slot without a row
    used = 0
    for index, length in enumerate(np.asarray(lengths, np.int64).tolist()):
        if not 1 <= length <= row_length:
            raise ValueError(f"example {index} has {length} tokens; a row takes 1 to {row_length}")
        fits = space[:used] >= length
        slot = int(fits.argmax()) if used else 0
        if not used or not fits[slot]:
            if used < window:
                slot, used = used, used + 1
            else:
                # The slots are kept in the order of opening, so that "first" means the oldest row.
                closed = int(np.argmin(space))
                space[closed:-1], row_of_slot[closed:-1] = space[closed + 1 :], row_of_slot[closed + 1 :]
                slot = window - 1
            row_of_slot[slot], space[slot] = len(rows), row_length
            rows.append([])
        rows[row_of_slot[slot]].append(index)
        space[slot] -= length
    return rows


def pack(examples: Sequence[HasTokens], row_length: int, *, window: int = 256) -> PackedRows:
    """Pack examples into rows of `row_length` tokens by `plan`. Raises ValueError for an example that is longer."""
    rows = plan([len(example.ids) for example in examples], row_length, window=window)
    return fill(examples, rows, row_length)


def fill(examples: Sequence[HasTokens], rows: Sequence[Sequence[int]], row_length: int) -> PackedRows:
    """The arrays of planned rows: rows [R], lists of example indices -> PackedRows [R, row_length]."""
    shape = (len(rows), row_length)
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    labels = np.full(shape, IGNORED, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, 1):
            ids, mask = examples[index].ids, examples[index].mask
            if ids.shape != mask.shape:
                raise ValueError(f"example {index}: ids {ids.shape} and mask {mask.shape} differ")
            end = start + len(ids)
            if end > row_length:
                raise ValueError(f"row {row} of the plan holds more than {row_length} tokens")
            tokens[row, start:end] = ids
            positions[row, start:end] = np.arange(len(ids))
            segment_ids[row, start:end] = segment
            # The last position of an example predicts nothing: another document follows it.
            labels[row, start : end - 1] = ids[1:]
            weights[row, start : end - 1] = mask[1:] != 0
            start = end
    return PackedRows(tokens, positions, segment_ids, labels, weights)
