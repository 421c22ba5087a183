"""Who judges, and how: what the suites of a judge get besides other options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transllm_jax.disk import sha256_of
from transllm_jax.errors import UserError
from transllm_jax.evaluation.judge.cache import open_cache
from transllm_jax.evaluation.judge.cost import Spending
from transllm_jax.evaluation.judge.judge import Judge
from transllm_jax.evaluation.judge.model import Model
from transllm_jax.evaluation.judge.prompts import Preset
from transllm_jax.evaluation.judge.references import Choice
from transllm_jax.evaluation.systems.system import Language, System

# Replies of judges to all suites and systems of a directory of results.
CACHE = "verdicts.jsonl"


@dataclass(frozen=True)
class Judging:
    """The judge and its settings.

    judge, against: judge and baseline as they were written; None where nobody judges, and nothing is compared with
    another system. model, baseline: the same, once they are opened. cache: the file of the judge's replies. spending:
    of all suites of the command, with the limit. repeats: verdicts on each answer or pair. asked_in: the language of
    the questions; None: as the file says.
    """

    judge: str | None = None
    against: str | None = None
    model: Model | None = None
    cache: Path = Path(CACHE)
    spending: Spending = field(default_factory=Spending)
    preset: Preset = "fastchat"
    repeats: int = 1
    references: Choice = "corrected"
    reference_file: Path | None = None
    baseline: System | None = None
    asked_in: Language | None = None

    def require(self, suite: str) -> None:
        """Raises UserError if nobody judges."""
        if self.judge is None:
            raise UserError(
                f"the suite {suite} needs a judge; give --judge URL#MODEL (a server with OpenAI's API) or a local "
                "model's directory"
            )

    @contextmanager
    def opened(self, suite: str, say: Callable[[str], None]) -> Iterator[Judge]:
        """The judge with its replies so far."""
        assert self.model is not None, f"{suite}: the judge is not opened"
        with open_cache(self.cache) as cache:
            yield Judge(self.model, cache, self.spending, say, self.repeats)

    def recorded(self) -> dict[str, Any]:
        """For the results (JSON)."""
        return {
            "preset": self.preset,
            "references": self.references,
            "reference_file": None if self.reference_file is None else sha256_of(self.reference_file),
            "baseline": None if self.baseline is None else self.baseline.name,
            "baseline_identity": None if self.baseline is None else dict(self.baseline.identity),
        }
