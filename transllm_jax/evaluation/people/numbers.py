"""The numbers of a pair of systems that people compared, by name and in order, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transllm_jax.evaluation.suites.registry import SUITES

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Line:
    """A number.

    interval: that of `Interval`, as a dict; None if there is none, and `missing` says why. of: what it rests on, with
    its number. share: whether it is a part of one.
    """

    name: str
    interval: Mapping[str, Any] | None
    of: str
    share: bool = True
    missing: str = NOT_MEASURED


@dataclass(frozen=True)
class Lines:
    """Numbers that belong together, below a title."""

    title: str
    lines: list[Line]


def numbers_of(suite: str, pair: Mapping[str, Any]) -> list[Lines]:
    """The numbers of a pair. suite: its name. pair: of `agreement.pair_results`."""
    judge, by = pair["judge"], judge_of(suite)
    wins = [Line("people", pair["win_rate"], f"{_known(pair)} of {_questions(pair['drawn'])}")]
    agreement = [Line("two people say the same", pair["people_agree"], _samples(pair["people_agree"])), _alpha(pair)]
    if judge is not None:
        wins += [
            Line(by, judge["win_rate"], f"{judge['verdicts']} of {_questions(pair['asked'])}"),
            Line(f"{by}, corrected by people", judge["corrected"], f"{_questions(judge['both'])} that both judged"),
        ]
        agreement += [
            Line(f"people and {by} say the same", judge["agree"], _samples(judge["agree"])),
            Line("where neither says tie", judge["agree_without_ties"], _samples(judge["agree_without_ties"])),
        ]
    found = [Lines(f"{pair['first']} wins, ties as halves", wins), Lines("agreement", agreement)]
    return found if pair["ratings"] is None else [*found, Lines("ratings by people", _ratings(pair))]


def judge_of(suite: str) -> str:
    """What compares the same answers, where people do not: a judge, or the scores of a suite that needs none."""
    return "judge" if suite not in SUITES or SUITES[suite].open else "scores"


def counts_of(pair: Mapping[str, Any]) -> str:
    """What was said how often, in a sentence."""
    wins, sides = pair["wins"], pair["sides"]
    people = f"{pair['people']} {'person' if pair['people'] == 1 else 'people'}"
    said = f"{pair['judgements']:,} judgement{'' if pair['judgements'] == 1 else 's'} of {people}"
    preferred = f"{pair['first']} preferred {wins['first']} times, {pair['second']} {wins['second']}, tie {wins['tie']}"
    return f"{said}: {preferred}; by side, A {sides['A']}, B {sides['B']}"


def remarks_on(pair: Mapping[str, Any], percent: Callable[[float], str] = "{:.1%}".format) -> list[str]:
    """What a reader of the numbers has to know besides: questions that nobody judged, and those with equal answers.

    percent: writes a share.
    """
    found, drawn = [], pair["drawn"]
    if unclear := drawn - _known(pair):
        worst, best = (percent(pair[end]) for end in ("worst", "best"))
        found.append(
            f"nobody has judged {unclear} of {_questions(drawn)}: {pair['first']} wins {worst} if it lost all of them, "
            f"and {best} if it won all"
        )
    if pair["equal"]:
        found.append(f"{pair['equal']} of {_questions(drawn)} have equal answers, which are ties that nobody judges")
    return found


def in_a_sentence(suite: str, pair: Mapping[str, Any]) -> str:
    """People's win rate, and the judge's beside it."""
    wins, *_ = numbers_of(suite, pair)
    said = "; ".join(f"{line.name} {written(line)}, {line.of}" for line in wins.lines if line.interval is not None)
    return f"{wins.title}, against {pair['second']}: {said or NOT_MEASURED}"


def written(line: Line) -> str:
    """A number with its interval, for a terminal."""
    if line.interval is None:
        return line.missing
    form = ".1%" if line.share else ".2f"
    value, low, high = (format(line.interval[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _alpha(pair: Mapping[str, Any]) -> Line:
    found = pair["alpha"]
    of = f"{_questions(found['pairable'])} that two or more judged"
    return Line("Krippendorff's alpha", found["interval"], of, share=False, missing=found["why"] or NOT_MEASURED)


def _ratings(pair: Mapping[str, Any]) -> list[Line]:
    found = pair["ratings"]
    names = {"first": pair["first"], "second": pair["second"], "difference": f"{pair['first']} minus {pair['second']}"}
    alpha = found["alpha"]
    of = f"{alpha['pairable']} answer{'' if alpha['pairable'] == 1 else 's'} that two or more rated"
    return [
        *(Line(name, found[side], _samples(found[side]), share=False) for side, name in names.items()),
        Line("Krippendorff's alpha, ordinal", alpha["interval"], of, share=False, missing=alpha["why"] or NOT_MEASURED),
    ]


def _known(pair: Mapping[str, Any]) -> int:
    """Questions that somebody judged, or whose answers are equal."""
    return int(pair["judged"] + pair["equal"])


def _samples(interval: Mapping[str, Any] | None) -> str:
    return _questions(0 if interval is None else interval["samples"])


def _questions(count: int) -> str:
    return f"{count:,} question{'' if count == 1 else 's'}"
