"""How many rows of a source may be bad, and a summary of those that were skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transllm_jax.errors import UserError

# This many rows may be bad, whatever their share: in a small file one row is several percent.
FEW = 10


def check_share(source: str, good: int, skipped: Mapping[str, int], max_share: float, first: str, file: str) -> None:
    """Raise UserError if too many rows of a source were skipped.

    good: number of rows that were read. skipped: reason -> number of bad rows. first: what is wrong with the first bad
    row. file: the end of the message, which says where the bad rows are written.
    """
    bad = sum(skipped.values())
    if bad <= FEW or bad <= max_share * (good + bad):
        return
    what = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    raise UserError(
        f"{source}: {bad:,} of {good + bad:,} rows are bad ({what}), more than max_bad_share {max_share:g}{file}; the "
        f"first: {first}"
    )


def first_of_each(rows: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Reason -> what is wrong with the first row that was skipped for it."""
    found: dict[str, str] = {}
    for row in rows:
        found.setdefault(row["reason"], row["fault"])
    return found
