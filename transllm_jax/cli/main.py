"""The `transllm` commands: they parse arguments and call, nothing else.

Exit codes: 0 done; 2 bad input (one line says what, where and how to fix it); 75 stopped on request, run again to go
on; 1 another process of the run was lost, `convert verify` found a difference, or a defect with its traceback.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from transllm_jax import __version__
from transllm_jax.cli.ablate import ablate
from transllm_jax.cli.convert import app as convert_app
from transllm_jax.cli.devices import prepare_jax, require_devices
from transllm_jax.cli.evaluate import app as evaluate_app
from transllm_jax.cli.generate import generate
from transllm_jax.cli.init import init
from transllm_jax.cli.options import English, EnglishBy
from transllm_jax.cli.preflight import preflight
from transllm_jax.cli.serve import serve
from transllm_jax.cli.tokenizer import app as tokenizer_app
from transllm_jax.errors import LOST, PREEMPTED, Diverged, PeerLost, Preempted, UserError

if TYPE_CHECKING:
    from transllm_jax.config import Config
    from transllm_jax.hosts.runtime import Peers
    from transllm_jax.hosts.site import Site

INPUT_WRONG = 2
# Close to when the process began: a run's time includes its imports.
STARTED = time.monotonic()

# Help lists the commands in the order in which a user comes to need them.
ORDER = ("init", "config", "run", "status", "chat", "generate", "serve", "evaluate", "ablate", "convert", "tokenizer")


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        known = super().list_commands(ctx)
        return [name for name in ORDER if name in known] + [name for name in known if name not in ORDER]


app = typer.Typer(
    cls=_InOrder,
    help="Move a chat LLM to another language (TransLLM): train it, measure it, talk to it, serve it, export it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(convert_app, name="convert")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(evaluate_app, name="evaluate")
# Arguments that are too many are init's to refuse: it knows where they come from.
app.command(context_settings={"allow_extra_args": True})(init)
app.command()(preflight)
app.command()(generate)
app.command()(serve)
app.command()(ablate)


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
    workdir: Annotated[
        str | None, typer.Option(help="Where everything is written (the config's workdir): a directory, or gs://...")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage (and its evaluation).")] = None,
    force: Annotated[str | None, typer.Option(help="Redo this stage and all that builds on it.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="All but the training: show what would be trained, its time, its memory."),
    ] = False,
    profile: Annotated[
        int, typer.Option(min=0, metavar="STEPS", help="Trace this many steps of each training stage, on host 0.")
    ] = 0,
    distributed: Annotated[
        str | None,
        typer.Option(metavar="auto", help="One process on each host of a TPU VM, GKE, SLURM or Open MPI job."),
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="In place of auto: the address of process 0.")
    ] = None,
    processes: Annotated[int | None, typer.Option(metavar="N", help="How many processes the run has.")] = None,
    process: Annotated[int | None, typer.Option(metavar="I", help="The number of this process, from 0.")] = None,
) -> None:
    """Run all stages, the evaluation and the export. Finished steps are skipped; an interrupted one resumes.

    On several hosts, run this command on each, with the same arguments.
    """
    from transllm_jax.hosts.connection import ConnectionOptions, connection_from
    from transllm_jax.hosts.runtime import join

    if workdir is not None and not workdir.strip():
        raise UserError("--workdir has no value; give a directory, or leave it out")
    if dry_run and (until or force or profile):
        raise UserError("--dry-run trains nothing; leave --until, --force and --profile out")
    try:
        with join(
            connection_from(ConnectionOptions(distributed, coordinator, processes, process), os.environ)
        ) as peers:
            # A local directory may have another path on each host, so only a URL has to be equal.
            url = workdir if workdir and "://" in workdir else None
            settings = _settings(peers, config, overrides or [], [url, until, force, dry_run, profile])
            _run(peers, settings, workdir or settings.workdir, until, force, profile, dry_run)
    except KeyboardInterrupt:
        # A second Ctrl-C. Caught here because typer would exit with its own code.
        raise Preempted("stopped at once, the last checkpoint is kept") from None


def _settings(peers: Peers, config: Path, overrides: Sequence[str], options: Sequence[object]) -> Config:
    """Load the config, check that it is the same in all processes, and connect jax."""
    from importlib.metadata import version

    from transllm_jax.config import load_config
    from transllm_jax.config.marks import require_values

    settings = load_config(config, overrides)
    require_values(settings.model_dump(mode="json"), str(config))
    peers.require_equal(
        {
            **{f"the version of {name}": version(name) for name in ("transllm-jax", "jax", "jaxlib")},
            "the config's hash": hashlib.sha256(settings.to_yaml().encode()).hexdigest()[:16],
            "the command's options": " ".join(str(option) for option in options),
        }
    )
    prepare_jax()
    peers.start_jax()
    require_devices()
    if peers.count > 1:
        import jax

        peers.require_equal({"the number of devices": str(jax.local_device_count())})
    return settings


def _run(
    peers: Peers, settings: Config, workdir: str, until: str | None, force: str | None, profile: int, dry_run: bool
) -> None:
    from transllm_jax.hosts.interrupt import Interrupt
    from transllm_jax.hosts.site import Site
    from transllm_jax.progress import Progress
    from transllm_jax.stages.pipeline import plan, run_pipeline
    from transllm_jax.storage import open_workdir

    site = Site(peers.run_primary_first("--workdir", lambda: open_workdir(workdir)), peers)
    with Progress(quiet=not peers.primary) as progress, Interrupt() as interrupt:
        # A live display would redraw over the last line.
        peers.on_peer_loss(lambda: progress.live.stop() if progress.live else None)
        if dry_run:
            from transllm_jax.commands.dry_run import show_plan

            plan(settings, site, progress, interrupt, show_plan, since=STARTED)
            return
        worked = run_pipeline(
            settings, site, progress, interrupt, until=until, force=force, since=STARTED, profile=profile
        )
    if peers.primary:
        if not worked:
            done = f"{until} and all before it are" if until else "All is"
            progress.say(f"{done} done in {site.storage.name}; redo a stage with --force STAGE.")
        _show_results(progress.console, site)


def _show_results(console: Console, site: Site) -> None:
    """Print the before/after table and one conversation, if there is a report."""
    from transllm_jax.disk import read_json

    workdir = site.workdir
    path = workdir / "evaluation" / "results.json"
    if not (path.exists() and (workdir / "report.html").exists()):
        return
    from transllm_jax.evaluation.page.report import asked_lines, conversation_panel, findings_lines, summary_table

    results = read_json(path)
    console.print(summary_table(results))
    for part in asked_lines(results):
        console.print(part)
    for goal in results["goals"]:
        mark = {True: ("met    ", "green"), False: ("not met", "red")}.get(goal["met"], ("not measured", ""))
        measured = f" {goal['name']}: {goal['measured']} "
        console.print(Text.assemble(mark, measured, (f"(wanted: {goal['wanted']})", "dim")))
    if (lines := findings_lines(results.get("findings") or [])) is not None:
        console.print(lines)
    if results.get("asked"):
        console.print(conversation_panel(results, asked=True))
    console.print(conversation_panel(results))
    name = site.storage.name
    console.print(f"report  {name}/report.html", soft_wrap=True)
    console.print(f"model   {name}/export", soft_wrap=True)
    console.print(f"talk    transllm chat {name} --show-chain", soft_wrap=True)


@app.command()
def status(workdir: Annotated[str, typer.Argument(help="A run's directory, or gs://... .")]) -> None:
    """Show which steps are done, what the numbers so far say to do, and the command that comes next."""
    from transllm_jax.commands.status import status_table
    from transllm_jax.progress import plain_console

    plain_console().print(status_table(workdir), crop=False)


@app.command("config")
def explain_config(
    key: Annotated[str | None, typer.Argument(help="A key of the config, such as pretrain or lora.rank.")] = None,
) -> None:
    """Say what the keys of a config mean: types, defaults, units."""
    from transllm_jax.commands.config_keys import described
    from transllm_jax.progress import plain_console

    plain_console().print(described(key))


@app.command()
def chat(
    model: Annotated[
        str,
        typer.Argument(help="A run's directory (or gs://...), or a model: a directory, a .gguf file, org/name."),
    ],
    question: Annotated[str | None, typer.Argument(help="Ask this and exit; without it, a conversation.")] = None,
    show_chain: Annotated[bool, typer.Option("--show-chain", help="Show the English steps too.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Talk to the original model, for comparison.")] = False,
    english: English = EnglishBy.model,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Probability mass of nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a model. In a conversation, /help lists the commands; /quit (or Ctrl-D) ends it.

    Questions may also come through a pipe, one a line; then only answers are printed.
    """
    prepare_jax()
    require_devices()
    from transllm_jax.commands.chat import open_session, show
    from transllm_jax.commands.conversation import Talk, remarks, typed
    from transllm_jax.generation.sampling import Sampling
    from transllm_jax.progress import plain_console

    # What is not UTF-8 is refused question by question.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    console = plain_console()
    sampling = Sampling(temperature, top_p, seed)
    session = open_session(model, base=base, max_new_tokens=max_new_tokens, sampling=sampling, english=english.value)
    try:
        if question is None:
            prompted = console.is_terminal and sys.stdin.isatty()
            Talk(session, console, show_chain=show_chain).run(typed(sys.stdin, prompted=prompted))
            return
        answer = show(console, session.ask(question), show_chain=show_chain, markers=session.chat.markers)
        for remark in [session.name] * session.early + (remarks(answer, show_chain=show_chain) if answer else []):
            print(remark, file=sys.stderr)
    except KeyboardInterrupt:
        # Caught here because typer would exit with its own code.
        print("stopped", file=sys.stderr)
        raise typer.Exit(PREEMPTED) from None


def main() -> None:
    """The entry point `transllm`."""
    # A file's name may not be UTF-8, and a terminal may lack characters: those are printed as escapes.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(INPUT_WRONG)
    except Preempted as stop:
        print(f"{stop}; run the same command again to go on", file=sys.stderr)
        sys.exit(PREEMPTED)
    except (Diverged, PeerLost) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(LOST)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" at {error.filename}" if error.filename else ""
        print(f"error: the disk is full{place}; free some space and run the same command again", file=sys.stderr)
        sys.exit(INPUT_WRONG)


if __name__ == "__main__":
    main()
