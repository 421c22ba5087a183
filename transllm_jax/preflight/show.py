"""What preflight prints: a table of the programs, then the memory, work and time of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from transllm_jax.preflight.measure import BEST, ORDINARY, Measured
from transllm_jax.preflight.program.chips import GIB, Topology
from transllm_jax.words import size


def mesh_of(found: Measured) -> str:
    """The mesh's axes that are larger than 1, such as `fsdp=16`."""
    mesh = found.program.layout.mesh
    assert mesh is not None
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def show_topology(console: Console, topology: Topology) -> None:
    """Print a line about the slice."""
    chip = topology.chip
    told = (
        f" ({topology.accelerator_type}): {topology.chips} chips on {topology.hosts} "
        f"{'hosts' if topology.hosts > 1 else 'host'}, {chip.peak_flops / 1e12:.0f} TFLOP/s bfloat16, "
        f"{chip.usable_hbm_bytes / GIB:.2f} GiB and {chip.hbm_bandwidth / 1e9:.0f} GB/s of HBM a chip"
    )
    console.print(Text.assemble((topology.name, "bold"), told), soft_wrap=True)


def show_table(console: Console, found: Sequence[Measured]) -> None:
    """Print a row for each program, within the 80 columns that piped output has."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for heading in ("", "mesh", "rows", "remat", "memory", "step", "tok/s/chip", "MFU"):
        left = heading in ("", "mesh", "rows", "remat")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "")
    for one in found:
        table.add_row(*row(one))
    console.print(table)


def row(found: Measured) -> tuple[str | Text, ...]:
    """The cells of a program's row."""
    program = found.program
    start = (program.stage, mesh_of(found), program.rows, program.remat)
    memory = f"{found.needed / GIB:.2f} GiB"
    if not found.fits or found.best is None or found.ordinary is None:
        return (*start, Text(memory, "red"), Text("no room", "red"), "", "")
    a_chip = found.tokens_per_second / found.topology.chips
    utilisation = f"{found.best.mfu:.0%} ({found.ordinary.mfu:.0%})" if program.kept else ""
    return (*start, memory, _seconds(found.best.seconds), f"{a_chip:,.0f}", utilisation)


def show(console: Console, found: Measured) -> None:
    """Print a program's memory and work on a device, and its time."""
    program = found.program
    say = partial(_say, console)
    say(
        "\n",
        (program.stage, "bold"),
        f": {program.about}; mesh {mesh_of(found)} ",
        (f"compiled in {found.seconds:.0f} s", "dim"),
    )
    _show_memory(say, found)
    if found.fits:
        _show_work(say, found)
        _show_speed(say, found)
        assert found.counts is not None
        if found.counts.unexplained:
            say((f"  not counted: {', '.join(found.counts.unexplained[:5])}", "yellow"))


def _say(console: Console, *parts: str | tuple[str, str]) -> None:
    console.print(Text.assemble(*parts), soft_wrap=True)


def _show_memory(say: Callable[..., None], found: Measured) -> None:
    kinds = {kind: amount for kind, amount in found.program.arguments.items() if amount}
    if found.kept:
        kinds["kept for the backward pass"] = found.kept
    # The compiler counts residuals as temporary, and may keep fewer of them.
    kinds["temporary" if not found.kept else "other temporary"] = max(0, round(found.temporary) - found.kept)
    parts = ", ".join(f"{kind} {size(amount)}" for kind, amount in kinds.items())
    room = f"{found.needed / GIB:.2f} of {found.topology.chip.usable_hbm_bytes / GIB:.2f} GiB"
    say("  memory a chip  ", room if found.fits else (f"{room}: it does not fit", "red"), f": {parts}")
    if not found.fits:
        for name, amount in found.buffers():
            say(f"    {size(amount):>10}  {name}")


def _show_work(say: Callable[..., None], found: Measured) -> None:
    counts = found.counts
    assert counts is not None
    flops = found.program.model_flops / found.topology.devices
    say(
        f"  work a chip    {flops / 1e12:.1f} TFLOP of the model's, {counts.flops / 1e12:.1f} executed "
        f"({found.executed:.2f} times), {counts.hbm_bytes / 1e9:.0f} GB of HBM"
    )
    collectives = ", ".join(
        f"{kind} {link / 1e9:.2f} GB in {times:,}"
        for kind, (times, _, link) in sorted(counts.by_kind().items())
        if link > 1e6
    )
    say(f"  links a chip   {collectives or 'nothing'}")


