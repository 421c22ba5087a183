"""`transllm run --dry-run`: do all but the training; print what a run would train on, how long and in what memory.

The base model, the vocabulary and the tokenised text are made and kept: a later run starts from them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice, pairwise
from typing import Any

import jax
import numpy as np
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from transllm_jax.stages import pretrain, transfer, translate
from transllm_jax.stages.chains import CHAINS
from transllm_jax.stages.run import Run
from transllm_jax.stages.training import Job, prepare, section_of
from transllm_jax.tokenizer.tokenizer import Tokenizer
from transllm_jax.training.loop import step_of
from transllm_jax.training.optimizer import make_optimizer
from transllm_jax.training.placement import Placement
from transllm_jax.training.step import initial_state
from transllm_jax.words import duration, size

STAGES = {"pretrain": pretrain, "translate": translate, "transfer": transfer}
# Rows shown of each stage, characters shown of each row, and steps that are timed.
ROWS, CHARACTERS, STEPS = 10, 400, 3
# Printed around text that is trained on, and between two texts in a row.
TRAINED, BETWEEN = ("⟦", "⟧"), " ┃ "


@dataclass(frozen=True)
class Cost:
    """What a step costs: bytes of frozen arrays, trained arrays, optimizer state and temporary arrays, on one device;
    and seconds, None if there is too little memory to run it."""

    frozen: int
    trainable: int
    optimizer: int
    temporary: int
    seconds: float | None

    @property
    def memory(self) -> int:
        """Total bytes on each device."""
        return self.frozen + self.trainable + self.optimizer + self.temporary


def show_plan(run: Run) -> None:
    """Print the plan of the three training stages. Stage `vocabulary` must be done."""
    console, say = run.progress.console, run.progress.say
    total: float | None = 0.0
    unknown = ""
    for name, stage in STAGES.items():
        missing = name == "transfer" and not (run.workdir / "recover" / CHAINS).is_file()
        if missing and section_of(run, name).steps is None:
            unknown = f", and stage {name} has more steps once its chains are known"
        console.print(f"\n{name}", style="bold")
        if section_of(run, name).steps == 0:
            say("  0 steps: left out")
            continue
        parts = stage.parts(run) if not missing else transfer.known_parts(run)
        if missing:
            say("  chains and English answers are known after stage recover: not counted here", style="yellow")
        if not parts:
            continue
        job = prepare(run, name=name, start="vocabulary", parts=parts)
        console.print(_sources(job))
        cost = measure(job)
        total = None if total is None or cost.seconds is None else total + cost.seconds * job.config.optimizer.steps
        _say_steps(say, job, name, cost)
        say(f"  the first {ROWS} rows, with {TRAINED[0]} {TRAINED[1]} around what the loss counts")
        for source, row in islice(_rows(job), ROWS):
            console.print(Text(f"    {source}", style="cyan"))
            # Padding indents the wrapped lines of a long row, too.
            console.print(Padding(shown(row, run.models.tokenizer("vocabulary")), (0, 0, 0, 6), expand=False))
    if total:
        # The rows above have scrolled the times away.
        left_out = "stage recover, evaluations, compiling and saving"
        least = "at least " if unknown else ""
        say(f"\ntraining takes {least}{duration(total)} on this machine, without {left_out}{unknown}")


def _sources(job: Job) -> Table:
    """One row per source. What cleaning left out was printed when the source was read."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("  source", "items", "tokens", "rows", "padded", "share", "epochs"):
        first = heading == "  source"
        table.add_column(heading, justify="left" if first else "right", overflow="fold", no_wrap=not first)
    epochs, shares = job.batches.epoch(job.config.optimizer.steps), job.batches.shares
    for part in job.parts:
        summary = part.summary
        table.add_row(
            Padding(part.name, (0, 0, 0, 2)),
            f"{summary['items']:,}" if "items" in summary else "",
            f"{summary['tokens']:,}",
            f"{summary['rows']:,}",
            f"{summary['padded_fraction']:.1%}",
            f"{shares[part.name]:.0%}",
            f"{epochs[part.name]:.2f}",
        )
    return table


