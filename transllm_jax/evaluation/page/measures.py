"""What the measures of an evaluation mean, which direction is better, and how their numbers are written.

The HTML report, the terminal and the plots all read results through `rows`, so that a missing value is "not measured"
everywhere and a number looks the same in every place.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transllm_jax.choices import POINTS

Results = Mapping[str, Any]
Better = Literal["lower", "higher"]

NOT_MEASURED = "not measured"
BASE = "base"
ARROWS = {"lower": "↓", "higher": "↑", None: ""}


@dataclass(frozen=True)
class Measure:
    """One measure. `{language}` in its texts is replaced by the target language's name."""

    key: str
    label: str
    short: str
    """A short label, for a terminal."""
    meaning: str
    better: Better | None
    style: Literal["number", "score", "share"] = "number"
    since: str = BASE
    """The point from which the change is computed."""
    optional: bool = False
    """Left out where it was not asked for (`evaluation.answers`), rather than shown as not measured."""


MEASURES = (
    Measure(
        "bits_per_byte",
        "{language} bits per byte",
        "{language} bits/byte",
        "How much held-out {language} text surprises the model, per byte of text. Comparable across tokenizers.",
        "lower",
    ),
    Measure(
        "tokens_per_character",
        "Tokens per {language} character",
        "Tokens/character",
        "What one character of held-out {language} text costs. Fewer tokens mean faster answers and longer memory.",
        "lower",
    ),
    Measure(
        "chrf_to_target",
        "English to {language}, chrF",
        "chrF into {language}",
        "Overlap of characters with reference translations into {language}, from 0 to 100.",
        "higher",
        "score",
    ),
    Measure(
        "chrf_to_english",
        "{language} to English, chrF",
        "chrF into English",
        "Overlap of characters with reference translations into English, from 0 to 100.",
        "higher",
        "score",
    ),
    # The original model is at distance 0 from itself, so the change since stage translate is what tells.
    Measure(
        "english_kl",
        "Drift of English answers, KL",
        "English drift, KL",
        "How far the model has moved from the original's own English answers, per token. 0 is no change.",
        "lower",
        since="translate",
    ),
    Measure(
        "well_formed_chains",
        "Well-formed chains",
        "Well-formed chains",
        "Share of answers with each step in its place: question in English, answer in English, answer in {language}.",
        "higher",
        "share",
    ),
    Measure(
        "answers",
        "Right answers in {language}",
        "Right in {language}",
        "Share of questions with known answers that are answered rightly when they are asked in {language}.",
        "higher",
        "share",
        optional=True,
    ),
    Measure(
        "answers_in_english",
        "Right answers in English",
        "Right in English",
        "Share of the same questions that are answered rightly when they are asked in English.",
        "higher",
        "share",
        optional=True,
    ),
    Measure(
        "understood",
        "Questions understood",
        "Understood",
        "Share of the questions in {language} whose English in the chain is a wording that the file has.",
        "higher",
        "share",
        optional=True,
    ),
    Measure(
        "answers_chain_english",
        "Right English answers in chains",
        "English in chains",
        "Share of the questions in {language} whose English answer in the chain is right.",
        "higher",
        "share",
        optional=True,
    ),
)


def number(value: object) -> float | None:
    """`value` as a finite number; None for anything else (missing, null, NaN, text)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def written(value: float | None, style: str = "number") -> str:
    """A measured value as text; None is "not measured"."""
    if value is None:
        return NOT_MEASURED
    if style == "share":
        return percent(value)
    if style == "score":
        return f"{value:.1f}"
    return "0" if value == 0 else f"{value:.3f}"


def percent(share: float, *, sign: bool = False) -> str:
    """0.896 as "89.6 %", 0.9 as "90 %"; a change (`sign`) has a sign and always one decimal.

    Only 0 and 1 become "0 %" and "100 %" (0.9996 is written with more digits).
    """
    value = 100 * share
    text = f"{abs(value):.1f}"
    if sign:
        return f"{_sign(value)}{text} %"
    text = text.removesuffix(".0")
    if text in ("0", "100") and value not in (0.0, 100.0):
        text = f"{abs(value):.3g}" if value < 1 else f"{math.floor(value * 100) / 100:.2f}"
    return f"{'−' if value < 0 else ''}{text} %"


def language_name(results: Results) -> str:
    """The target language's English name."""
    return str(section(results, "language").get("name") or "target language")


