"""Findings about the questions with known answers: the step of the chain in which most wrong answers went wrong."""

from __future__ import annotations

from collections.abc import Iterator

from transllm_jax.evaluation.advice.recorded import Finding, Recorded
from transllm_jax.evaluation.answers import total
from transllm_jax.evaluation.page.measures import number, percent, section

# Fewer questions, or a smaller share of them that failed in one way, say little.
LEAST_QUESTIONS, FAILED = 20, 0.2


def wrong_answers(run: Recorded) -> Iterator[Finding]:
    """The most frequent reason of wrong answers, if it is frequent. A broken form is found by `model.chains`."""
    counts = total({kind: section(section(run.asked, "transfer"), kind) for kind in section(run.asked, "transfer")})
    asked = number(counts.get("asked"))
    if not asked or asked < LEAST_QUESTIONS:
        return
    reasons = ("form", "misread", "english", "translation")
    failed, reason = max((counts.get(name, 0), name) for name in reasons)
    if failed < FAILED * asked:
        return
    share, language = f"{percent(failed / asked)} of {asked:.0f} questions", run.language()
    if reason == "misread":
        yield Finding(
            "Questions are misread",
            "transfer",
            f"{share} became another question in the chain's English, and got a wrong answer.",
            f"Teach it to translate from {language} first: more pairs that are like the questions, and more steps.",
            ("translate.steps", "translate.sources", "recover.instructions"),
        )
    elif reason == "english":
        yield Finding(
            "English answers in chains are wrong",
            "transfer",
            f"{share} were understood, and answered wrongly in English; {_in_english(counts)}.",
            "If it knows them when it is asked in English, raise the share of English answers or lower the learning "
            "rate; if not, the original may not know them.",
            ("transfer.english", "transfer.learning_rate", "recover.instructions"),
        )
    elif reason == "translation":
        yield Finding(
            "Answers are mistranslated",
            "transfer",
            f"{share} were answered rightly in English, and the chain's {language} does not say so.",
            f"Teach it to translate into {language}: more pairs that hold such answers, more chains, or a larger share "
            "of translations.",
            ("recover.instructions", "transfer.translations", "translate.steps"),
        )


def _in_english(counts: dict[str, int]) -> str:
    return f"asked in English, {counts['right_in_english']} of {counts['asked_in_english']} are right"
