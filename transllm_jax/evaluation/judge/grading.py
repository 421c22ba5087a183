"""What follows from verdicts: the rating of an answer, and which of two is better; with what could be unread.

Every answer counts. Where a verdict could not be read, `low` and `high` say what the worst and the best verdict would
have made of it; where all could be read, they are the value.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from transllm_jax.evaluation.judge.judge import Ask, Verdict
from transllm_jax.evaluation.judge.prompts import Preset, again, pair_prompt, single_prompt
from transllm_jax.evaluation.judge.verdict import CHOICES, HIGHEST, LOWEST, Choice, choice_of, rating_of

# In which order the judge sees the two: the system first, or the baseline.
Order = Literal["system first", "baseline first"]
ORDERS: tuple[Order, ...] = ("system first", "baseline first")


@dataclass(frozen=True)
class Answered:
    """The turns of a question so far, the visible answers to them, and right answers, if there are any."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    references: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Grade:
    """A number: the mean over the repeats that could be read, None if none could. by_rule: what settled it without a
    judge."""

    value: float | None
    low: float
    high: float
    by_rule: str | None = None


@dataclass(frozen=True)
class PairGrade(Grade):
    """1 if the system's answer is better, 0 if the baseline's is, 1/2 for a tie.

    consistent: of the repeats of which both orders could be read, the share in which both say the same. first, second:
    how often the answer that the judge saw first, or second, was preferred in these.
    """

    consistent: float | None = None
    first: int = 0
    second: int = 0


# --- one answer -------------------------------------------------------------------------------------------------------


def rating_asks(answered: Answered, preset: Preset, language: str, repeats: int) -> dict[str, Ask[float]]:
    """What to ask a judge for the rating of the last answer; nothing if it is empty, which has the lowest rating.

    language: the English name of the answers' language.
    """
    if not answered.answers[-1].strip():
        return {}
    messages = single_prompt(preset, answered.questions, answered.answers, answered.references, language=language)
    read = partial(rating_of, single_brackets=preset == "fastchat")
    second = again(messages, "rating")
    return {f"rating/{repeat}": Ask(messages, read, second, repeat) for repeat in range(repeats)}


def rating_grade(verdicts: Sequence[Verdict[float]]) -> Grade:
    """The rating by the repeats' verdicts; the lowest one if none was asked for."""
    if not verdicts:
        return Grade(LOWEST, LOWEST, LOWEST, "no answer")
    found = [one.value for one in verdicts]
    read = [value for value in found if value is not None]
    return Grade(
        sum(read) / len(read) if read else None,
        sum(LOWEST if value is None else value for value in found) / len(found),
        sum(HIGHEST if value is None else value for value in found) / len(found),
    )


# --- two answers ------------------------------------------------------------------------------------------------------


def rule_of(system: str, baseline: str) -> tuple[float, str] | None:
    """What needs no judge: an answer against none, and two equal answers; None for all else."""
    one, other = system.strip(), baseline.strip()
    if one == other:
        return 0.5, "equal answers"
    if not one or not other:
        return float(bool(one)), "no answer of the baseline" if one else "no answer"
    return None


def pair_asks(system: Answered, baseline: Answered, preset: Preset, repeats: int) -> dict[str, Ask[Choice]]:
    """What to ask a judge about two last answers, always in both orders; nothing if a rule settles it."""
    if rule_of(system.answers[-1], baseline.answers[-1]) is not None:
        return {}
    found: dict[str, Ask[Choice]] = {}
    for order in ORDERS:
        both = (system.answers, baseline.answers) if order == "system first" else (baseline.answers, system.answers)
        messages = pair_prompt(preset, system.questions, both, system.references)
        second = again(messages, "choice")
        found |= {f"{order}/{repeat}": Ask(messages, choice_of, second, repeat) for repeat in range(repeats)}
    return found


def pair_grade(system: str, baseline: str, verdicts: Mapping[str, Verdict[Choice]], repeats: int) -> PairGrade:
    """Which answer is better by the verdicts on both orders, named as by `pair_asks`.

    An answer is better if both orders say so; all else is a tie.
    """
    rule = rule_of(system, baseline)
    if rule is not None:
        return PairGrade(rule[0], rule[0], rule[0], rule[1])
    pairs = [tuple(verdicts[f"{order}/{repeat}"].value for order in ORDERS) for repeat in range(repeats)]
    outcomes = [outcomes_of(*pair) for pair in pairs]
    read = [pair for pair in pairs if None not in pair]
    values = [outcome(one, other) for one, other in read]  # type: ignore[arg-type]
    flat = [choice for pair in read for choice in pair]
    return PairGrade(
        sum(values) / len(values) if values else None,
        sum(map(min, outcomes)) / len(outcomes),
        sum(map(max, outcomes)) / len(outcomes),
        None,
        sum(_says(one, False) == _says(other, True) for one, other in read) / len(read) if read else None,
        flat.count("A"),
        flat.count("B"),
    )


def outcome(system_first: Choice, baseline_first: Choice) -> float:
    """1, 1/2 or 0, from the verdicts on both orders."""
    one, other = _says(system_first, False), _says(baseline_first, True)
    return one if one == other else 0.5


def outcomes_of(system_first: Choice | None, baseline_first: Choice | None) -> set[float]:
    """All outcomes that are possible, where a verdict that could not be read may be any."""
    first, second = ((given,) if given is not None else CHOICES for given in (system_first, baseline_first))
    return {outcome(one, other) for one, other in itertools.product(first, second)}


def _says(choice: Choice | None, swapped: bool) -> float:
    """What a verdict says of the system's answer. swapped: it was shown as B."""
    if choice == "C":
        return 0.5
    return float((choice == "A") != swapped)


def recorded(verdicts: Mapping[str, Verdict[Any]]) -> dict[str, Any]:
    """Verdicts with their raw text, as JSON."""
    return {name: one.recorded() for name, one in verdicts.items()}
