"""The verdict of a run in a few sentences, computed from its numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transllm_jax.evaluation.page.asked import asked_sentence
from transllm_jax.evaluation.page.measures import (
    BASE,
    Results,
    Row,
    language_name,
    percent,
    point_label,
    points,
    rows,
    section,
    written,
)

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Verdict:
    """The headline of the report, its first sentences, and the goals by outcome."""

    headline: str
    sentences: list[str]
    met: list[Mapping[str, Any]]
    unmet: list[Mapping[str, Any]]
    unmeasured: list[Mapping[str, Any]]


def verdict(results: Results) -> Verdict:
    """Which goals were met, and in which direction the main numbers went.

    A goal whose `met` is true was met, false was not, anything else was not measured.
    """
    goals = [goal for goal in results.get("goals") or [] if isinstance(goal, Mapping)]
    met = [goal for goal in goals if goal.get("met") is True]
    unmet = [goal for goal in goals if goal.get("met") is False]
    unmeasured = [goal for goal in goals if not isinstance(goal.get("met"), bool)]
    measured = {row.measure.key: row for row in rows(results)}
    name = language_name(results)
    sentences = [
        *_fluency(measured["bits_per_byte"], measured["tokens_per_character"], name, points(results)),
        *_translation(measured["chrf_to_target"], measured["chrf_to_english"], name, points(results)),
    ]
    if told := asked_sentence(section(section(results, "asked"), "counts"), name):
        sentences.append(told)
    return Verdict(_headline(len(goals), len(met), len(unmet)), sentences, met, unmet, unmeasured)


def _headline(total: int, met: int, unmet: int) -> str:
    if total == 0:
        return "No goals were checked in this run."
    unmeasured = total - met - unmet
    if met == total:
        whole = {1: "The goal was", 2: "Both goals were"}.get(total, f"All {_count(total)} goals were")
        return f"{whole} met."
    rest = []
    if unmet:
        rest.append(f"{_count(unmet)} {'was' if unmet == 1 else 'were'} not")
    if unmeasured:
        rest.append(f"{_count(unmeasured)} {'was' if unmeasured == 1 else 'were'} not measured")
    start = "None" if met == 0 else _count(met).capitalize()
    return f"{start} of {_count(total)} goals {'was' if met <= 1 else 'were'} met; {', '.join(rest)}."


def _fluency(bits: Row, tokens: Row, name: str, where: list[str]) -> list[str]:
    parts = []
    if bits.last is not None and bits.last[0] != BASE:
        text = f"{written(bits.last[1])} bits per byte{_after(bits, where)}"
        base = bits.values.get(BASE)
        if base:
            share = bits.last[1] / base - 1
            if abs(share) < 0.0005:
                text += f", as many as with the original model ({written(base)})"
            else:
                direction = "fewer" if share < 0 else "more"
                text += f", {percent(abs(share))} {direction} than with the original model ({written(base)})"
        parts.append(text)
    if tokens.last is not None and tokens.last[0] != BASE:
        base = tokens.values.get(BASE)
        text = f"{written(tokens.last[1])} tokens per character{_after(tokens, where)}"
        parts.append(text if base is None else f"{text} (before: {written(base)})")
    return [f"Held-out {name} text takes {', and '.join(parts)}."] if parts else []


def _translation(to_target: Row, to_english: Row, name: str, where: list[str]) -> list[str]:
    parts = []
    for row, language in ((to_target, name), (to_english, "English")):
        if row.last is None or row.last[0] == BASE:
            continue
        base = row.values.get(BASE)
        was = "" if base is None else f" (before: {base:.1f})"
        parts.append(f"{row.last[1]:.1f} chrF into {language}{_after(row, where)}{was}")
    return [f"Translation scores {' and '.join(parts)}."] if parts else []


def _after(row: Row, where: list[str]) -> str:
    """The stage that a number is from, in words; empty for the last stage."""
    assert row.last is not None
    return "" if row.last[0] == where[-1] else f" after {point_label(row.last[0])}"


def _count(value: int) -> str:
    return _WORDS[value] if value < len(_WORDS) else str(value)
