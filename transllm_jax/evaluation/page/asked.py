"""What became of the questions with known answers: in one sentence, and by kind of question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transllm_jax.choices import POINTS
from transllm_jax.evaluation.answers import total
from transllm_jax.evaluation.page.measures import BASE, Results, clean, language_name, point_label, section

# Why an answer is wrong (`evaluation.answers.Reason`), in words; the first four are columns of the table.
REASON_WORDS = {
    "form": "no whole chain",
    "misread": "misread",
    "english": "English wrong",
    "translation": "mistranslated",
    "unknown": "not known",
}


@dataclass(frozen=True)
class Kinds:
    """sentence: for people. headings and rows: the table, where the model answers in chains; rows are (kind, values).

    unknown: whether some questions have no English side.
    """

    sentence: str
    headings: list[str]
    rows: list[tuple[str, list[int]]]
    unknown: bool


def asked_sentence(counts: Mapping[str, Any], language: str) -> str:
    """How many questions were answered rightly, before and after; empty if none were asked.

    counts: by point, those of `evaluation.answers.count`.
    """
    found = {point: total(counts[point]) for point in POINTS if isinstance(counts.get(point), Mapping)}
    found = {point: own for point, own in found.items() if own.get("asked")}
    if not found:
        return ""
    last = list(found)[-1]
    asked, in_english = (found[last].get(name, 0) for name in ("asked", "asked_in_english"))
    whole = f"Asked {asked:,} question{'' if asked == 1 else 's'} in {language}, {_answered(found, last, 'right')}."
    if not in_english:
        return whole
    them = "" if in_english == asked else f" {in_english:,} of them"
    return f"{whole} Asked{them} in English, {_answered(found, last, 'right_in_english')}."


def _answered(found: Mapping[str, Mapping[str, int]], last: str, name: str) -> str:
    """`the original answers 0 rightly, this model 84`."""
    model = "this model" if last == POINTS[-1] else f"the model after {point_label(last)}"
    numbers = [(BASE, "the original"), *([(last, model)] if last != BASE else [])]
    shown = [(who, found[point].get(name, 0)) for point, who in numbers if point in found]
    return ", ".join(
        f"{who} answers {number:,} rightly" if not place else f"{who} {number:,}"
        for place, (who, number) in enumerate(shown)
    )


def table_of_kinds(results: Results) -> Kinds | None:
    """The sentence and the table of a finished run; None if no question was asked."""
    counts = section(section(results, "asked"), "counts")
    language = language_name(results)
    sentence = asked_sentence(counts, language)
    if not sentence:
        return None
    kinds = {str(kind): own for kind, own in section(counts, POINTS[-1]).items() if isinstance(own, Mapping)}
    every = total(kinds)
    columns = {
        "asked": "asked",
        "understood": "understood",
        "chain_english": "English right",
        "right": f"{language} right",
        **{name: words for name, words in REASON_WORDS.items() if name != "unknown" or every.get(name)},
    }
    rows = [(clean(kind) or "no kind", [own.get(name, 0) for name in columns]) for kind, own in kinds.items()]
    if len(rows) > 1:
        rows.append(("all", [every.get(name, 0) for name in columns]))
    return Kinds(sentence, list(columns.values()), rows, "unknown" in columns)


def judgement(talk: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says of a question beside its conversation: the turns before it, and what is right."""
    english, reason = section(talk, "english"), str(talk.get("reason"))
    turns = [turn for turn in talk.get("history") or [] if isinstance(turn, Mapping)]
    return {
        "turns": [(str(turn.get("role") or ""), clean(turn.get("content"))) for turn in turns],
        "kind": clean(talk.get("kind")),
        "right": talk.get("right") is True,
        "reason": "" if reason == "unknown" else REASON_WORDS.get(reason, ""),
        "accepted": [clean(text) for text in talk.get("answers") or []],
        "english": {
            "question": clean(english.get("question")),
            "raw": clean(english.get("raw")).strip(),
            "right": english.get("right") is True,
        }
        if english
        else None,
    }
