"""The sources of a training stage as rows by index: tokenised once, cleaned, planned, read from the cache."""

from __future__ import annotations

from transllm_jax.config import Cleaning, Source
from transllm_jax.data.cleaning import Rules
from transllm_jax.data.planned import Choice, PlannedRows
from transllm_jax.data.tokenise import tokenise
from transllm_jax.data.transform import Transform
from transllm_jax.errors import UserError
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.scripts import script_of

# Bytes on disk of a source whose tokenising is stopped on request.
LARGE = 16 << 20


def planned_rows(run: Run, stage: str, source: Source, length: int) -> PlannedRows:
    """The rows of a source for a stage; says what was left out of it.

    Raises UserError with file and line for what is wrong in it, and where nothing is left; and Preempted when asked to
    stop: the shards that are whole stay.
    """
    cleaning = source.cleaning
    transform = Transform(
        content=source.format,
        length=length,
        markers=run.markers,
        rules=_rules(run, cleaning),
        evaluation=run.evaluation_texts if cleaning.contamination else None,
        exact=cleaning.exact_duplicates,
        near=cleaning.near_duplicates is not None,
    )
    rows = _rows(run, stage, source, transform)
    if unchecked := rows.counts.get("unchecked"):
        run.progress.say(
            f"  [yellow]{stage}: {unchecked:,} items of {source.path} have a part in common with very many others and "
            "were not compared with all of them; they are kept"
        )
    return rows


def validation_rows(run: Run, stage: str, source: Source, length: int) -> PlannedRows:
    """The rows of held-out text: as the stage's own, and nothing left out but what no row can hold."""
    transform = Transform(content=source.format, length=length, markers=run.markers, exact=False)
    return _rows(run, stage, source, transform)


def _rows(run: Run, stage: str, source: Source, transform: Transform) -> PlannedRows:
    shards = run.shards(source)
    total = sum(shard.size for shard in shards)
    long = total >= LARGE or not all(shard.size for shard in shards)  # a size of 0 is not known
    with (
        run.ledger.spend("data"),
        run.progress.task(f"{stage}: tokens of {source.path}", total=max(total, 1), unit="byte") as bar,
    ):

        def tell(done: int, items: int) -> None:
            bar.update(done, f"{items:,} {_UNITS[source.format]}")
            # What takes seconds is finished, so that it need not be done again.
            if long:
                run.interrupt.check(f"{stage}: tokenising")

        tokens = tokenise(shards, transform, run.tokenizer("vocabulary"), source.controls, run.token_cache, tell=tell)
        choice = Choice(
            row_length=transform.length,
            tokens=source.tokens,
            exact=transform.exact,
            near=source.cleaning.near_duplicates if transform.near else None,
            seed=run.config.seed,
        )
        rows = PlannedRows(tokens, choice, run.token_cache)
    if not len(rows):
        gone = ", ".join(f"{count:,} {reason}" for reason, count in left_out(rows).items())
        raise UserError(
            f"{stage}: nothing of {source.path} is left to train on ({rows.counts['items']:,} {_UNITS[source.format]}: "
            f"{gone or 'none'}): give it more text, or loosen cleaning, tokens or length"
        )
    return rows


_UNITS = {"text": "documents", "pairs": "pairs", "conversations": "conversations"}
# Counts of a source that say that something was left out, or changed.
_LEFT_OUT = (
    "too short",
    "too long",
    "other script",
    "contaminated",
    "exact duplicates",
    "near duplicates",
    "over the budget",
    "longer than a row",
    "cut at a turn",
)


def left_out(rows: PlannedRows) -> dict[str, int]:
    """What was left out of a source, by reason; only what there was."""
    return {reason: rows.counts[reason] for reason in _LEFT_OUT if rows.counts.get(reason)}


def _rules(run: Run, cleaning: Cleaning) -> Rules:
    scripts: tuple[str, ...] = ()
    if cleaning.min_script_share:
        script = script_of(run.config.language.code, run.config.language.scripts)
        scripts = tuple(script.scripts)
    return Rules(
        min_characters=cleaning.min_characters,
        max_characters=cleaning.max_characters,
        scripts=scripts,
        min_script_share=cleaning.min_script_share,
    )
