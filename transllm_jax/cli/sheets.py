"""The commands `transllm evaluate sheets ...`: they parse arguments and call, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transllm_jax.cli.stopping import working

app = typer.Typer(
    help="People compare the answers of two systems, in sheets (xlsx and csv): write these, and read them back.",
    no_args_is_help=True,
)


@app.command()
def write(
    results: Annotated[
        Path, typer.Argument(help="A work directory, or the --out of transllm evaluate: it has the answers.")
    ],
    systems: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SYSTEM]...", help="Their names in the results; by default all. The first meets each."),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the sheets and the key go: a new directory.")],
    annotators: Annotated[int, typer.Option(min=1, help="How many people judge.")],
    suite: Annotated[
        str | None, typer.Option(help="Whose answers, such as mt_bench; needed if the results have several.")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=1, help="How many of them judge each pair of answers; by default all.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="How many questions, drawn at random; by default all.")
    ] = None,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Of three or more systems: each meets each, not the first each.")
    ] = False,
    ratings: Annotated[
        int | None, typer.Option(min=2, max=10, help="Each answer is rated, too: from 1 to this number.")
    ] = None,
    tie: Annotated[
        str, typer.Option(help="The word for a tie in the sheets, such as one of the annotators' language.")
    ] = "tie",
    instructions: Annotated[
        Path | None, typer.Option(help="A text for the annotators, in place of the English one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn and shuffled.")] = 0,
) -> None:
    """Write sheets with pairs of answers, shuffled and without names, and one key that says whose they are."""
    with working() as progress:
        from transllm_jax.commands.sheets import Wanted, form_of
        from transllm_jax.commands.sheets import write as write_sheets

        wanted = Wanted(
            results=results,
            suite=suite,
            systems=systems or (),
            out=out,
            annotators=annotators,
            overlap=overlap,
            questions=questions,
            all_pairs=all_pairs,
            seed=seed,
            form=form_of(tie, ratings, instructions),
        )
        write_sheets(wanted, progress.say)


@app.command()
def read(
    directory: Annotated[Path, typer.Argument(help="What `sheets write` made: it has the key.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="The sheets that came back; by default those in DIRECTORY/sheets."),
    ] = None,
    word: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD=MEANING", help="What annotators wrote for A, B or tie: ดีกว่า=A; repeatable."),
    ] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Leave out rows with problems, rather than end with them.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the suite's results are, if they were moved.")
    ] = None,
) -> None:
    """Read sheets back: win rates, how far people agree with each other and with the judge, the judge corrected."""
    with working() as progress:
        from transllm_jax.commands.sheets import read as read_sheets

        read_sheets(directory, files or (), progress.say, words=word or (), leave_out=leave_out, results=results)
