"""What suites found, of one system or several: a table for the terminal, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from transllm_jax.evaluation.suites.measure import Measure, key_of
from transllm_jax.evaluation.suites.results import Interval
from transllm_jax.evaluation.suites.suite_run import read_items


def compared(
    suite: str, measures: Sequence[Measure], directories: Mapping[str, Path], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """A suite's measures of each system, each with its difference to the first system on the items that both have.

    directories, results: by the system's name, in the order of the command. `items` and `shared` of a system: how many
    it has, and how many of them ask what the first system was asked.
    """
    items = {name: read_items(directory) for name, directory in directories.items()}
    first = next(iter(items))
    rows = []
    for measure in measures:
        for name, own in items.items():
            interval = measure.interval(own)
            if interval is None:
                continue
            difference = None if name == first else measure.difference(own, items[first])
            rows.append(
                {
                    "measure": measure.name,
                    "percent": measure.percent,
                    "higher_is_better": measure.higher_is_better,
                    "system": name,
                    **asdict(interval),
                    "difference": None if difference is None else asdict(difference),
                }
            )
    counts = ("asked", "parsed", "contamination", "notes")
    systems = {name: {key: found.get(key) for key in counts} for name, found in results.items()}
    asked = {name: {key_of(item) for item in own} for name, own in items.items()}
    for name, keys in asked.items():
        systems[name] |= {"items": len(keys), "shared": len(keys & asked[first])}
    return {"suite": suite, "first": first, "systems": systems, "rows": rows}


def shown(comparison: Mapping[str, Any]) -> Table:
    """The table of `compared`."""
    several = len(comparison["systems"]) > 1
    table = Table(title=comparison["suite"], title_justify="left", title_style="bold", pad_edge=False, box=None)
    table.add_column("measure")
    table.add_column("system", overflow="fold")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    table.add_column("n", justify="right")
    if several:
        table.add_column(f"minus {comparison['first']}", justify="right")
    last = ""
    for row in comparison["rows"]:
        percent = row["percent"]
        name = row["measure"] if row["measure"] != last else ""
        if name and not row["higher_is_better"]:
            name += " (lower is better)"
        last = row["measure"]
        cells: list[str | Text] = [
            name,
            row["system"],
            _number(row["value"], percent),
            f"{_number(row['low'], percent)} to {_number(row['high'], percent)}",
            str(row["samples"]),
        ]
        if several:
            cells.append(_difference(row))
        table.add_row(*cells)
    return table


def remarks(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know: questions without an answer, contamination, notes."""
    found: list[str] = []
    notes: dict[str, None] = {}
    first = comparison["first"]
    for name, system in comparison["systems"].items():
        if system["shared"] < max(system["items"], comparison["systems"][first]["items"]):
            found.append(
                f"{name}: {system['shared']} of its {system['items']} items ask what {first} was asked; the "
                "differences are of these"
            )
        missing = system["asked"] - system["parsed"]
        if missing:
            found.append(f"{name}: {missing} of {system['asked']} have no answer or score; they count")
        seen = system["contamination"]
        if seen is not None and seen["found"] is None:
            found.append(f"{name}: not looked for in the training data of its run: {seen['why']}")
        elif seen is not None and seen["found"]:
            found.append(
                f"{name}: {seen['found']} of {seen['of']} questions occur in the training data of its run: "
                + ", ".join(f"{count} in {source}" for source, count in seen["by_source"].items())
            )
        notes |= dict.fromkeys(system["notes"] or ())
    return [*found, *notes]


def _difference(row: Mapping[str, Any]) -> Text:
    """A difference with its interval; green or red where the interval leaves out 0."""
    if row["difference"] is None:
        return Text("")
    found, percent = Interval(**row["difference"]), row["percent"]
    low, high = (_number(value, percent, sign=True) for value in (found.low, found.high))
    better = found.low > 0 if row["higher_is_better"] else found.high < 0
    worse = found.high < 0 if row["higher_is_better"] else found.low > 0
    style = "green" if better else "red" if worse else ""
    return Text(f"{_number(found.value, percent, sign=True)} ({low} to {high})", style)


def _number(value: float, percent: bool, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}%" if percent else f"{value:{plus}.3f}" if abs(value) < 10 else f"{value:{plus}.1f}"
