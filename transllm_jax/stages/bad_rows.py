"""The bad rows of the stages' sources: said, written to a stage's directory, and held to the share that is allowed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transllm_jax.config import Source
from transllm_jax.data.read.bad_rows import check_share, first_of_each

# In a stage's directory.
FILE = "bad_rows.jsonl"
# What the reason of a bad row begins with among those of what else is left out.
BAD_ROWS = "bad rows: "


class BadRows:
    """What was skipped of each source in this process."""

    def __init__(self, own: Callable[[Path], Path], workdir: Path, say: Callable[[str], None]) -> None:
        """own: where this process writes what belongs into a directory of the work directory."""
        self._own, self._workdir, self._say = own, workdir, say
        # Stage -> source -> reason -> rows; and the rows.
        self._skipped: dict[str, dict[str, Mapping[str, int]]] = {}
        self._rows: dict[str, dict[str, Sequence[Mapping[str, str]]]] = {}

    def note(
        self, stage: str, source: Source, good: int, skipped: Mapping[str, int], rows: Sequence[Mapping[str, str]]
    ) -> None:
        """Say what was skipped of a source, and write it beside what the stage's other sources had.

        good: rows that were read. skipped: reason -> rows. rows: of those the place, reason, fault and the row itself.
        Raises UserError where they are too many of the source's rows.
        """
        self._skipped.setdefault(stage, {})[repr(source)] = skipped
        known = self._rows.setdefault(stage, {})
        known[repr(source)] = rows
        directory = self._workdir / stage
        if any(known.values()):
            directory.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for some in known.values() for row in some]
            (self._own(directory) / FILE).write_text("".join(lines), encoding="utf-8")
        if not skipped:
            return
        first, bad, where = first_of_each(rows), sum(skipped.values()), f"; all are in {directory / FILE}"
        check_share(source.path, good, skipped, source.max_bad_share, next(iter(first.values())), where)
        self._say(f"  {stage}: {bad:,} of {good + bad:,} rows of {source.path} are bad and left out{where}")
        for reason, count in skipped.items():
            self._say(f"    {count:,} {reason}, the first: {first.get(reason, '')}")

    def counts(self, stage: str, sources: Sequence[Source]) -> dict[str, int]:
        """The bad rows of a stage's sources by reason, as what is left out is counted."""
        found: Counter[str] = Counter()
        for source in sources:
            skipped = self._skipped.get(stage, {}).get(repr(source), {})
            found.update({f"{BAD_ROWS}{reason}": count for reason, count in skipped.items()})
        return dict(found)
