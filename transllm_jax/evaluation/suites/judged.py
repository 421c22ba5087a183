"""The suites `mt_bench`, `alpaca_eval` and `questions`: open questions of one or more turns; a judge grades answers.

Each turn of a question is an item. A judge rates it from 1 to 10; with a baseline, it also says which of two answers is
better, in both orders. Every turn counts: one without an answer has the lowest rating and loses, and where a verdict
could not be read, `worst` and `best` say what it might have changed. The intervals hold all that it might.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transllm_jax.errors import UserError
from transllm_jax.evaluation.in_language import Letters
from transllm_jax.evaluation.judge.grading import (
    Answered,
    pair_asks,
    pair_grade,
    rating_asks,
    rating_grade,
    recorded,
)
from transllm_jax.evaluation.judge.judge import Ask, Judge, Verdict
from transllm_jax.evaluation.judge.references import References, mt_bench_references
from transllm_jax.evaluation.statistics import mean_interval
from transllm_jax.evaluation.suites.judging import Judging
from transllm_jax.evaluation.suites.measure import by_group, clusters_of, mean_of, measured
from transllm_jax.evaluation.suites.question_file import OpenQuestion, read_open_questions
from transllm_jax.evaluation.suites.results import Results
from transllm_jax.evaluation.suites.suite_run import SuiteOptions, SuiteRun
from transllm_jax.evaluation.systems.system import Asked, Turn
from transllm_jax.generation.sampling import Sampling

# Of the answers, by category, as in FastChat; all others are greedy.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}

MEASURES = (
    mean_of("rating"),
    mean_of("win rate", "win", percent=True),
    mean_of("position consistency", "consistent", percent=True),
    mean_of("in the language", "in_language", percent=True),
    mean_of("baseline in the language", "baseline_in_language", percent=True),
    mean_of("characters"),
    mean_of("characters more than the baseline", "longer"),
)

_Verdicts = Mapping[str, Verdict[Any]]


@dataclass(frozen=True)
class JudgedSuite:
    """A suite of open questions.

    mt_bench: with its ids, categories and references. pairs_only: no ratings, unless the preset knows nothing else.
    """

    name: str
    mt_bench: bool = False
    pairs_only: bool = False

    def check(self, options: SuiteOptions) -> None:
        """Raises UserError if the judge, the questions, or what they need is missing."""
        judging = options.judging
        judging.require(self.name)
        self.questions(options)
        self._references(options)
        if self._pairs_alone(judging) and judging.against is None:
            raise UserError(
                f"the suite {self.name} compares answers with those of a baseline; give --baseline SYSTEM, such as "
                "WORKDIR#original or answers:FILE"
            )
        if judging.preset != "fastchat" and judging.against is not None:
            raise UserError(f"--preset {judging.preset} grades single answers only; leave --baseline out")

    def questions(self, options: SuiteOptions) -> list[OpenQuestion]:
        """What is asked."""
        if options.questions is None:
            raise UserError(f"the suite {self.name} needs a file of questions; give --questions FILE")
        asked_in = options.judging.asked_in
        return read_open_questions(
            options.questions, options.language, asked_in=asked_in, mt_bench=self.mt_bench, limit=options.limit
        )

    def texts(self, options: SuiteOptions) -> list[tuple[str, str]]:
        """The first turns: what may not occur in training data."""
        return [(one.id, one.turns[0]) for one in self.questions(options)]

    def run(self, work: SuiteRun) -> Results:
        """Ask, judge, and keep what was found."""
        options, judging = work.options, work.options.judging
        questions, references = self.questions(options), self._references(options)
        asked = [_asked(one, options) for one in questions]
        turns = work.ask(asked)
        others: dict[str, list[Turn]] | None = None
        if judging.baseline is not None:
            # In a directory of its own, so that the answers are there for all systems.
            place = work.directory.parent.parent / judging.baseline.name / work.suite
            others = replace(work, system=judging.baseline, directory=place).ask(asked)
        rows = [
            _Row(one, number, turns[one.id], None if others is None else others[one.id], references)
            for one in questions
            for number in range(1, len(one.turns) + 1)
        ]
        asks: dict[str, Ask[Any]] = {}
        for row in rows:
            if not self._pairs_alone(judging):
                found: dict[str, Ask[Any]] = {
                    **rating_asks(row.mine, judging.preset, _spoken(row, options), judging.repeats)
                }
                asks |= {f"{row.id}/{name}": ask for name, ask in found.items()}
            if row.baseline is not None:
                pairs = pair_asks(row.mine, row.baseline, judging.preset, judging.repeats)
                asks |= {f"{row.id}/{name}": ask for name, ask in pairs.items()}
        with judging.opened(self.name, work.progress.say) as judge:
            verdicts = ask_judge(work, judge, asks)
            made_with = {**work.made_with, **judge.recorded(), **judging.recorded()}
        letters = Letters(options.language.code, options.language.scripts)
        rated = not self._pairs_alone(judging)
        items = [row.item(verdicts, judging.repeats, letters, rated=rated) for row in rows]
        made_with["references"] = references.recorded([one.id for one in questions])
        made_with["max_new_tokens"] = options.max_new_tokens
        return work.keep(items, self._results(work, items, verdicts, made_with, letters))

    def _results(
        self,
        work: SuiteRun,
        items: Sequence[Mapping[str, Any]],
        verdicts: _Verdicts,
        made_with: dict[str, Any],
        letters: Letters,
    ) -> Results:
        rated = not self._pairs_alone(work.options.judging)
        name, field = ("rating", "rating") if rated else ("win rate", "win")
        more = measured(MEASURES, items)
        main = more.pop(name)
        clusters = clusters_of(item["cluster"] for item in items)
        # As the measure itself: with repeats, a win rate has values between 0, ½ and 1.
        ends = [
            mean_interval([item[f"{field}_{end}"] for item in items], clusters, share=not rated)
            for end in ("low", "high")
        ]
        unread = [item["id"] for item in items if item[field] is None]
        cut_off = sum(bool(item["turns"][-1]["cut_off"]) for item in items)
        counts: dict[str, Any] = {
            "questions": len({item["cluster"] for item in items}),
            "verdicts": len(verdicts),
            "verdicts that could not be read": sum(one.value is None for one in verdicts.values()),
            "without a verdict": unread,
            "asked for the second time": sum(len(one.raw) > 1 for one in verdicts.values()),
            "settled without the judge": dict(
                Counter(item[f"{field}_rule"] for item in items if item[f"{field}_rule"])
            ),
            "cut off": cut_off,
        }
        if work.options.judging.baseline is not None:
            preferred = {end: sum(item[f"prefers_{end}"] for item in items) for end in ("first", "second")}
            counts["preferred"] = preferred
        if rated and work.options.judging.repeats > 1:
            counts["rating by repeat"] = _by_repeat(verdicts, work.options.judging.repeats)
        groups = by_group(MEASURES, items, lambda item: item["category"])
        groups |= by_group(MEASURES, items, lambda item: f"turn {item['turn']}")
        return Results(
            suite=work.suite,
            system=work.system.name,
            measure=name,
            score=None if main is None else main["value"],
            interval=(ends[0].low, ends[1].high),
            asked=len(items),
            parsed=len(items) - len(unread),
            worst=ends[0].value,
            best=ends[1].value,
            more={**{key: value for key, value in more.items() if value is not None}, **counts},
            groups=groups,
            made_with=made_with,
            notes=_notes(work, name, items, unread, ends[0].value, ends[1].value, cut_off, letters),
        )

    def _pairs_alone(self, judging: Judging) -> bool:
        return self.pairs_only and judging.preset == "fastchat"

    def _references(self, options: SuiteOptions) -> References:
        judging = options.judging
        if self.mt_bench:
            return mt_bench_references(judging.references, judging.reference_file)
        own = {one.id: one.references for one in self.questions(options) if one.references is not None}
        return References("none") if judging.references == "none" else References("file", own)


@dataclass(frozen=True)
class _Row:
    """A turn of a question, from 1, with the answers to it and to the turns before."""

    question: OpenQuestion
    turn: int
    turns: Sequence[Turn]
    others: Sequence[Turn] | None
    references: References

    @property
    def id(self) -> str:
        return f"{self.question.id}/{self.turn}"

    @property
    def mine(self) -> Answered:
        return self._answered(self.turns)

    @property
    def baseline(self) -> Answered | None:
        return None if self.others is None else self._answered(self.others)

    def _answered(self, turns: Sequence[Turn]) -> Answered:
        # What a judge sees of an answer is what the user reads, never the chain.
        answers = tuple(turn.visible for turn in turns[: self.turn])
        return Answered(self.question.turns[: self.turn], answers, self.references.of(self.question.id, self.turn))

    def item(self, verdicts: _Verdicts, repeats: int, letters: Letters, *, rated: bool) -> dict[str, Any]:
        """All that is known of it, for items.jsonl."""
        own = {
            name.removeprefix(f"{self.id}/"): one for name, one in verdicts.items() if name.startswith(f"{self.id}/")
        }
        mine, baseline = self.mine, self.baseline
        answer = mine.answers[-1]
        found: dict[str, Any] = {
            "id": self.id,
            "cluster": self.question.id,
            "score": None,
            "category": self.question.category,
            "turn": self.turn,
            "language": self.question.language,
            "questions": list(mine.questions),
            "turns": [turn.recorded() for turn in self.turns[: self.turn]],
            "references": None if mine.references is None else list(mine.references),
            "in_language": self._in_language(answer, letters),
            "characters": len(answer),
        }
        if rated:
            grade = rating_grade([one for name, one in own.items() if name.startswith("rating/")])
            found |= {"rating": grade.value, "rating_low": grade.low, "rating_high": grade.high}
            found |= {"rating_rule": grade.by_rule, "score": grade.value}
        if baseline is not None:
            other = baseline.answers[-1]
            pair = pair_grade(answer, other, own, repeats)
            found |= {"win": pair.value, "win_low": pair.low, "win_high": pair.high, "win_rule": pair.by_rule}
            found |= {"consistent": pair.consistent, "prefers_first": pair.first, "prefers_second": pair.second}
            found |= {"baseline": list(baseline.answers), "baseline_in_language": self._in_language(other, letters)}
            found |= {"longer": len(answer) - len(other), "score": pair.value}
        return {**found, "verdicts": recorded(own)}

    def _in_language(self, answer: str, letters: Letters) -> bool | None:
        if not answer.strip():
            return False if letters.tell else None
        return letters.are_english(answer) if self.question.language == "english" else letters.mostly(answer)


def ask_judge(work: SuiteRun, judge: Judge, asks: Mapping[str, Ask[Any]]) -> dict[str, Verdict[Any]]:
    """The verdicts, with a bar; a stop keeps those that are there."""
    with work.progress.task(f"verdicts on {work.system.name}", total=len(asks), unit="verdict") as bar:
        done = 0

        def count(verdicts: int) -> None:
            nonlocal done
            done = verdicts
            bar.update(verdicts)

        where = f"{work.suite} of {work.system.name}"
        verdicts = judge.verdicts(asks, lambda: work.stop(f"{where}: {done} of {len(asks)} verdicts"), count)
        bar.update(len(asks))  # equal prompts were asked once
        return verdicts


def _by_repeat(verdicts: _Verdicts, repeats: int) -> list[float | None]:
    """The mean rating of each repeat, of those that could be read: how much the judge differs from itself."""
    found: list[float | None] = []
    for repeat in range(repeats):
        values = [
            one.value for name, one in verdicts.items() if name.endswith(f"/rating/{repeat}") and one.value is not None
        ]
        found.append(sum(values) / len(values) if values else None)
    return found


def _asked(one: OpenQuestion, options: SuiteOptions) -> Asked:
    sampling = Sampling(TEMPERATURES.get(one.category, 0.0)).for_row(one.id)
    return Asked(one.id, one.turns, one.language, options.max_new_tokens, sampling)


def _spoken(row: _Row, options: SuiteOptions) -> str:
    return "English" if row.question.language == "english" else options.language.name


def _notes(
    work: SuiteRun,
    name: str,
    items: Sequence[Mapping[str, Any]],
    unread: Sequence[str],
    worst: float,
    best: float,
    cut_off: int,
    letters: Letters,
) -> list[str]:
    system, options, found = work.system.name, work.options, []
    if unread:
        found.append(
            f"{system}: {len(unread)} without a {name}, because no verdict could be read: it is {worst:.3g} if all of "
            f"them were as bad as can be, and {best:.3g} if as good"
        )
    if silent := sum(item["turns"][-1]["error"] is not None for item in items):
        found.append(f"{system}: {silent} of {len(items)} turns have no answer; they have the lowest rating, and lose")
    if cut_off:
        limit = f"{options.max_new_tokens} tokens (--max-new-tokens)"
        found.append(f"{system}: {cut_off} of all answers cut off at {limit}")
    if not letters.tell:
        found.append(
            f"{options.language.name} and English have the same letters: the language of answers is not measured"
        )
    return found


MT_BENCH = JudgedSuite("mt_bench", mt_bench=True)
ALPACA_EVAL = JudgedSuite("alpaca_eval", pairs_only=True)
QUESTIONS = JudgedSuite("questions")
