"""`transllm generate`: it parses arguments and calls, nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from transllm_jax.cli.devices import prepare_jax, require_devices
from transllm_jax.cli.options import English, EnglishBy
from transllm_jax.errors import PREEMPTED


def generate(
    model: Annotated[
        str,
        typer.Argument(help="A run's directory (or gs://...), or a model: a directory, a .gguf file, org/name."),
    ],
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Records, one JSON object a line: messages, prompt or instruction.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where the answers are written, a line each.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Probability mass of nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="How many likely tokens are sampled from; 0 is all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least share of the likeliest token's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: fewer repetitions.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 32,
    base: Annotated[bool, typer.Option("--base", help="Ask the original model.")] = False,
    english: English = EnglishBy.model,
    share: Annotated[
        str, typer.Option(metavar="I/N", help="Answer every Nth record only: one of N machines, from 1/N to N/N.")
    ] = "1/1",
) -> None:
    """Answer a file of prompts. The same command goes on with what a stopped or killed one left."""
    from transllm_jax.generation.sampling import Sampling

    # First, because it refuses impossible values.
    sampling = Sampling(temperature, top_p, seed, top_k, min_p, repetition_penalty)
    prepare_jax()
    require_devices()
    from transllm_jax.commands.generate import GenerateOptions, parse_share
    from transllm_jax.commands.generate import generate as answer
    from transllm_jax.progress import Progress

    options = GenerateOptions(max_new_tokens, sampling, batch_size, base, parse_share(share), english.value)
    try:
        with Progress() as progress:
            answer(model, source, target, options, progress)
    except KeyboardInterrupt:
        # Caught here because typer would exit with its own code.
        print("stopped; the same command goes on with what is there", file=sys.stderr)
        raise typer.Exit(PREEMPTED) from None
