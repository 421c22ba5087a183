"""What a stage reports while it trains: metrics, speed, skipped and validation .jsonl files, TensorBoard and a bar.

metrics.jsonl holds only what config and data determine, so that a run that was killed and one that was not write the
same bytes. Times and speeds are in speed.jsonl.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transllm_jax.errors import Diverged
from transllm_jax.progress import Bar
from transllm_jax.training.record.board import Board
from transllm_jax.training.record.metrics import MetricsLog
from transllm_jax.training.step import Metrics


@dataclass(frozen=True)
class Speed:
    """For model FLOPs utilisation: model FLOPs per token, and the peak FLOP/s of all devices together, if known."""

    flops_per_token: float | None = None
    peak_flops: float | None = None


class Reporter:
    """Takes each step's metrics and reports those of the step before, so that the device never waits for the host."""

    def __init__(
        self,
        directory: Path,
        *,
        first: int,
        steps: int,
        log_every: int,
        max_skipped: int,
        skipped_in_a_row: int,
        sources: Sequence[str],
        speed: Speed,
        rate: Callable[[int], Any],
        places: Callable[[int], list[str]],
        memory: Callable[[], int],
        bar: Bar,
    ) -> None:
        """first: the step that the run goes on from. places: where batch k's texts come from, for skipped.jsonl."""
        self._name, self._steps, self._log_every = directory.name, steps, log_every
        self._max_skipped, self._in_a_row = max_skipped, skipped_in_a_row
        self._sources, self._speed, self._rate = sources, speed, rate
        self._places, self._memory, self._bar = places, memory, bar
        self._metrics = MetricsLog(directory / "metrics.jsonl", step=first)
        self._speeds = MetricsLog(directory / "speed.jsonl", step=first)
        self._skipped = MetricsLog(directory / "skipped.jsonl", step=first)
        self._validations = MetricsLog(directory / "validation.jsonl", step=first)
        self._board = Board(directory / "tensorboard", step=first)
        self._waiting: tuple[int, Metrics, int] | None = None
        self._first, self._began = first, 0.0
        # Since the last line of speed.jsonl.
        self._since, self._tokens, self._waited = 0.0, 0, 0.0
        # In total, for the bar and the summary.
        self._all_tokens = 0
        self.loss = math.nan

    @property
    def tokens_per_second(self) -> float:
        """Mean speed of this process, without its first step, which compiles."""
        elapsed = time.perf_counter() - self._began
        return self._all_tokens / elapsed if self._all_tokens else 0.0

    def add(self, number: int, metrics: Metrics, size: int, waited: float) -> None:
        """Take the metrics of step `number`, counted from 0, which was dispatched; report the step before.

        size: tokens in the batch, padding included, of all processes. waited: seconds that the batch was waited for.

        Raises Diverged if too many updates in a row were skipped.
        """
        self.flush()
        self._waiting = (number, metrics, size)
        self._waited += waited

    def flush(self) -> None:
        """Wait for the last step and report it. Raises as `add` does."""
        if self._waiting is None:
            return
        (number, metrics, size), self._waiting = self._waiting, None
        finite = bool(metrics.finite)
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        self.loss = loss if finite else self.loss
        if number == self._first:
            self._began = self._since = time.perf_counter()
        else:
            self._tokens += size
            self._all_tokens += size
        done = number + 1
        if not finite:
            self._skip(done, loss, norm)
        if done % self._log_every == 0 or done == self._steps or not finite:
            self._log(done, finite, loss, norm, metrics, size)
        speed = f"  {self.tokens_per_second:,.0f} tokens/s" if self._all_tokens else ""
        self._bar.update(done, f"loss {loss:.3f}{speed}")
        self._in_a_row = 0 if finite else self._in_a_row + 1
        if self._in_a_row >= self._max_skipped:
            raise Diverged(
                f"{self._name}: the loss or its gradient was not finite in {self._in_a_row} steps in a row, up to step "
                f"{done}; see {self._name}/skipped.jsonl for their texts, lower {self._name}.learning_rate and redo "
                f"the stage with --force {self._name}. Checkpoints stay as they are"
            )

    def validated(self, step: int, bits_per_byte: float, of: str = "") -> None:
        """Record a validation after this many steps. of: identifies the text that was measured."""
        finite = math.isfinite(bits_per_byte)
        row = {"step": step, "bits_per_byte": bits_per_byte if finite else None}
        self._validations.write({**row, "of": of} if of else row)
        self._board.scalars(step, {"validation/bits_per_byte": bits_per_byte})

    def close(self) -> None:
        """Close all files."""
        for log in (self._metrics, self._speeds, self._skipped, self._validations, self._board):
            log.close()

    def _log(self, done: int, finite: bool, loss: float, norm: float, metrics: Metrics, size: int) -> None:
        sums, weights = np.asarray(metrics.source_loss), np.asarray(metrics.source_tokens)
        by_source = {
            name: float(sums[place] / weights[place])
            for place, name in enumerate(self._sources)
            if weights[place] > 0 and math.isfinite(sums[place])
        }
        row = {
            "step": done,
            "loss": loss if finite else None,
            "source_loss": by_source,
            "learning_rate": float(self._rate(done - 1)),
            "gradient_norm": norm if finite else None,
            "trained_tokens": int(metrics.tokens) if math.isfinite(metrics.tokens) else None,
            "padded_fraction": int(metrics.padding) / size,
        }
        self._metrics.write(row)
        now = time.perf_counter()
        speed: dict[str, float] = {"step": done, "memory_bytes": self._memory(), "data_seconds": self._waited}
        if self._tokens:
            speed["tokens_per_second"] = self._tokens / (now - self._since)
            if self._speed.flops_per_token and self._speed.peak_flops:
                used = speed["tokens_per_second"] * self._speed.flops_per_token
                speed["model_flops_utilisation"] = used / self._speed.peak_flops
        self._speeds.write(speed)
        self._since, self._tokens, self._waited = now, 0, 0.0
        numbers = {name: value for name, value in row.items() if isinstance(value, float | int) and name != "step"}
        numbers |= {f"source/{name}": value for name, value in by_source.items()}
        numbers |= {f"speed/{name}": value for name, value in speed.items() if name != "step"}
        self._board.scalars(done, numbers)

    def _skip(self, done: int, loss: float, norm: float) -> None:
        # As text: JSON cannot write numbers that are not finite.
        row = {"step": done, "loss": str(loss), "gradient_norm": str(norm), "rows": self._places(done - 1)}
        self._skipped.write(row)
