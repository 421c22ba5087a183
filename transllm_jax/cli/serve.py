"""`transllm serve`: it parses arguments and calls, nothing else."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from transllm_jax.cli.devices import prepare_jax, require_devices
from transllm_jax.cli.options import English, EnglishBy
from transllm_jax.errors import UserError


class Reasoning(StrEnum):
    """How the English steps of a chain are given."""

    both = "both"
    think = "think"
    none = "none"


def serve(
    model: Annotated[str, typer.Argument(help="A run's directory (or gs://...), or an exported model directory.")],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name; without it, its directory's.")] = None,
    reasoning: Annotated[
        Reasoning,
        typer.Option(help="The English steps: in reasoning_content and reasoning (both), in <think>, or not at all."),
    ] = Reasoning.both,
    slots: Annotated[int, typer.Option(min=1, help="Answers at a time, of each model.")] = 8,
    context: Annotated[int, typer.Option(min=2, help="Most tokens of a prompt and its answer.")] = 2048,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer, if a client says none.")] = 512,
    reasoning_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens for the English steps, on top of the limit that a client gives.")
    ] = 0,
    temperature: Annotated[float, typer.Option(help="If a client says none; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="If a client says none.")] = 1.0,
    english: English = EnglishBy.model,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait, for each model.")] = 64,
    api_key: Annotated[
        str | None, typer.Option(envvar="TRANSLLM_API_KEY", help="What clients have to send.", show_envvar=True)
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Pages of this origin may ask from a browser; * is all.")
    ] = None,
) -> None:
    """Serve a model, and its original beside it, with OpenAI's protocol; a page to talk to it is at /."""
    from transllm_jax.generation.sampling import Sampling

    # First, because it refuses impossible values.
    sampling = Sampling(temperature, top_p)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serve needs {error.name}; pip install 'transllm-jax[serve]'") from None
    prepare_jax()
    require_devices()
    from transllm_jax.commands.serve import ServeOptions
    from transllm_jax.commands.serve import serve as run
    from transllm_jax.serving.app import Settings

    settings = Settings(
        max_new_tokens,
        sampling,
        reasoning.value,
        queue,
        api_key or None,
        tuple(cors or ()),
        reasoning_tokens=reasoning_tokens,
    )
    options = ServeOptions(host, port, name, slots, context, settings=settings, english=english.value)

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        run(model, options, say)
    except KeyboardInterrupt:
        # Before the port was open. Caught here because typer would exit with its own code.
        say("stopped")
