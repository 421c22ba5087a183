"""The commands `transllm evaluate ...`: they parse arguments and call, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from transllm_jax.cli.devices import prepare_jax, require_devices
from transllm_jax.cli.sheets import app as sheets_app
from transllm_jax.errors import Preempted

DEFAULT = "suites"
_JUDGE: dict[str, Any] = {"rich_help_panel": "Judge"}


class _WithDefault(TyperGroup):
    """A group that takes words which name no command as the arguments of the default one, and no words as well."""

    default = DEFAULT

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


class _NamedAsItsGroup(typer.Context):
    """The context of the default command, which is written without its own name."""

    @property
    def command_path(self) -> str:
        """What help and errors say was called."""
        return super().command_path if self.parent is None else self.parent.command_path


class _Default(TyperCommand):
    context_class = _NamedAsItsGroup


app = typer.Typer(
    cls=_WithDefault,
    help="Measure models, servers and files of answers: suites, with intervals, side by side.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _group() -> None:
    """The group's own options: none."""


@app.command(
    DEFAULT,
    cls=_Default,
    no_args_is_help=True,
    epilog="`transllm evaluate sheets` makes sheets for people: see its --help.",
)
def suites(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="SYSTEM",
            help="WORKDIR, WORKDIR#original, WORKDIR#POINT, a model directory, URL#MODEL, answers:FILE or "
            "bridge:WORKDIR; NAME=SYSTEM names it. The others are compared with the first.",
        ),
    ],
    suite: Annotated[
        list[str],
        typer.Option(
            help="answers, perplexity, translation, retention, mt_bench, alpaca_eval, questions, safety; several with "
            "commas."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where results go: by default evaluation/suites in the first work directory that is measured; "
            "without one, evaluation in the current directory.",
        ),
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SUITE=]FILE",
            help="Questions with known answers, or open ones for a judge; SUITE=FILE for one suite alone; repeatable.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text in the target language, for perplexity; repeatable.")
    ] = None,
    english_text: Annotated[list[str] | None, typer.Option(help="Text in English, the same.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="English<TAB>target lines, for translation.")] = None,
    instructions: Annotated[
        Path | None, typer.Option(help="English instructions (jsonl), for retention: what the original answers.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="The target language's code, such as th, where no work directory says it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first questions, texts or pairs only.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens in an answer, chain included.")] = None,
    max_answer_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens in a short English answer.")] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For servers: key=ENVIRONMENT_VARIABLE, concurrency=8, timeout=600, body={...}; repeatable.",
        ),
    ] = None,
    translator: Annotated[
        str | None, typer.Option(metavar="SYSTEM", help="What translates for bridge:, such as URL#MODEL.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers of a local model at a time.")] = 32,
    contamination: Annotated[
        bool, typer.Option(help="Whether questions are looked for in the training data of the run.")
    ] = True,
    judge: Annotated[
        str | None,
        typer.Option(metavar="URL#MODEL", help="Who judges: a server's model, or a local one.", **_JUDGE),
    ] = None,
    judge_endpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For the judge's server: as --endpoint; repeatable.", **_JUDGE),
    ] = None,
    judge_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a verdict.", **_JUDGE)] = 2048,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="SYSTEM", help="What answers are compared with, in pairs and both orders.", **_JUDGE),
    ] = None,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="fastchat, or transllm-as-published.", **_JUDGE)
    ] = "fastchat",
    references: Annotated[
        str, typer.Option(metavar="NAME", help="For mt_bench: corrected, gpt4 or none.", **_JUDGE)
    ] = "corrected",
    reference_file: Annotated[
        Path | None, typer.Option(help="For mt_bench: FastChat's reference_answer/gpt-4.jsonl.", **_JUDGE)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Verdicts on each answer or pair.", **_JUDGE)] = 1,
    asked_in: Annotated[
        str | None,
        typer.Option(metavar="LANGUAGE", help="target or english; by default as the file says.", **_JUDGE),
    ] = None,
    max_cost: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help="Most tokens (200000, 2M), or money with --judge-prices.", **_JUDGE),
    ] = None,
    judge_prices: Annotated[
        str | None,
        typer.Option(metavar="IN/OUT", help="Of a million tokens, read and written, such as 2.5/10.", **_JUDGE),
    ] = None,
    judge_is_system: Annotated[
        bool, typer.Option("--judge-is-system", help="Let a judge judge its own answers.", **_JUDGE)
    ] = False,
) -> None:
    """Run suites on systems. The same command goes on with what a stopped or killed one left.

    Files that are not given are those of the first work directory's config.
    """
    prepare_jax()
    require_devices()
    from transllm_jax.commands.evaluate import Given, evaluate, questions_given
    from transllm_jax.commands.open_judge import JudgeGiven
    from transllm_jax.progress import Progress

    for_all, for_one = questions_given(questions or ())
    given = Given(
        systems=systems,
        suites=[name for names in suite for name in names.split(",") if name],
        out=out,
        questions=for_all,
        questions_of=for_one,
        text=tuple(text or ()),
        english_text=tuple(english_text or ()),
        pairs=pairs,
        instructions=instructions,
        language=language,
        limit=limit,
        max_new_tokens=max_new_tokens,
        max_answer_tokens=max_answer_tokens,
        endpoint=tuple(endpoint or ()),
        translator=translator,
        batch_size=batch_size,
        contamination=contamination,
        judge=JudgeGiven(
            judge=judge,
            endpoint=tuple(judge_endpoint or ()),
            max_tokens=judge_tokens,
            preset=preset,
            repeats=repeats,
            references=references,
            reference_file=reference_file,
            baseline=baseline,
            max_cost=max_cost,
            prices=judge_prices,
            is_system=judge_is_system,
            asked_in=asked_in,
        ),
    )
    try:
        with Progress() as progress:
            evaluate(given, progress)
    except KeyboardInterrupt:
        # A second Ctrl-C. Caught here because typer would exit with its own code.
        raise Preempted("stopped at once, what was answered is kept") from None


app.add_typer(sheets_app, name="sheets")
