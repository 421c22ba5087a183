"""`transllm init`: write the config of a new run, with what was given, sizes that fit, and marks for what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from transllm_jax.commands.config_file import Contents, write_config
from transllm_jax.commands.given_data import (
    HeldOutTexts,
    Looked,
    characters_of,
    hold_out,
    look_at,
    look_at_instructions,
)
from transllm_jax.commands.given_model import look_at_model
from transllm_jax.commands.sizes import MEDIUM, Given, Sizes, cpu_hours, sizes_for
from transllm_jax.config.marks import MARK, marked
from transllm_jax.errors import UserError
from transllm_jax.stages.alignment import check_aligner
from transllm_jax.tokenizer.growing.expand import expand
from transllm_jax.tokenizer.growing.prune import TooLittleText
from transllm_jax.tokenizer.scripts import script_of
from transllm_jax.tokenizer.tokenizer import Tokenizer

# What each option wants, and a run that is too poor in instructions: the paper took 52,000.
WANTED = {
    "--model": "the chat model: a Hugging Face directory, a .gguf file, or a hub name",
    "--text": "text of the language: documents separated by blank lines, .jsonl or .parquet",
    "--pairs": "translation pairs: lines of English<TAB>target, .jsonl, .parquet, or ENGLISH:TARGET, two files",
    "--instructions": "English instructions: jsonl with a field `instruction`, a thousand or more",
}
FEW_INSTRUCTIONS = 500
# Bytes of text whose tokens are learned here, to see how many it supports.
SMALL_TEXT = 1_000_000


@dataclass(frozen=True)
class Answers:
    """What the user gave; None or empty is not given. `text`, `pairs`: paths or globs."""

    language: str
    model: str | None = None
    text: Sequence[str] = ()
    pairs: Sequence[str] = ()
    instructions: str | None = None
    english: str | None = None

    @property
    def missing(self) -> list[str]:
        """The options that a run needs and that were not given."""
        given = (self.model, self.text, self.pairs, self.instructions)
        return [option for option, value in zip(WANTED, given, strict=True) if not value]


@dataclass(frozen=True)
class Written:
    """A config that was written, and what was found. missing: options that were not given. left: keys with a mark."""

    path: Path
    title: str
    found: Mapping[str, str]
    notes: Sequence[str]
    missing: Sequence[str]
    left: Sequence[str]


class Looks:
    """Looks at what was given, at each thing once: a terminal's answer is checked when it is typed, and used later."""

    def __init__(self) -> None:
        self.model, self.source = cache(look_at_model), cache(look_at)
        self.instructions = cache(look_at_instructions)


def new_config(path: Path, answers: Answers, looks: Looks, *, force: bool = False) -> Written:
    """Write the config `path`, and beside it the directory STEM-heldout of texts for the evaluation.

    Raises UserError for an unknown language, for files that cannot be read, for a model that cannot be used, and if the
    config is there already and `force` is not given. Nothing is written then.
    """
    require_free(path, force=force)
    directory = _held_out_directory(path)
    script = script_of(answers.language)
    model = looks.model(answers.model)
    text = [looks.source(given, "text", answers.language, script.scripts) for given in answers.text]
    pairs = [looks.source(given, "pairs", answers.language, script.scripts) for given in answers.pairs]
    english = looks.source(answers.english, "text", "en", ("Latin",)) if answers.english else None
    count, whole, translated = looks.instructions(answers.instructions) if answers.instructions else (0, True, False)
    sizes = sizes_for(
        Given(
            parameters=model.parameters,
            context=model.context,
            text=sum(source.bytes for source in text) or None,
            pairs=sum(source.bytes for source in pairs) or None,
            instructions=count or None,
            characters=characters_of([*text, *pairs]),
        )
    )
    if model.tokenizer is not None:
        sizes = replace(sizes, vocabulary=_supported(sizes.vocabulary, model.tokenizer, answers.language, text, pairs))
    held = hold_out(text, pairs)
    tree = write_config(
        path,
        directory,
        Contents(
            language=answers.language,
            script=script,
            model=model,
            text=text,
            pairs=pairs,
            english=english,
            instructions=answers.instructions,
            translated=translated,
            sizes=sizes,
            held=held,
            missing=answers.missing,
        ),
    )
    found = {"model": model.text if answers.model else ""}
    found |= {"text": "; ".join(source.text for source in text), "pairs": "; ".join(source.text for source in pairs)}
    found["instructions"] = (f"{count:,}" if whole else f"more than {count:,}") if count else ""
    found["held out"] = _held_in_words(held, directory)
    if not answers.missing:
        found["to train"] = _training_in_words(sizes, model.parameters)
    notes = [*(f"{looked.entry['path']}: {note}" for looked in (*text, *pairs) for note in looked.notes)]
    if 0 < count < FEW_INSTRUCTIONS:
        notes.append(f"{count} instructions are few: chains are learned from them; a thousand or more is better")
    try:
        check_aligner()
    except UserError as error:
        notes.append(str(error))
    return Written(path, tree["title"], found, notes, answers.missing, list(marked(tree)))