def section(results: Results, key: str) -> Mapping[str, Any]:
    """The mapping under `key`; empty if the results have none."""
    value = results.get(key)
    return value if isinstance(value, Mapping) else {}


def points(results: Results) -> list[str]:
    """The points at which the model was evaluated, in order: the original model, then after each stage."""
    if results.get("points"):
        return [str(point) for point in results["points"]]
    found = {point for values in section(results, "metrics").values() for point in values or {}}
    return [point for point in POINTS if point in found] + sorted(found - set(POINTS))


def point_label(point: str) -> str:
    """The heading of a point: "original" for the base; a stage keeps its name."""
    return "original" if point == BASE else point


@dataclass(frozen=True)
class Change:
    """The change from one point to the last measured one."""

    text: str
    verdict: Literal["better", "worse", "the same", ""]
    since: str
    until: str


@dataclass(frozen=True)
class Row:
    """A measure with its values at every point."""

    measure: Measure
    label: str
    short: str
    meaning: str
    values: dict[str, float | None]

    def text(self, point: str) -> str:
        """The value at `point` as text."""
        return written(self.values.get(point), self.measure.style)

    @property
    def has_plot(self) -> bool:
        """Whether a plot shows more than the table. An optional measure may have a value at one point only."""
        measured = sum(value is not None for value in self.values.values())
        return measured > (1 if self.measure.optional else 0)

    @property
    def last(self) -> tuple[str, float] | None:
        """The last point with a value, and the value."""
        measured = [(point, value) for point, value in self.values.items() if value is not None]
        return measured[-1] if measured else None

    @property
    def change(self) -> Change | None:
        """The change from `measure.since` to the last measured point; None if either is missing."""
        since, last = self.measure.since, self.last
        before = self.values.get(since)
        order = list(self.values)
        if before is None or last is None or order.index(last[0]) <= order.index(since):
            return None
        until, after = last
        difference = after - before
        if self.measure.style == "share":
            text = f"{_sign(difference)}{100 * abs(difference):.1f} points"
        elif self.measure.style == "score":
            text = f"{_sign(difference)}{abs(difference):.1f}"
        elif before > 0:
            text = percent(difference / before, sign=True)
        else:
            text = f"{_sign(difference)}{abs(difference):.3f}"
        if self.measure.better is None:
            return Change(text, "", since, until)
        if difference == 0:
            return Change("no change", "the same", since, until)
        better = (difference < 0) == (self.measure.better == "lower")
        return Change(text, "better" if better else "worse", since, until)


def rows(results: Results) -> Iterator[Row]:
    """The known measures in order, measured or not (the optional ones if they are in the results), then any others."""
    language, where = language_name(results), points(results)
    metrics = section(results, "metrics")
    known = {measure.key for measure in MEASURES}
    others = tuple(Measure(key, key.replace("_", " "), key, "", None) for key in metrics if key not in known)
    for measure in MEASURES + others:
        if measure.optional and measure.key not in metrics:
            continue
        values = section(metrics, measure.key)
        # Only our own texts are templates: another measure's name may contain braces.
        label, short, meaning = (
            text.format(language=language) if measure.key in known else text
            for text in (measure.label, measure.short, measure.meaning)
        )
        yield Row(
            measure,
            label[:1].upper() + label[1:],
            short[:1].upper() + short[1:] if measure.key in known and short.startswith(language) else short,
            meaning,
            {point: number(values.get(point)) for point in where},
        )


def clean(text: object) -> str:
    """Text without control characters, which must not reach a page or a terminal."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs") else "\ufffd"
        for letter in str(text if text is not None else "")
    )


def _sign(difference: float) -> str:
    return "−" if difference < 0 else "+"