def _say_steps(say: Callable[..., None], job: Job, name: str, cost: Cost) -> None:
    config, length = job.config, job.parts[0].rows.row_length
    steps, rows = config.optimizer.steps, job.batches.batch_size
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    say(
        f"  {steps:,} steps of {rows} x {length} tokens{parts}: {steps * rows * length:,} tokens; "
        f"warm-up over {config.optimizer.warmup_steps:,}, then {config.optimizer.schedule}"
    )
    say(
        f"  memory {size(cost.memory)} a device: frozen {size(cost.frozen)}, trained {size(cost.trainable)}, "
        f"optimizer {size(cost.optimizer)},\n    in a step {size(cost.temporary)} (rematerialisation: {config.remat})"
    )
    if cost.seconds is None:
        lower = f"lower {name}.batch_size or use remat"
        say(f"  no step was timed: this machine has too little memory; {lower}", style="yellow")
        return
    speed = rows * length / cost.seconds
    step = f"{cost.seconds:.2f} s" if cost.seconds >= 0.1 else f"{1000 * cost.seconds:.1f} ms"
    apart = "compiling, saving and validation" if job.watch is not None else "compiling and saving"
    say(
        f"  {step} a step measured here, {speed:,.0f} tokens/s: {duration(steps * cost.seconds)} in all,\n"
        f"    without {apart}"
    )


def measure(job: Job) -> Cost:
    """Compile the step for a real batch, and time it."""
    config, size = job.config, job.batches.batch_size
    placement = Placement(job.split.layout, config.accumulate)
    step = step_of(config, job.split)
    make = partial(initial_state, optimizer=make_optimizer(config.optimizer))
    state, frozen = placement.initial(make, job.split.trainable), job.split.frozen
    batch = placement.to_devices(job.batches[0], size)
    compiled: Any = step.lower(state, frozen, batch).compile()  # type: ignore[attr-defined]
    known = compiled.memory_analysis()
    held, trained, moments = (
        sum(_local(leaf) for leaf in jax.tree.leaves(tree)) for tree in (frozen, state.trainable, state.optimizer)
    )
    temporary = int(known.temp_size_in_bytes) if known is not None else 0
    free = placement.free_memory()
    if free is not None and temporary > free:
        return Cost(held, trained, moments, temporary, None)
    seconds = []
    for number in range(STEPS):
        batch = placement.to_devices(job.batches[number], size)
        started = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready(metrics.loss)
        seconds.append(time.perf_counter() - started)
    return Cost(held, trained, moments, temporary, statistics.median(seconds[1:]))


def _local(array: jax.Array) -> int:
    """An array's bytes on one device."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _rows(job: Job) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The training's rows in order, each with the name of its source."""
    for number in count():
        arrays = job.batches[number]
        for place in range(job.batches.batch_size):
            row = {field: values[place] for field, values in arrays.items()}
            yield job.batches.names[int(row["sources"])], row


def shown(row: dict[str, np.ndarray], tokenizer: Tokenizer) -> Text:
    """A row's text: trained parts between ⟦ and ⟧, a bar between texts that share the row; cut to CHARACTERS."""
    text, tokens = Text(), int((row["segment_ids"] > 0).sum())
    for segment in range(1, int(row["segment_ids"].max(initial=0)) + 1):
        places = np.flatnonzero(row["segment_ids"] == segment)
        # A token's weight is at the position that predicts it: the one before.
        trained = np.concatenate([[False], row["weights"][places[:-1]] > 0])
        edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(places)]
        if segment > 1:
            text.append(BETWEEN, "yellow")
        for first, last in pairwise(edges):
            words = tokenizer.decode(row["tokens"][places[first:last]].tolist()).replace("\n", "↵")
            if trained[first]:
                text.append(TRAINED[0] + words + TRAINED[1], "green")
            else:
                text.append(words, "dim")
        if len(text) > CHARACTERS:
            text = text[:CHARACTERS]
            text.append(f"… ({tokens} tokens)", "dim")
            break
    return text
