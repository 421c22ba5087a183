"""What a run's numbers say to do next: at most five findings, the most important first.

Each is made from numbers alone, and only if they support it; docs/reading-a-run.md says for each what it means, what to
turn, and which measurement its bound is from. A goal says what was not reached; a finding says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from transllm_jax.evaluation.advice import asked, model, training
from transllm_jax.evaluation.advice.recorded import Finding, Recorded

MOST = 5
# In the order of importance: what makes everything after it useless comes first.
CHECKS: tuple[Callable[[Recorded], Iterator[Finding]], ...] = (
    training.skipped,
    training.rising_loss,
    training.flat_loss,
    model.chains,
    asked.wrong_answers,
    model.fluency,
    model.translation,
    model.english,
    model.initial_rows,
    model.vocabulary,
    model.recovered,
    training.early_best,
    training.repeated_text,
    training.padding,
    model.time_spent,
)


def findings(run: Recorded) -> list[Finding]:
    """The findings of a run, at most one on each topic, and at most `MOST`; none if all is well."""
    found: dict[str, Finding] = {}
    for check in CHECKS:
        for finding in check(run):
            found.setdefault(finding.topic, finding)
    return list(found.values())[:MOST]
