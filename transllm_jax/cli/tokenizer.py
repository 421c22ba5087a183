"""The commands `transllm tokenizer ...`: they parse arguments and call, nothing else."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from transllm_jax.cli.stopping import working
from transllm_jax.disk import parse_size
from transllm_jax.errors import UserError

app = typer.Typer(
    help="A vocabulary for another language: learn its tokens, measure what they save.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Language = Annotated[str, typer.Option(help="ISO 639 code or tag: th, vi, zh-Hant, sr-Latn.")]
Scripts = Annotated[
    list[str] | None,
    typer.Option("--script", help="A script by its Unicode name, in place of the language's; repeatable."),
]
Markers = Annotated[
    list[str] | None, typer.Option("--marker", help="A special token to add, such as <EN>; repeatable.")
]


class Cuts(StrEnum):
    """Where a byte-level base's text is cut before it merges."""

    whole = "whole"
    base = "base"


CutsOption = Annotated[
    Cuts | None,
    typer.Option(
        "--cuts",
        help="For a byte-level base: keep runs of the script whole, or cut text as the base does, which takes more "
        "tokens but which llama.cpp also reads (whole; base if the script is Latin).",
    ),
]
WithinWords = Annotated[
    bool,
    typer.Option(
        "--within-words",
        help="Learn no token across the end of a word, in scripts without spaces, too; needs ICU (the extra icu).",
    ),
]
MinCount = Annotated[int, typer.Option(help="How often the corpus must contain a new token.")]
Sample = Annotated[str, typer.Option(help="How much of the corpus to learn from, in bytes of text.")]
Seed = Annotated[int, typer.Option(help="Seed of the sample.")]
Lines = Annotated[bool, typer.Option("--lines", help="Each line is a document (blank lines separate documents).")]
Field = Annotated[
    str | None, typer.Option(help="The field of .jsonl, .json and .parquet with the text (text); a.b is b inside a.")
]
RemoveControls = Annotated[
    bool, typer.Option("--remove-controls", help="Remove control characters from texts instead of refusing them.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@app.command("expand")
def expand(
    base: Annotated[
        str,
        typer.Argument(
            help="A model's or tokenizer's directory, a tokenizer.model or tokenizer.json alone (whatever its name), a "
            ".gguf file, or org/name on the hub."
        ),
    ],
    corpus: Annotated[
        list[str], typer.Argument(help="Text of the language: .txt, .jsonl, .parquet (.gz, .xz, .zst) or globs.")
    ],
    dst: Annotated[Path, typer.Argument(help="The tokenizer directory to write.")],
    size: Annotated[int, typer.Option(help="How many new tokens, not counting markers.")],
    language: Language,
    script: Scripts = None,
    marker: Markers = None,
    min_count: MinCount = 2,
    cuts: CutsOption = None,
    within_words: WithinWords = False,
    sample: Sample = "100MB",
    seed: Seed = 0,
    lines: Lines = False,
    field: Field = None,
    remove_controls: RemoveControls = False,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Text to measure on (the training text); repeatable.")
    ] = None,
    english: Annotated[
        list[str] | None, typer.Option(help="English text, to count how much of it gets other ids; repeatable.")
    ] = None,
    force: Force = False,
) -> None:
    """Add tokens of a language to a tokenizer. The base's ids stay, and AutoTokenizer loads the result."""
    with working() as progress:
        from transllm_jax.commands import tokenizer as tokenizer_commands

        learning = tokenizer_commands.Learning(
            corpus,
            language,
            scripts=script or (),
            markers=marker or (),
            min_count=min_count,
            cuts=None if cuts is None else cuts.value,
            within_words=within_words,
            sample=parse_size(sample),
            seed=seed,
            separator="line" if lines else "blank line",
            controls="remove" if remove_controls else "refuse",
            field=field,
        )
        tokenizer_commands.expand_vocabulary(
            base, dst, size, learning, progress, english=english or (), held_out=held_out or (), force=force
        )


@app.command("report")
def report(
    tokenizer: Annotated[
        str, typer.Argument(help="A tokenizer: anything that BASE of expand can be, or a run's directory.")
    ],
    files: Annotated[
        list[str], typer.Argument(help="Text to measure on: .txt, .jsonl, .parquet (.gz, .xz, .zst) or globs.")
    ],
    base: Annotated[
        str | None, typer.Option(help="What to compare with (what the tokenizer was expanded from, if known).")
    ] = None,
    compare: Annotated[list[str] | None, typer.Option(help="Another tokenizer; repeatable.")] = None,
    curve: Annotated[
        str | None, typer.Option(help="Expand the base by each number of tokens: 500,1000,2000,4000,8000.")
    ] = None,
    corpus: Annotated[list[str] | None, typer.Option(help="What --curve learns from; repeatable.")] = None,
    language: Annotated[str | None, typer.Option(help="For --curve: th, vi, zh-Hant, sr-Latn.")] = None,
    script: Scripts = None,
    min_count: MinCount = 2,
    cuts: CutsOption = None,
    within_words: WithinWords = False,
    sample: Sample = "100MB",
    seed: Seed = 0,
    lines: Lines = False,
    field: Field = None,
    remove_controls: RemoveControls = False,
    out: Annotated[Path | None, typer.Option(help="Plot cost against vocabulary size: a .png, .svg or .pdf.")] = None,
    force: Force = False,
) -> None:
    """Compare tokens per character, byte and word with the base's; --curve helps to choose a size."""
    sizes = parse_numbers(curve) if curve is not None else []
    if curve is not None and (language is None or not corpus):
        raise UserError("--curve learns vocabularies: give --language and --corpus, too")
    if curve is None and (corpus or language is not None or script):
        raise UserError(
            "--corpus, --language and --script are what --curve learns from; give --curve, or leave them out"
        )
    with working() as progress:
        from transllm_jax.commands import tokenizer as tokenizer_commands

        learning = None
        if language is not None:
            learning = tokenizer_commands.Learning(
                corpus or (),
                language,
                scripts=script or (),
                min_count=min_count,
                cuts=None if cuts is None else cuts.value,
                within_words=within_words,
                sample=parse_size(sample),
                seed=seed,
                separator="line" if lines else "blank line",
                controls="remove" if remove_controls else "refuse",
                field=field,
            )
        tokenizer_commands.report_costs(
            [tokenizer, *(compare or ())],
            files,
            progress,
            base=base,
            curve=sizes,
            learning=learning,
            controls="remove" if remove_controls else "refuse",
            field=field,
            out=out,
            force=force,
        )


def parse_numbers(text: str) -> list[int]:
    """Numbers of tokens, such as `500,1000`. Raises UserError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isascii() or not part.isdigit() or int(part) < 1]
    if wrong:
        raise UserError(f"--curve {text}: {', '.join(map(repr, wrong))} is not a number of tokens; write 500,1000,2000")
    return [int(part) for part in parts]
