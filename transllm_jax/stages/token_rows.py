"""The sources of a training stage as rows by index: tokenised once, cleaned, planned, read from the cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from transllm_jax.config import Cleaning, Source
from transllm_jax.data.clean.cleaning import Rules
from transllm_jax.data.read.shards import PLURAL, Shard
from transllm_jax.data.rows.instructions import Instructions
from transllm_jax.data.rows.planned import IGNORED as _IGNORED
from transllm_jax.data.rows.planned import SKIPPED as _SKIPPED
from transllm_jax.data.rows.planned import PlannedRows, Selection, plan_path
from transllm_jax.data.rows.token_cache import ShardTokens, records_path, shard_path
from transllm_jax.data.rows.tokenise import OnProgress, tokenise
from transllm_jax.data.rows.transform import Transform
from transllm_jax.errors import UserError
from transllm_jax.stages.bad_rows import BAD_ROWS
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.scripts import script_of

# Tokenised text, in the work directory.
TOKENS = "tokens"
# Bytes on disk of a source whose tokenising is stopped on request.
LARGE = 16 << 20
# Shards that are tokenised before they are copied to a store.
TOGETHER = 64


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
        evaluation=run.inputs.evaluation_texts if cleaning.contamination else None,
        exact=cleaning.exact_duplicates,
        near=cleaning.near_duplicates is not None,
    )
    rows = _rows(run, stage, source, transform)
    if unchecked := rows.counts.get("unchecked"):
        run.progress.say(
            f"  {stage}: {unchecked:,} items of {source.path} have a part in common with very many others and "
            "were not compared with all of them; they are kept",
            style="yellow",
        )
    return rows


def chain_rows(run: Run, stage: str, source: Source, length: int) -> PlannedRows:
    """The rows of conversations that the run made itself: they hold the chain's markers, and nothing is cleaned."""
    transform = Transform("conversations", length, run.markers, exact=False, holds_markers=True)
    return _rows(run, stage, source, transform)


def instruction_rows(run: Run, stage: str, pairs: Source, length: int, *, contamination: bool) -> PlannedRows:
    """The rows of translation instructions, made of pairs.

    contamination: leave out pairs that hold an evaluation text.
    """
    prompts, language = run.config.prompts, run.config.language.name
    transform = Transform(
        "pairs",
        length,
        run.markers,
        Instructions(tuple(prompts.to_target), tuple(prompts.to_english), language),
        evaluation=run.inputs.evaluation_texts if contamination else None,
        exact=False,
    )
    return _rows(run, stage, pairs, transform)


def validation_rows(run: Run, stage: str, source: Source, length: int) -> PlannedRows:
    """The rows of held-out text: as the stage's own, and nothing left out but what no row can hold."""
    transform = Transform(content=source.format, length=length, markers=run.markers, exact=False)
    return _rows(run, stage, source, transform)


def _rows(run: Run, stage: str, source: Source, transform: Transform) -> PlannedRows:
    shards = run.inputs.shards(source)
    total = sum(shard.size for shard in shards)
    long = total >= LARGE or not all(shard.size for shard in shards)  # a size of 0 is not known
    with (
        run.ledger.spend("data"),
        run.progress.task(f"{stage}: tokens of {source.path}", total=max(total, 1), unit="byte") as bar,
    ):

        def tell(done: int, items: int) -> None:
            bar.update(done, f"{items:,} {PLURAL[source.format]}")
            # What takes seconds is finished, so that it need not be done again.
            if long:
                run.interrupt.check(f"{stage}: tokenising")

        cache = _Cache(run)
        tokens = cache.tokens(shards, transform, source, tell)
        choice = Selection(
            row_length=transform.length,
            tokens=source.tokens,
            exact=transform.exact,
            near=source.cleaning.near_duplicates if transform.near else None,
            seed=run.config.seed,
        )
        rows = cache.rows(tokens, choice)
    bad = [row for shard in tokens if shard.skipped for row in shard.bad_rows()]
    run.bad_rows.note(stage, source, rows.counts["items"], _named(rows, _SKIPPED), bad)
    if ignored := _named(rows, _IGNORED):
        what = ", ".join(f"{name} ({count:,})" for name, count in sorted(ignored.items()))
        run.progress.say(f"  {stage}: fields of {source.path} that are not read: {what}")
    if not len(rows):
        gone = ", ".join(f"{count:,} {reason}" for reason, count in left_out(rows).items())
        raise UserError(
            f"{stage}: nothing of {source.path} is left to train on ({rows.counts['items']:,} {PLURAL[source.format]}: "
            f"{gone or 'none'}): give it more text, or loosen cleaning, tokens or length"
        )
    return rows


