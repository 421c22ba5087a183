"""The bad rows of the stages' sources: printed, written to the stage's directory, and limited to the allowed share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transllm_jax.config import Source
from transllm_jax.data.read.bad_rows import check_share, first_of_each

# The file of bad rows in a stage's directory.
FILE = "bad_rows.jsonl"
# A prefix of the reasons of bad rows among all reasons for which items are left out.
BAD_ROWS = "bad rows: "


class BadRows:
    """The rows of each source that this process skipped."""

    def __init__(self, record_directory: Callable[[Path], Path], workdir: Path, say: Callable[[str], None]) -> None:
        """record_directory: maps a directory of the work directory to the one that this process writes to instead."""
        self._record_directory, self._workdir, self._say = record_directory, workdir, say
        # By stage and source: the number of rows by reason, and the rows.
        self._skipped: dict[str, dict[str, Mapping[str, int]]] = {}
        self._rows: dict[str, dict[str, Sequence[Mapping[str, str]]]] = {}

    def note(
        self, stage: str, source: Source, good: int, skipped: Mapping[str, int], rows: Sequence[Mapping[str, str]]
    ) -> None:
        """Print how many rows of a source were skipped, and write them to one file with those of the stage's others.

        good: how many rows were read. skipped: how many were skipped, by reason. rows: the place, reason, fault and
        content of each. Raises UserError if their share is larger than the source allows.
        """
        self._skipped.setdefault(stage, {})[repr(source)] = skipped
        by_source = self._rows.setdefault(stage, {})
        by_source[repr(source)] = rows
        directory = self._workdir / stage
        if any(by_source.values()):
            directory.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for some in by_source.values() for row in some]
            (self._record_directory(directory) / FILE).write_text("".join(lines), encoding="utf-8")
        if not skipped:
            return
        first, bad, where = first_of_each(rows), sum(skipped.values()), f"; all are in {directory / FILE}"
        check_share(source.path, good, skipped, source.max_bad_share, next(iter(first.values())), where)
        self._say(f"  {stage}: {bad:,} of {good + bad:,} rows of {source.path} are bad and left out{where}")
        for reason, count in skipped.items():
            self._say(f"    {count:,} {reason}, the first: {first.get(reason, '')}")

    def counts(self, stage: str, sources: Sequence[Source]) -> dict[str, int]:
        """The number of bad rows of a stage's sources by reason, each with the prefix `BAD_ROWS`."""
        found: Counter[str] = Counter()
        for source in sources:
            skipped = self._skipped.get(stage, {}).get(repr(source), {})
            found.update({f"{BAD_ROWS}{reason}": count for reason, count in skipped.items()})
        return dict(found)
