"""Validation during training: bits per byte on held-out rows, the best step so far, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transllm_jax.model.parameters import Flat


@dataclass(frozen=True)
class Watch:
    """`measure` gives bits per byte, every `every` steps.

    patience: training ends after this many measurements without a new best. of: says what is measured; measurements of
    something else are not compared with these.
    """

    measure: Callable[[Flat], float]
    every: int
    patience: int | None = None
    of: str = ""


class Validation:
    """The measurements of a training so far. Without a watch it measures nothing and is never due."""

    def __init__(self, watch: Watch | None, earlier: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> None:
        """earlier: the lines of validation.jsonl so far. say: is told where some are of other rows."""
        self.watch = watch
        if watch is None:
            self._alike: list[Mapping[str, Any]] = []
        else:
            self._alike = [row for row in earlier if row.get("of", "") == watch.of]
            others = [row["step"] for row in earlier if row not in self._alike]
            if others:
                say(
                    f"  validations up to step {max(others)} were of other rows; the best checkpoint is sought among "
                    "those that are measured on the rows of now",
                )
        self._scores = [math.inf if row["bits_per_byte"] is None else row["bits_per_byte"] for row in self._alike]

    @property
    def of(self) -> str:
        """What is measured."""
        return "" if self.watch is None else self.watch.of

    @property
    def steps(self) -> Iterable[int]:
        """The steps whose measurements count."""
        return [row["step"] for row in self._alike]

    def due(self, done: int, last: bool) -> bool:
        """Whether to measure after this many steps."""
        return self.watch is not None and (last or done % self.watch.every == 0)

    def measure(self, trainable: Flat) -> float:
        """Bits per byte of the arrays that train; it may be not finite."""
        assert self.watch is not None
        measured = self.watch.measure(trainable)
        self._scores.append(measured if math.isfinite(measured) else math.inf)
        return measured

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` measurements were no better than the best before them."""
        patience = None if self.watch is None else self.watch.patience
        if not self._scores or patience is None:
            return False
        return len(self._scores) - 1 - self._scores.index(min(self._scores)) >= patience
