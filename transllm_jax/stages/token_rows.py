"""A training stage's sources as rows by index: tokenised once, cleaned, planned, and read from the token cache."""

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

# The directory of tokenised text in the work directory.
TOKENS = "tokens"
# Tokenising a source of at least this many bytes on disk can be interrupted.
LARGE = 16 << 20
# The number of shards that are tokenised between two copies to a store.
TOGETHER = 64
_UNITS = {"text": "documents", "pairs": "pairs", "conversations": "conversations"}
# Counts of a source's items that were left out or changed.
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


def planned_rows(run: Run, stage: str, source: Source, length: int) -> PlannedRows:
    """The rows of a source for a stage.

    Raises UserError with file and line if something is wrong in the source, or if nothing is left of it; Preempted when
    asked to stop. Finished shards stay in the cache.
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
        holds_markers=source.chains,
        direct=source.chains and _is_direct(run, stage),
        in_chat=source.in_chat,
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
    """The rows of conversations that the run itself wrote; they may hold the chain's markers, and are not cleaned."""
    direct = _is_direct(run, stage)
    transform = Transform("conversations", length, run.markers, exact=False, holds_markers=True, direct=direct)
    return _rows(run, stage, source, transform)


def _is_direct(run: Run, stage: str) -> bool:
    """Whether a stage trains on the last parts of chains alone."""
    return stage == "transfer" and run.config.transfer.answers == "direct"


def instruction_rows(run: Run, stage: str, pairs: Source, length: int, *, contamination: bool) -> PlannedRows:
    """The rows of translation instructions made from pairs.

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
    """The rows of held-out text, made as those of the stage; only what does not fit into a row is left out."""
    transform = Transform(content=source.format, length=length, markers=run.markers, exact=False)
    return _rows(run, stage, source, transform)


def left_out(rows: PlannedRows) -> dict[str, int]:
    """How many items were left out of a source, by reason, without zeros; bad rows included."""
    known = {reason: rows.counts[reason] for reason in _LEFT_OUT if rows.counts.get(reason)}
    skipped = {f"{BAD_ROWS}{reason}": count for reason, count in _counts_of(rows, _SKIPPED).items()}
    return skipped | known


def fields_not_read(rows: PlannedRows) -> dict[str, int]:
    """The fields of a source's records that are ignored, and how many records have each."""
    return _counts_of(rows, _IGNORED)


def _rows(run: Run, stage: str, source: Source, transform: Transform) -> PlannedRows:
    """Tokenise a source and plan its rows. Raises UserError if there are too many bad rows, or no rows at all."""
    shards = run.inputs.shards(source)
    total = sum(shard.size for shard in shards)
    interruptible = total >= LARGE or not all(shard.size for shard in shards)  # a size of 0 is not known
    with (
        run.ledger.spend("data"),
        run.progress.task(f"{stage}: tokens of {source.path}", total=max(total, 1), unit="byte") as bar,
    ):

        def tell(done: int, items: int) -> None:
            bar.update(done, f"{items:,} {PLURAL[source.format]}")
            # A small source is finished in seconds, so that it need not be done again.
            if interruptible:
                run.interrupt.check(f"{stage}: tokenising")

        cache = _TokenCache(run)
        tokens = cache.tokens(shards, transform, source, tell)
        choice = Selection(
            row_length=transform.length,
            tokens=source.tokens,
            exact=transform.exact,
            near=source.cleaning.near_duplicates if transform.near else None,
            seed=run.config.seed,
        )
        rows = cache.rows(tokens, choice)
    _report(run, stage, source, tokens, rows)
    if not len(rows):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out(rows).items())
        raise UserError(
            f"{stage}: nothing of {source.path} is left to train on ({rows.counts['items']:,} {PLURAL[source.format]}: "
            f"{reasons or 'none'}): give it more text, or loosen cleaning, tokens or length"
        )
    return rows


def _report(run: Run, stage: str, source: Source, tokens: Sequence[ShardTokens], rows: PlannedRows) -> None:
    """Report a source's bad rows and ignored fields. Raises UserError if there are too many bad rows."""
    bad = [row for shard in tokens if shard.skipped for row in shard.bad_rows()]
    run.bad_rows.note(stage, source, rows.counts["items"], _counts_of(rows, _SKIPPED), bad)
    if ignored := fields_not_read(rows):
        what = ", ".join(f"{name} ({count:,})" for name, count in sorted(ignored.items()))
        run.progress.say(f"  {stage}: fields of {source.path} that are not read: {what}")


class _TokenCache:
    """The token cache of a run: in a directory that all processes share, on the run's store, or one per process.

    If it is shared or on the store, each process tokenises its part of the shards.
    """

    def __init__(self, run: Run) -> None:
        given = run.config.token_cache
        self._run, self._directory = run, Path(given) if given else run.workdir / TOKENS
        self._mirrored = run.site.mirrored and given is None
        # A cache directory that the user chose may not be on a disk that all hosts share.
        self._divided = given is None or run.site.shares(self._directory)

    def tokens(
        self, shards: Sequence[Shard], transform: Transform, source: Source, tell: OnProgress
    ) -> list[ShardTokens]:
        """The tokens of all shards; those that the cache lacks are made."""
        run, tokenizer = self._run, self._run.models.tokenizer("vocabulary")
        paths = {shard: shard_path(self._directory, shard, transform, tokenizer.fingerprint) for shard in shards}
        mine: Sequence[Shard] = shards
        if self._divided:
            # Processes take shards in turn, the largest first.
            ordered = sorted(paths, key=lambda shard: (-shard.size, paths[shard].name))
            mine = ordered[run.peers.number :: run.peers.count]

        def tokenised(some: Iterable[Shard]) -> list[ShardTokens]:
            policy = source.controls, self._directory
            return tokenise(list(some), transform, tokenizer, *policy, on_progress=tell, on_bad_rows=source.on_bad_rows)

        if self._mirrored:
            self._fetch(paths[shard] for shard in mine)
            # Copied to the store a few at a time, so that finished shards survive the loss of this host.
            for first in range(0, len(mine), TOGETHER):
                some = mine[first : first + TOGETHER]
                tokenised(some)
                run.site.storage.add(TOKENS, *_file_names([paths[shard] for shard in some]))
        elif self._divided and run.peers.count > 1:
            tokenised(mine)
        if self._divided:
            run.peers.barrier("tokens")
        if self._mirrored:
            self._fetch(paths.values())
        return tokenised(shards)

    def rows(self, tokens: Sequence[ShardTokens], choice: Selection) -> PlannedRows:
        """The planned rows. If the cache is shared, the primary makes the plan and the others read it."""
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
        """Fetch shards that are missing here from the store."""
        wanted = [path for path in paths if not path.is_file()]
        if wanted:
            self._run.site.storage.fetch(TOKENS, *_file_names(wanted))


def _file_names(paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """The names of shards' files in the order of copying: those that mark a shard as complete come last."""
    return [records_path(path).name for path in paths], [path.name for path in paths]


def _counts_of(rows: PlannedRows, prefix: str) -> dict[str, int]:
    """The counts whose names begin with a prefix, by the rest of the name."""
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
