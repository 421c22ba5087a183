"""What suites found, for the report of a run: tables, plots, what people said, and answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from transllm_jax.disk import read_json
from transllm_jax.errors import UserError
from transllm_jax.evaluation.page.measures import clean, percent
from transllm_jax.evaluation.page.people import people_parts
from transllm_jax.evaluation.page.plots import interval_plot
from transllm_jax.evaluation.people.kept import kept
from transllm_jax.evaluation.suites.answered import ITEMS, Answered, read_answered, suites_in
from transllm_jax.evaluation.suites.registry import SUITES
from transllm_jax.evaluation.suites.suite_run import RESULTS
from transllm_jax.evaluation.suites.table import compared, remarks

# Where `transllm evaluate` keeps the results of a work directory, and the comparisons of its last command.
IN_WORKDIR, TABLE = Path("evaluation") / "suites", "table.json"
# How many questions of each suite are shown, and of how many systems.
_QUESTIONS, _SYSTEMS = 12, 12


def collect_suites(directory: Path) -> list[dict[str, Any]]:
    """What the page shows of each suite in a directory of results; empty if there are none. As JSON.

    Numbers are computed from the items, so that systems that were evaluated by several commands stand in one table. A
    suite that is not done, or that this version does not know, is left out.
    """
    found = []
    known = _tabled(directory)
    for suite, systems in suites_in(directory).items():
        if suite not in SUITES:
            continue
        order = [name for name in known.get(suite, ()) if name in systems]
        names = [*order, *(name for name in systems if name not in order)]
        done = [name for name in names if all((directory / name / suite / file).exists() for file in (ITEMS, RESULTS))]
        if not done:
            continue
        places = {name: directory / name / suite for name in done}
        results = {name: read_json(place / RESULTS) for name, place in places.items()}
        comparison = compared(suite, SUITES[suite].measures, places, results)
        found.append(
            {
                "suite": suite,
                "what": SUITES[suite].what,
                "comparison": comparison,
                "remarks": remarks(comparison),
                "main": results[done[0]].get("measure"),
                "answers": _answers(directory, suite, names),
                "people": [asdict(one) for one in kept(directory, suite)],
            }
        )
    return found


def _tabled(directory: Path) -> dict[str, list[str]]:
    """The systems of each suite in the order of the last command."""
    path = directory / TABLE
    suites = read_json(path).get("suites", []) if path.exists() else []
    return {one["suite"]: list(one["systems"]) for one in suites}


def _answers(directory: Path, suite: str, names: Sequence[str]) -> dict[str, Any]:
    """The first systems' answers to questions from the whole file; no systems if there is nothing to compare."""
    answered: dict[str, dict[str, Answered]] = {}
    for name in names[:_SYSTEMS]:
        try:
            answered[name] = read_answered(directory, name, suite)
        except UserError:
            # A suite without answers that people could read, such as perplexity.
            continue
    if len(answered) < 2:
        return {"systems": [], "questions": [], "asked": 0}
    first, *others = answered.values()
    shared = [id for id, one in first.items() if all(same(one, other.get(id)) for other in others)]
    few = min(_QUESTIONS, len(shared))
    return {
        "systems": list(answered),
        "asked": len(shared),
        "questions": [
            {
                "turns": list(first[id].questions),
                "answers": [{"turns": list(own[id].answers), "mark": own[id].mark} for own in answered.values()],
            }
            for id in (shared[number * len(shared) // few] for number in range(few))
        ],
    }


def same(one: Answered, other: Answered | None) -> bool:
    """Whether both are answers to the same question."""
    return other is not None and one.questions == other.questions


def suite_sections(suites: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the template shows of `collect_suites`."""
    return [_section(one) for one in suites]


def _section(found: Mapping[str, Any]) -> dict[str, Any]:
    comparison = found["comparison"]
    measures: dict[str, list[dict[str, Any]]] = {}
    for row in comparison["rows"]:
        measures.setdefault(row["measure"], []).append(row)
    answers = found["answers"]
    return {
        "suite": clean(found["suite"]),
        "what": clean(found["what"]),
        "first": clean(comparison["first"]),
        "several": len(comparison["systems"]) > 1,
        "measures": [_measure(name, rows) for name, rows in measures.items()],
        "remarks": [clean(remark) for remark in found["remarks"]],
        "plots": [
            plot for name, rows in _plotted(found["main"], measures) if (plot := _plot(found["suite"], name, rows))
        ],
        "people": people_parts(found["suite"], found["people"]),
        "systems": [clean(name) for name in answers["systems"]],
        "asked": answers["asked"],
        "talks": [
            {
                "questions": [clean(text).strip() for text in question["turns"]],
                "answers": [
                    {"texts": [clean(text).strip() for text in one["turns"]], "mark": clean(one["mark"])}
                    for one in question["answers"]
                ],
            }
            for question in answers["questions"]
        ],
    }


def _plotted(main: str | None, measures: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The suite's own measure, and one more."""
    names = sorted(measures, key=lambda name: name != main)
    return [(name, measures[name]) for name in names[:2]]


def _plot(suite: str, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    percent_scale = rows[0]["percent"]
    drawn = [(clean(row["system"]), row["value"], row["low"], row["high"]) for row in rows]
    plot: Markup = interval_plot(
        f"{suite}, {name}", drawn, lambda value: written(value, percent_scale), share=percent_scale
    )
    better = "higher" if rows[0]["higher_is_better"] else "lower"
    return {"measure": clean(name), "better": better, "plot": plot}


def _measure(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "name": clean(name),
        "better": "higher" if rows[0]["higher_is_better"] else "lower",
        "rows": [
            {
                "system": clean(row["system"]),
                "value": written(row["value"], row["percent"]),
                "interval": f"{written(row['low'], row['percent'])} to {written(row['high'], row['percent'])}",
                "samples": f"{row['samples']:,}",
                "difference": _difference(row),
            }
            for row in rows
        ],
    }


def _difference(row: Mapping[str, Any]) -> dict[str, str] | None:
    """The difference to the first system; better or worse only where its interval leaves out 0."""
    found, share = row["difference"], row["percent"]
    if found is None:
        return None
    clear = found["low"] > 0 or found["high"] < 0
    better = (found["value"] > 0) == row["higher_is_better"]
    value, low, high = (_points(found[key], share) for key in ("value", "low", "high"))
    return {
        "text": f"{value} points" if share else value,
        "interval": f"{low} to {high}",
        "verdict": ("better" if better else "worse") if clear else "",
    }


def _points(value: float, share: bool) -> str:
    """A difference, of shares in percentage points, with its sign."""
    text = f"{100 * abs(value):.1f}" if share else written(abs(value), share)
    return f"{'−' if value < 0 else '+'}{text}"


def written(value: float, share: bool) -> str:
    """A value of a suite as text: shares as percents, scores of 10 and more with one decimal."""
    if share:
        return percent(value)
    return f"{'−' if value < 0 else ''}{abs(value):.3f}" if abs(value) < 10 else f"{value:,.1f}".replace("-", "−")