def _show_speed(say: Callable[..., None], found: Measured) -> None:
    program, best, ordinary = found.program, found.best, found.ordinary
    assert best is not None and ordinary is not None
    network = ", ".join(f"{axes} {_seconds(seconds)}" for axes, seconds in best.network.items() if seconds > 1e-4)
    say(
        f"  step           {_seconds(best.seconds)} (bound by {best.bound}): compute {_seconds(best.compute)}, HBM "
        f"{_seconds(best.memory)}, links {network or '0'} ({_seconds(best.exposed)} of it not overlapped)"
    )
    if program.least:
        needed, chip = sum(program.least.values()), found.topology.chip
        shortest = needed / chip.hbm_bandwidth
        kinds = ", ".join(f"{kind} {size(amount)}" for kind, amount in program.least.items())
        say(
            f"  must read      {size(needed)} a chip ({kinds}): {_seconds(shortest)} at {chip.hbm_bandwidth / 1e9:.0f} "
            f"GB/s, {shortest / best.seconds:.0%} of the step"
        )
    if found.kept:
        say(
            f"  utilisation    MFU {best.mfu:.1%}, HFU {best.hfu:.1%} at {BEST:.0%} of the peak while products run; "
            f"MFU {ordinary.mfu:.1%} at {ORDINARY:.0%}"
        )
    say(
        f"  speed          {found.tokens_per_second:,.0f} tokens/s, "
        f"{found.tokens_per_second / found.topology.chips:,.0f} a chip"
    )
    if program.budget:
        seconds = [program.budget / (program.tokens / estimate.seconds) for estimate in (best, ordinary)]
        hours = [found.topology.chips * second / 3600 for second in seconds]
        say(
            f"  budget         {_count(program.budget)} tokens: {_days(seconds[0])} to {_days(seconds[1])}, "
            f"{hours[0]:,.0f} to {hours[1]:,.0f} chip-hours"
        )
    elif found.kept:
        say(
            "  budget         not known before the text is tokenised; for a guess, "
            f"{program.stage}.epochs=null {program.stage}.steps=1000"
        )


def show_assumptions(console: Console, found: Measured) -> None:
    """Print the estimate's assumptions."""
    if found.best is None:
        return
    console.print("\nThe estimate assumes", style="bold")
    for line in found.best.assumptions:
        console.print(f"  - {line}", soft_wrap=True)
    console.print(
        f"  - The numbers in brackets, and the longer times, assume that products run at {ORDINARY:.0%}, as in an "
        "ordinary published run.",
        soft_wrap=True,
    )


def as_json(found: Measured) -> dict[str, Any]:
    """A program's measurements as JSON, with all digits."""
    best, ordinary, counts = found.best, found.ordinary, found.counts
    mesh = found.program.layout.mesh
    assert mesh is not None
    return {
        "stage": found.program.stage,
        "topology": found.topology.name,
        "mesh": dict(mesh.shape),
        "about": found.program.about,
        "fits": found.fits,
        "needed_bytes": found.needed,
        "temporary_bytes": found.temporary,
        "kept_bytes": found.kept,
        "argument_bytes": found.program.arguments,
        "model_flops": found.program.model_flops,
        "executed_ratio": found.executed if counts else None,
        "hbm_bytes": counts.hbm_bytes if counts else None,
        "least_hbm_bytes": found.program.least,
        "collectives": {
            kind: {"executions": times, "result_bytes": result, "link_bytes": link}
            for kind, (times, result, link) in (counts.by_kind() if counts else {}).items()
        },
        "step_seconds": best.seconds if best else None,
        "step_seconds_ordinary": ordinary.seconds if ordinary else None,
        "mfu": best.mfu if best else None,
        "mfu_ordinary": ordinary.mfu if ordinary else None,
        "tokens_per_step": found.program.tokens,
        "tokens_per_second": found.tokens_per_second if best else None,
        "compile_seconds": found.seconds,
    }


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 or not seconds else f"{seconds * 1e6:.0f} us"


def _count(number: float) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e8 else f"{number:,.0f}"


def _days(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds >= 86400 else f"{math.ceil(seconds / 360) / 10:.1f} hours"