class _Cache:
    """The token cache of a run: in one directory for all of its processes, on its store, or each process's own.

    Where it is not each one's own, each process tokenises its part of the shards.
    """

    def __init__(self, run: Run) -> None:
        given = run.config.token_cache
        self._run, self._directory = run, Path(given) if given else run.workdir / TOKENS
        self._mirrored = run.site.mirrored and given is None
        # A cache of the user's is not always on a disk that all hosts share.
        self._divided = given is None or run.site.shares(self._directory)

    def tokens(
        self, shards: Sequence[Shard], transform: Transform, source: Source, tell: OnProgress
    ) -> list[ShardTokens]:
        """The tokens of all shards, which are there after it."""
        run, tokenizer = self._run, self._run.models.tokenizer("vocabulary")
        paths = {shard: shard_path(self._directory, shard, transform, tokenizer.fingerprint) for shard in shards}
        mine: Sequence[Shard] = shards
        if self._divided:
            # The largest first, dealt in turn.
            ordered = sorted(paths, key=lambda shard: (-shard.size, paths[shard].name))
            mine = ordered[run.peers.number :: run.peers.count]

        def made(some: Iterable[Shard]) -> list[ShardTokens]:
            policy = source.controls, self._directory
            return tokenise(list(some), transform, tokenizer, *policy, on_progress=tell, on_bad_rows=source.on_bad_rows)

        if self._mirrored:
            self._fetch(paths[shard] for shard in mine)
            # Some at a time, so that they outlive this host when they are done.
            for first in range(0, len(mine), TOGETHER):
                some = mine[first : first + TOGETHER]
                made(some)
                names = [paths[shard] for shard in some]
                run.site.storage.add(TOKENS, [records_path(path).name for path in names], [path.name for path in names])
        elif self._divided and run.peers.count > 1:
            made(mine)
        if self._divided:
            run.peers.barrier("tokens")
        if self._mirrored:
            self._fetch(paths.values())
        return made(shards)

    def rows(self, tokens: Sequence[ShardTokens], choice: Selection) -> PlannedRows:
        """The rows, planned by the primary where the others can read the plan."""
        path, place = plan_path(tokens, choice, self._directory), self._run.site.storage

        def planned() -> PlannedRows:
            if self._mirrored:
                place.fetch(TOKENS, [path.name])
            rows = PlannedRows(tokens, choice, self._directory)
            if self._mirrored and self._run.primary:
                place.add(TOKENS, [path.name])
            return rows

        return self._run.peers.run_primary_first("rows", planned) if self._divided else planned()

    def _fetch(self, paths: Iterable[Path]) -> None:
        """Bring what the store has of shards that are not here; what says that a shard is whole comes last."""
        wanted = [path for path in paths if not path.is_file()]
        if wanted:
            names = [records_path(path).name for path in wanted], [path.name for path in wanted]
            self._run.site.storage.fetch(TOKENS, *names)


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
    known = {reason: rows.counts[reason] for reason in _LEFT_OUT if rows.counts.get(reason)}
    skipped = {f"{BAD_ROWS}{reason}": count for reason, count in _named(rows, _SKIPPED).items()}
    return skipped | known


def fields_not_read(rows: PlannedRows) -> dict[str, int]:
    """The fields of a source's records that nobody reads, and of how many records."""
    return _named(rows, _IGNORED)


def _named(rows: PlannedRows, prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): count for name, count in rows.counts.items() if name.startswith(prefix)}


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
