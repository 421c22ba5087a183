"""What people said of the answers of a suite, for the report: their win rates beside the judge's, and how far they
agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from transllm_jax.evaluation.page.measures import clean, percent
from transllm_jax.evaluation.page.plots import interval_plot
from transllm_jax.evaluation.people.numbers import Line, counts_of, judge_of, numbers_of, remarks_on


def people_parts(suite: str, kept: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the template shows of each pair of systems. kept: each `people.kept.Kept` as a dict."""
    pairs = [(one["pair"]["first"], one["pair"]["second"]) for one in kept]
    # The same two systems may have been compared twice, by different sheets.
    return [_part(suite, one, several=pairs.count(pair) > 1) for one, pair in zip(kept, pairs, strict=True)]


def _part(suite: str, kept: Mapping[str, Any], *, several: bool) -> dict[str, Any]:
    pair, sheets = kept["pair"], clean(kept["sheets"])
    title = clean(f"{pair['first']} against {pair['second']}") + (f", {sheets}" if several else "")
    if kept["changed"] == "answers":
        changed = (
            f"The answers are no longer those that people judged with the sheets in {sheets}. Write new sheets with "
            "transllm evaluate sheets write."
        )
        return {"title": title, "counts": "", "groups": [], "plot": None, "remarks": [changed]}
    groups = numbers_of(suite, pair)
    return {
        "title": title,
        "counts": clean(counts_of(pair)),
        "groups": [{"title": clean(group.title), "rows": [_row(line) for line in group.lines]} for group in groups],
        "plot": _plot(f"{suite}, {title}", groups[0].lines),
        "remarks": [_sentence(clean(remark)) for remark in (*remarks_on(pair, percent), *_remarks(suite, kept))],
    }


def _remarks(suite: str, kept: Mapping[str, Any]) -> list[str]:
    sheets, found = kept["sheets"], []
    if kept["left_out"]:
        rows = "1 row" if kept["left_out"] == 1 else f"{kept['left_out']} rows"
        found.append(f"{rows} of the sheets had a problem and were left out; people.json in {sheets} lists them")
    if kept["changed"]:
        what = "verdicts" if judge_of(suite) == "judge" else "scores"
        again = f"to compare both, read the sheets again: transllm evaluate sheets read {sheets}"
        found.append(f"{what} came or changed after the sheets were read, and only people's numbers are here; {again}")
    return found


def _row(line: Line) -> dict[str, str]:
    found = line.interval
    return {
        "name": clean(line.name),
        "value": "" if found is None else _written(found["value"], line),
        "interval": "" if found is None else f"{_written(found['low'], line)} to {_written(found['high'], line)}",
        "of": line.of,
        "missing": line.missing,
    }


def _plot(label: str, lines: Sequence[Line]) -> Markup | None:
    """The win rates, one below the other; None if there is but one."""
    drawn = [
        (
            # There is little room for names.
            line.name.removesuffix(" by people"),
            line.interval["value"],
            line.interval["low"],
            line.interval["high"],
        )
        for line in lines
        if line.interval is not None
    ]
    return interval_plot(f"people, {label}", drawn, percent, share=True) if len(drawn) > 1 else None


def _written(value: float, line: Line) -> str:
    return percent(value) if line.share else f"{value:.2f}".replace("-", "−")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
