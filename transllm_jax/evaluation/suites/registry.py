"""The suites by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from transllm_jax.errors import UserError
from transllm_jax.evaluation.suites import answers, judged, perplexity, retention, safety, translation
from transllm_jax.evaluation.suites.measure import Measure
from transllm_jax.evaluation.suites.results import Results
from transllm_jax.evaluation.suites.suite_run import SuiteOptions, SuiteRun
from transllm_jax.evaluation.systems.system import System


@dataclass(frozen=True)
class Suite:
    """A suite.

    run: measures a system; it goes on with what a stopped or killed run left, and writes items.jsonl and results.json.
    measures: what is compared between two systems, from their items; the first is the suite's own. check: raises
    UserError for options that are missing or wrong, before the first suite begins; check_system: for a system that the
    suite cannot measure. texts: what may not occur in training data, each with the id of its item: as a whole, or half
    of it (`data/clean/contamination.py`) unless `whole`. open: whether it has questions of its own, and
    not those with known answers that a config names.
    """

    what: str
    run: Callable[[SuiteRun], Results]
    measures: tuple[Measure, ...]
    check: Callable[[SuiteOptions], None] = lambda options: None
    check_system: Callable[[System], None] = lambda system: None
    texts: Callable[[SuiteOptions], Iterable[tuple[str, str]]] = lambda options: ()
    whole: bool = True
    open: bool = False


SUITES: dict[str, Suite] = {
    "answers": Suite(
        "questions with known answers, in both languages",
        answers.run,
        answers.MEASURES,
        answers.check,
        texts=answers.texts,
    ),
    "perplexity": Suite(
        "bits per byte of text, in both languages",
        perplexity.run,
        perplexity.MEASURES,
        perplexity.check,
        perplexity.check_system,
        texts=lambda options: perplexity.documents(options).items(),
        whole=False,
    ),
    "translation": Suite(
        "chrF, chrF++ and spBLEU of pairs, in both directions",
        translation.run,
        translation.MEASURES,
        translation.check,
        texts=translation.texts,
    ),
    "retention": Suite(
        "what the transfer cost in English",
        retention.run,
        retention.MEASURES,
        retention.check,
        retention.check_system,
    ),
    **{
        suite.name: Suite(what, suite.run, judged.MEASURES, suite.check, texts=suite.texts, open=True)
        for suite, what in (
            (judged.MT_BENCH, "MT-Bench's questions of two turns, rated by a judge"),
            (judged.ALPACA_EVAL, "AlpacaEval's questions, compared by a judge with a baseline"),
            (judged.QUESTIONS, "any open questions of one turn or more, rated by a judge"),
        )
    },
    "safety": Suite(
        "harmful requests: are they refused?",
        safety.run,
        safety.MEASURES,
        safety.check,
        texts=safety.texts,
        open=True,
    ),
}


def suite_named(name: str) -> Suite:
    """The suite of a name. Raises UserError if there is none."""
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}; choose from {', '.join(SUITES)}")
    return SUITES[name]
