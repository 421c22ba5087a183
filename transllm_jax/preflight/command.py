"""`transllm preflight`: whether a run fits a slice of TPUs and how fast it can be, without a TPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from transllm_jax.choices import TRAININGS, Remat
from transllm_jax.config import Config, Training
from transllm_jax.errors import UserError
from transllm_jax.model.mesh import make_layout, mesh_shape, parse_mesh
from transllm_jax.preflight.measure import Measured, measure
from transllm_jax.preflight.program.chips import Topology, parse_topology, topology_devices
from transllm_jax.preflight.programs import (
    STAGES,
    ModelShapes,
    Program,
    generation_programs,
    model_shapes,
    training_program,
)
from transllm_jax.preflight.search import candidates
from transllm_jax.preflight.show import as_json, show, show_assumptions, show_table, show_topology

# How many of a stage's candidates a search compiles: those with the best estimates.
TRIED = 4


@dataclass(frozen=True)
class PreflightOptions:
    """The command line's options; None leaves it to the config."""

    topology: str
    stages: Sequence[str] = ()
    mesh: str | None = None
    batch: int | None = None
    accumulate: int | None = None
    remat: Remat | None = None
    full: bool = False
    search: bool = False
    json: Path | None = None


def preflight(config: Config, workdir: Path, options: PreflightOptions, console: Console) -> bool:
    """Compile, measure and print a run's programs; returns whether all fit.

    Raises UserError for an impossible slice, mesh or batch, and if the model's shape is not known.
    """
    topology = parse_topology(options.topology)
    model = model_shapes(config, workdir, full=options.full)
    stages = _stages(options.stages)
    devices = topology_devices(options.topology)
    show_topology(console, topology)
    found: list[Measured] = []
    # A batch that does not fit the mesh is refused here, not after minutes of compiling another stage.
    programs = {
        stage: list(_programs(model, stage, devices, options))
        for stage in stages
        if not (options.search and stage in TRAININGS)
    }
    # Stages with equal batches have the same program.
    known: dict[tuple[str, float], Measured] = {}
    for stage in stages:
        if options.search and stage in TRAININGS:
            found.append(_best(model, stage, topology, devices, options, console))
            continue
        for program in programs[stage]:
            key = program.about, program.model_flops
            if key not in known:
                console.print(f"{program.stage}: compiling", style="dim")
                known[key] = measure(program, topology)
            found.append(replace(known[key], program=program))
    console.print()
    show_table(console, found)
    for one in found:
        show(console, one)
    show_assumptions(console, next((one for one in found if one.best is not None), found[0]))
    if options.json is not None:
        options.json.write_text(json.dumps([as_json(one) for one in found], indent=2) + "\n", encoding="utf-8")
    return all(one.fits for one in found)


def _stages(given: Sequence[str]) -> Sequence[str]:
    wrong = [stage for stage in given if stage not in STAGES]
    if wrong:
        raise UserError(f"--stage {', '.join(wrong)}: no such stage; use {', '.join(STAGES)}")
    return [stage for stage in STAGES if stage in given] if given else TRAININGS


def _programs(model: ModelShapes, stage: str, devices: list[Any], options: PreflightOptions) -> Iterable[Program]:
    config = model.config
    shape = _mesh(options.mesh, config, len(devices))
    layout = make_layout(shape, config.attention, devices)
    if stage == "generation":
        size = options.batch or max(config.recover.batch_size, layout.batch_parts)
        size = -(-size // layout.batch_parts) * layout.batch_parts
        return generation_programs(model, layout, batch_size=size, prompt=256, new_tokens=config.recover.max_new_tokens)
    section: Training = getattr(config, stage)
    program = training_program(
        model,
        stage,
        layout,
        remat=options.remat or section.remat,
        batch_size=options.batch or section.batch_size,
        accumulate=options.accumulate or section.accumulate,
        length=section.length,
    )
    return [program]


def _mesh(given: str | None, config: Config, devices: int) -> tuple[int, int, int]:
    mesh = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
    if given is not None:
        mesh = {"data": None, "fsdp": None, "tensor": 1, **parse_mesh(given)}
    return mesh_shape(devices, mesh["data"], mesh["fsdp"], mesh["tensor"] or 1)


def _best(
    model: ModelShapes, stage: str, topology: Topology, devices: list[Any], options: PreflightOptions, console: Console
) -> Measured:
    section: Training = getattr(model.config, stage)
    size = options.batch or section.batch_size
    fitting = candidates(model, stage, topology, devices, size, section.length)
    if not fitting:
        raise UserError(
            f"{stage}: no mesh, batch or rematerialisation is estimated to fit {topology.name}; take a larger slice"
        )
    console.print(
        f"{stage}: {len(fitting)} candidates are estimated to fit; the {min(TRIED, len(fitting))} fastest are compiled",
        style="dim",
    )
    tried = [measure(candidate.program, topology) for candidate in fitting[:TRIED]]
    console.print(f"\n{stage}: tried")
    show_table(console, tried)
    # If none fits, the one that lacks the least memory.
    return max(tried, key=lambda one: (one.fits, one.tokens_per_second if one.best else -one.needed))
