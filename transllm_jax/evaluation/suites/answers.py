"""Suite `answers`: questions with known answers, asked in the target language and, where the file has them, in English.

The score is the share of questions that are answered rightly in the target language, of all that were asked. Where a
system answers in chains, or through a bridge, wrong answers are counted by where they failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transllm_jax.data.clean.cleaning import text_of
from transllm_jax.data.read.questions import Question, read_questions
from transllm_jax.errors import UserError
from transllm_jax.evaluation.answers import REASONS
from transllm_jax.evaluation.asked import Asking
from transllm_jax.evaluation.suites.measure import by_group, mean_of, measured
from transllm_jax.evaluation.suites.results import Results
from transllm_jax.evaluation.suites.suite_run import SuiteOptions, SuiteRun
from transllm_jax.evaluation.systems.system import Asked, Turn
from transllm_jax.tokenizer.chat import Message

MEASURES = (
    mean_of("right", percent=True),
    mean_of("right in English", "right_english", percent=True),
    mean_of("question understood", "understood", percent=True),
    mean_of("right in the chain's English", "chain_english", percent=True),
)


def check(options: SuiteOptions) -> None:
    """Raises UserError if the file of questions is missing or wrong."""
    questions(options)


def questions(options: SuiteOptions) -> list[Question]:
    """The questions that are asked."""
    if options.questions is None:
        raise UserError("the suite answers needs questions with known answers; give --questions FILE")
    return list(read_questions(options.questions))[: options.limit]


def texts(options: SuiteOptions) -> list[tuple[str, str]]:
    """The questions as they would stand in training data: (id, text), with the turns before them."""
    found = []
    for number, one in enumerate(questions(options), 1):
        found.append((str(number), text_of(one.asked)))
        for wording in one.wordings:
            found.append((str(number), text_of([*one.history_en, Message(role="user", content=wording)])))
    return found


def run(suite: SuiteRun) -> Results:
    """Ask, judge, and keep what was found."""
    options = suite.options
    given = questions(options)
    turns = suite.ask([*_in_target(given, options), *in_english(given, options)])
    items = _items(given, turns, read_all(options))
    found = measured(MEASURES, items)
    right = found["right"]
    unanswered = sum(item["error"] is not None for item in items)
    total = sum(item["right"] for item in items)
    asked = len(items)
    reasons = {reason: sum(item.get("reason") == reason for item in items) for reason in REASONS}
    return suite.keep(
        items,
        Results(
            suite=suite.suite,
            system=suite.system.name,
            measure="right",
            score=right["value"],
            interval=(right["low"], right["high"]),
            asked=asked,
            parsed=asked - unanswered,
            worst=total / asked,
            best=(total + unanswered) / asked,
            more={
                **{name: interval for name, interval in found.items() if interval is not None and name != "right"},
                "asked in English": sum(item["english"] is not None for item in items),
                **({"wrong because": reasons} if any("reason" in item for item in items) else {}),
                "continued chains": sum(item["how"] == "continued" for item in items),
                "cut off": sum(item["cut_off"] for item in items),
            },
            groups=by_group(MEASURES[:2], items, lambda item: item["kind"]),
            made_with={**suite.made_with, "max_new_tokens": options.max_new_tokens},
        ),
    )


def read_all(options: SuiteOptions) -> list[Question]:
    """All questions of the file: an answer is judged beside the answers to all of them."""
    assert options.questions is not None
    return list(read_questions(options.questions))


def _in_target(given: Sequence[Question], options: SuiteOptions) -> list[Asked]:
    return [
        Asked(
            id=str(number),
            turns=(one.question,),
            max_new_tokens=options.max_new_tokens,
            history=one.history,
            history_en=one.history_en,
        )
        for number, one in enumerate(given, 1)
    ]


def in_english(given: Sequence[Question], options: SuiteOptions) -> list[Asked]:
    """The questions that have an English wording, in English."""
    return [
        Asked(
            id=f"{number}/en",
            turns=(one.wordings[0],),
            language="english",
            max_new_tokens=options.max_answer_tokens,
            history=one.history_en,
        )
        for number, one in enumerate(given, 1)
        if one.wordings
    ]


def _items(
    given: Sequence[Question], turns: dict[str, list[Turn]], everything: Sequence[Question]
) -> list[dict[str, Any]]:
    numbers = range(1, len(given) + 1)
    target = [turns[str(number)][0] for number in numbers]
    english = [turns[f"{number}/en"][0] if f"{number}/en" in turns else None for number in numbers]
    if all(turn is None or turn.error is not None for turn in english):
        english = [None] * len(english)  # a file of answers in the target language alone
    in_chains = any(turn.how is not None for turn in target)
    asking = Asking(everything, len(given), in_chains=in_chains)
    rows = asking.judged(
        [asdict(turn) for turn in target], [None if turn is None else turn.visible for turn in english]
    )
    items = []
    for number, one, row, turn, en in zip(numbers, given, rows, target, english, strict=True):
        item = {
            "id": str(number),
            "score": float(row["right"]),
            "right_english": None if row["english"] is None else row["english"]["right"],
            "accepted": list(one.answers),
            **row,
            "prompt": turn.prompt,
            "how": turn.how,
            "cut_off": turn.cut_off,
            "error": turn.error,
        }
        if en is not None:
            item["english"] |= {"prompt": en.prompt, "raw": en.raw, "visible": en.visible, "error": en.error}
        items.append(item)
    return items
