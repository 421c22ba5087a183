"""`transllm preflight`: it parses arguments and calls, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from transllm_jax.choices import Remat
from transllm_jax.errors import UserError

DOES_NOT_FIT = 3
_REMATS = get_args(Remat)


def preflight(
    config: Annotated[Path, typer.Argument(help="A config file, such as configs/llama2_7b_thai.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, such as lora.rank=32", metavar="[KEY=VALUE]...")
    ] = None,
    topology: Annotated[str, typer.Option(help="A TPU slice: v5e:4x4, v4:2x2x4, v5p:2x2x1, v6e:2x2, ...")] = "",
    stage: Annotated[
        list[str] | None, typer.Option(help="pretrain, translate, transfer or generation (the three trainings).")
    ] = None,
    mesh: Annotated[str | None, typer.Option(help="data=2,fsdp=8,tensor=1 in place of the config's mesh.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows in a step, in place of batch_size.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches in a step, in place of accumulate.")
    ] = None,
    remat: Annotated[str | None, typer.Option(help=f"In place of the config's: {', '.join(_REMATS)}.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning of all weights, to compare with.")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Try meshes, batches and rematerialisation; keep the fastest that fits.")
    ] = False,
    workdir: Annotated[Path | None, typer.Option(help="The run's directory, if it has begun.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write all numbers to this file.")] = None,
) -> None:
    """Compile a run's steps for TPUs that are not there: memory, traffic, speed. Exit code 3 if a step does not fit."""
    from transllm_jax.config import load_config

    if not topology:
        raise UserError("--topology is missing; name a slice, such as --topology v5e:4x4")
    if remat is not None and remat not in _REMATS:
        raise UserError(f"--remat {remat}: no such policy; use {', '.join(_REMATS)}")
    settings = load_config(config, overrides or [])
    from transllm_jax.preflight.command import PreflightOptions
    from transllm_jax.preflight.command import preflight as run
    from transllm_jax.progress import plain_console

    options = PreflightOptions(topology, stage or (), mesh, batch, accumulate, remat, full, search, json)  # type: ignore[arg-type]
    if not run(settings, workdir or Path(settings.workdir), options, plain_console()):
        raise typer.Exit(DOES_NOT_FIT)