def check_answer(option: str, given: str, language: str | None, looks: Looks) -> None:
    """Raises UserError if `given` cannot be what the option wants: on a terminal, each answer is checked at once."""
    if option == "--language":
        script_of(given)
    elif option == "--model":
        looks.model(given)
    elif option == "--instructions":
        looks.instructions(given)
    elif language is not None:
        looks.source(given, "text" if option == "--text" else "pairs", language, script_of(language).scripts)


def require_free(path: Path, *, force: bool) -> None:
    """Raises UserError if a config of this name cannot be written, or is there already and `force` is not given."""
    if not path.name:
        raise UserError(f"{str(path)!r} names no file: name the config, such as mine.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: name the config with the ending .yaml, such as {path.with_suffix('.yaml')}")
    for there in (path, _held_out_directory(path)):
        if there.exists() and not force:
            raise UserError(f"{there} is there already; choose another name, or replace it with --force")


def _held_out_directory(path: Path) -> Path:
    return path.with_name(f"{path.stem}-heldout")


def describe(written: Written) -> RenderableType:
    """What was found, what is left to be given, and what comes next."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, what in written.found.items():
        table.add_row(f"  {name}", what or Text("not given yet", "yellow"))
    lines: list[RenderableType] = [Text(f"{written.path}: {written.title}", "bold"), table]
    lines += [Text(f"  note: {note}", "yellow") for note in written.notes]
    if written.missing:
        again = "give these to the same command, with --force: it fills them in, and chooses sizes and held-out texts"
        lines.append(Text(f"\nstill to be given ({MARK} in the file); {again}"))
        wanted = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        wanted.add_column(no_wrap=True)
        wanted.add_column(overflow="fold")
        for option in written.missing:
            wanted.add_row(Text(f"  {option}", "yellow"), WANTED[option])
        lines.append(wanted)
    elif written.left:
        lines.append(
            Text(f"\nstill to be given in the file, where it says {MARK}: {', '.join(written.left)}", "yellow")
        )
    lines.append(Text(f"\n{'then' if written.left else 'next'}:"))
    lines.append(Text(f"  transllm run {written.path} --dry-run   what it trains on, and how long that takes"))
    lines.append(Text(f"  transllm run {written.path}             all stages; the same command resumes"))
    return Group(*lines)


def _supported(size: int, tokenizer: Tokenizer, language: str, text: Sequence[Looked], pairs: Sequence[Looked]) -> int:
    """The number of new tokens, or as many as a small text supports: repetitive text has few that occur twice."""
    sources = [*text, *pairs]
    if (
        not sources
        or not all(source.whole for source in sources)
        or sum(source.bytes for source in sources) > SMALL_TEXT
    ):
        return size
    documents = [item for source in text for item in source.items] + [
        pair[1] for found in pairs for pair in found.items
    ]
    while True:
        try:
            expand(tokenizer, documents, size=size, language=language, markers=[])
        except TooLittleText as error:
            if not 0 < error.supported < size:
                return size
            size = error.supported
        except UserError:
            # The run says what is wrong with it.
            return size
        else:
            return size


def _training_in_words(sizes: Sizes, parameters: int | None) -> str:
    """How much the run trains on, and how long that takes where it was measured: a small model on a CPU."""
    told = f"about {sizes.trained_tokens / 1e6:,.1f} million tokens in three stages"
    if parameters is None or parameters >= MEDIUM:
        return f"{told}; transllm preflight says how long on a slice of TPUs"
    fast, slow = (_about(hours) for hours in cpu_hours(parameters, sizes.trained_tokens))
    return f"{told}: {fast} to {slow} on two CPU cores, without answers and evaluations"


def _about(hours: float) -> str:
    if hours < 1:
        minutes = round(60 * hours)
        return f"{minutes} minutes" if minutes > 1 else "a minute"
    return f"{hours:.1f} hours" if hours < 10 else f"{hours:.0f} hours" if hours < 72 else f"{hours / 24:.0f} days"


def _held_in_words(held: HeldOutTexts, directory: Path) -> str:
    counts = {"documents": len(held.documents), "pairs": len(held.pairs), "questions": len(held.questions)}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{told}, in {directory}" if told else ""
