"""The commands: they parse and call, nothing else.

Exit codes: 0 done; 2 the input is wrong (one line says what, where and the mend); 75 stopped on request, run again to
go on; 1 a difference that `convert verify` found, or a defect with its traceback.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from transllm_jax import __version__
from transllm_jax.cli_convert import app as convert_app
from transllm_jax.cli_tokenizer import app as tokenizer_app
from transllm_jax.errors import PREEMPTED, Diverged, Preempted, UserError

INPUT_WRONG = 2
# When the process began, nearly: imports are part of a run's time.
STARTED = time.monotonic()

app = typer.Typer(
    help="Move a chat LLM to another language (TransLLM): train, talk to it, take it away.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(convert_app, name="convert")
app.add_typer(tokenizer_app, name="tokenizer")


@app.callback(invoke_without_command=True)
def _global(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"transllm-jax {__version__}")
        raise typer.Exit()


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A config file, such as configs/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, such as pretrain.steps=10", metavar="[KEY=VALUE]...")
    ] = None,
    workdir: Annotated[Path | None, typer.Option(help="Where everything is written (the config's workdir).")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage (and its evaluation).")] = None,
    force: Annotated[str | None, typer.Option(help="Redo this stage and all that builds on it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Prepare all and show what would be trained, how long and in what memory.")
    ] = False,
) -> None:
    """Run all stages, the evaluation and the export; what is done is skipped, what was cut off goes on."""
    from transllm_jax.config import load_config

    settings = load_config(config, overrides or [])
    place = workdir or Path(settings.workdir)
    _prepare_jax()
    from transllm_jax.interrupt import Interrupt
    from transllm_jax.pipeline import plan, run_pipeline
    from transllm_jax.progress import Progress

    if dry_run and (until or force):
        raise UserError("--dry-run trains nothing; leave --until and --force out")
    try:
        if dry_run:
            from transllm_jax.dry_run import show_plan

            with Progress() as progress, Interrupt() as interrupt:
                plan(settings, place, progress, interrupt, show_plan, since=STARTED)
            return
        with Progress() as progress, Interrupt() as interrupt:
            worked = run_pipeline(settings, place, progress, interrupt, until=until, force=force, since=STARTED)
    except KeyboardInterrupt:
        # Asked twice. Caught here: typer would make its own exit code of it.
        raise Preempted("stopped at once, the last checkpoint stands") from None
    if not worked:
        progress.say(f"All is done in {place}; redo a stage with --force STAGE.", markup=False)
    _show_results(progress.console, place)


def _show_results(console: Console, workdir: Path) -> None:
    """The before/after table and one conversation, once there is a report."""
    from transllm_jax.artifacts import read_json

    results = workdir / "evaluation" / "results.json"
    if not (results.exists() and (workdir / "report.html").exists()):
        return
    from transllm_jax.evaluation.report import conversation_panel, summary_table

    found = read_json(results)
    console.print(summary_table(found))
    for goal in found["goals"]:
        mark = {True: "[green]met[/green]    ", False: "[red]not met[/red]"}.get(goal["met"], "not measured")
        console.print(f"{mark} {goal['name']}: {goal['measured']} [dim](wanted: {goal['wanted']})[/dim]")
    console.print(conversation_panel(found))
    console.print(f"report  {workdir / 'report.html'}", soft_wrap=True)
    console.print(f"model   {workdir / 'export'}", soft_wrap=True)
    console.print(f"talk    transllm chat {workdir} --show-chain", soft_wrap=True)


@app.command()
def status(workdir: Annotated[Path, typer.Argument(help="A run's directory.")]) -> None:
    """What is done, what was cut off, what is left."""
    from transllm_jax.status import status_table

    Console().print(status_table(workdir))


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(help="A run's directory, or an exported model directory.")],
    question: Annotated[str | None, typer.Argument(help="Ask this and exit; without it, a conversation.")] = None,
    show_chain: Annotated[bool, typer.Option("--show-chain", help="Show the English steps too.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Talk to the original model, for comparison.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling's mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Talk to a model. /new forgets the conversation, /quit (or Ctrl-D) ends it."""
    _prepare_jax()
    from transllm_jax.chat import open_session, show
    from transllm_jax.generation.sampling import Sampling

    console = Console(highlight=False)
    sampling = Sampling(temperature, top_p, seed)
    session = open_session(model, base=base, max_new_tokens=max_new_tokens, sampling=sampling)
    if question is not None:
        show(console, session.ask(question), show_chain=show_chain)
        return
    console.print(f"[dim]{session.name}; /new forgets, /quit ends[/dim]")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/quit":
            return
        if text == "/new":
            session.history.clear()
        elif text:
            try:
                show(console, session.ask(text), show_chain=show_chain)
            except UserError as error:
                console.print(f"[red]{error}[/red]")
            except KeyboardInterrupt:
                console.print("[dim] stopped[/dim]")


def _prepare_jax() -> None:
    """Keep compiled programs between runs: compiling is what is slow in a short one."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        from conversion.fetch import cache_directory

        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    # Orbax logs the trace of every error before it raises it; what is wrong is said once, in a line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def main() -> None:
    """The entry point `transllm`."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(INPUT_WRONG)
    except Preempted as stop:
        print(f"{stop}; run the same command again to go on", file=sys.stderr)
        sys.exit(PREEMPTED)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" at {error.filename}" if error.filename else ""
        print(f"error: the disk is full{place}; free some space and run the same command again", file=sys.stderr)
        sys.exit(INPUT_WRONG)


if __name__ == "__main__":
    main()
