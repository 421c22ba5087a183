"""Which answers of the original model stage `recover` leaves out, and the file that lists everything left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transllm_jax.config import Filters
from transllm_jax.disk import write_text
from transllm_jax.generation.checks import letters_share, repeated_share

Row = dict[str, Any]

# In the directory of stage `recover`: a line for each answer and translation that is left out, with the reason.
DROPPED = "dropped.jsonl"

EMPTY, CUT_OFF, REPETITIVE, WRONG_LANGUAGE = "empty", "cut off", "repetitive", "wrong language"


class Sorted(NamedTuple):
    """Answers: those that are used, and those that are left out, as lines of `DROPPED`."""

    usable: list[Row]
    dropped: list[Row]


def sort_out(answers: Sequence[Row], filters: Filters, *, keep_unfinished: bool) -> Sorted:
    """Divide answers into usable ones and the others, each with the first reason that holds.

    answers: rows with `instruction`, `answer` and `finished`.
    """
    found = Sorted([], [])
    for row in answers:
        reason, measure = _fault(row, filters, keep_unfinished)
        if reason is None:
            found.usable.append(row)
        else:
            measured = {} if measure is None else {"measure": round(measure, 3)}
            texts = {"instruction": row["instruction"], "answer": row["answer"]}
            found.dropped.append({"of": "answer", "reason": reason, **measured, **texts})
    return found


def _fault(row: Row, filters: Filters, keep_unfinished: bool) -> tuple[str | None, float | None]:
    """Why an answer is left out, with the value that was measured; None if it is not."""
    answer = row["answer"]
    if not answer.strip():
        return EMPTY, None
    if not row["finished"] and not keep_unfinished:
        return CUT_OFF, None
    if (repeated := repeated_share(answer)) > filters.max_repeated:
        return REPETITIVE, repeated
    latin = letters_share(answer, ("Latin",)) if filters.min_latin_share else None
    if latin is not None and latin < filters.min_latin_share:
        return WRONG_LANGUAGE, latin
    return None, None


def counts(dropped: Iterable[Row]) -> dict[str, int]:
    """How many rows were left out for each reason, the most frequent first."""
    found = Counter(row["reason"] for row in dropped)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def shown(found: dict[str, int]) -> str:
    """Counts as people read them: "12 cut off, 3 repetitive"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in found.items())


def write_dropped(directory: Path, dropped: Iterable[Row]) -> None:
    """Write the file of what is left out; it is empty if nothing is."""
    write_text(directory / DROPPED, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped))
