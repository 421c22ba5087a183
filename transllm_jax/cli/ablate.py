"""`transllm ablate`: it parses arguments and calls, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transllm_jax.cli.devices import prepare_jax, require_devices


def ablate(
    config: Annotated[Path, typer.Argument(help="A config file, such as configs/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, for all variants", metavar="[KEY=VALUE]...")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only these variants: a,b, or once for each.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="The seeds, such as 0,1,2.")] = "0,1,2",
    out: Annotated[
        Path | None, typer.Option(help="Where everything is written (the config's workdir, with -ablation).")
    ] = None,
    writer: Annotated[
        Path | None, typer.Option(help="Instructions and another writer's answers, for variants without Recovery KD.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model, with a chat template, for base-model and chat-vector.")
    ] = None,
    others: Annotated[
        list[Path] | None, typer.Option("--with", metavar="FILE", help="Another machine's ablation.json.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the page here, too, with its plot beside it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs, what they share, and the time.")] = False,
) -> None:
    """Run a config's ablations and rivals, and compare them; finished and common steps are not run twice.

    The same command goes on with what a stopped or killed one left.
    """
    prepare_jax()
    require_devices()
    from transllm_jax.commands.ablate import AblateOptions
    from transllm_jax.commands.ablate import ablate as carry_out
    from transllm_jax.errors import LOST, Preempted, UserError
    from transllm_jax.hosts.interrupt import Interrupt
    from transllm_jax.progress import Progress

    try:
        numbers = [int(seed) for seed in seeds.replace(",", " ").split()]
    except ValueError:
        raise UserError(f"--seeds {seeds!r} is not a list of numbers, such as 0,1,2") from None
    given = {"writer": None if writer is None else str(writer), "base_model": base_model}
    options = AblateOptions(
        only=[name.strip() for names in only or () for name in names.split(",")],
        seeds=numbers,
        out=out,
        given={name: value for name, value in given.items() if value is not None},
        others=others or (),
        markdown=markdown,
        dry_run=dry_run,
    )
    try:
        with Progress() as progress, Interrupt() as interrupt:
            failed = carry_out(config, overrides or [], options, progress, interrupt)
    except KeyboardInterrupt:
        # A second Ctrl-C. Caught here because typer would exit with its own code.
        raise Preempted("stopped at once, the last checkpoint is kept") from None
    if failed:
        raise typer.Exit(LOST)
