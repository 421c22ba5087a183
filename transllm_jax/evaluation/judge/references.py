"""Right answers that a judge sees beside an answer: those of GPT-4 that FastChat publishes, corrected, or none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transllm_jax.data.read.sources import read_jsonl
from transllm_jax.errors import UserError
from transllm_jax.evaluation.judge.corrected_references import CORRECTED

# corrected: those of the given file, with the 13 that are reported wrong replaced. gpt4: the given file as it is.
Choice = Literal["corrected", "gpt4", "none"]
CHOICES: tuple[Choice, ...] = ("corrected", "gpt4", "none")

# Where the published file is: a user gives it, since it is not part of this package.
PUBLISHED = "lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/reference_answer/gpt-4.jsonl"


@dataclass(frozen=True)
class References:
    """Right answers by question id, one for each turn.

    choice: where they are from; `file`: the file of questions. corrected: the ids of ours.
    """

    choice: Choice | Literal["file"]
    by_id: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    corrected: tuple[str, ...] = ()

    def of(self, id: str, turns: int) -> tuple[str, ...] | None:
        """The right answers to the first `turns` turns of a question; None if there are none."""
        found = self.by_id.get(id)
        return None if found is None or len(found) < turns else found[:turns]

    def recorded(self, ids: Collection[str]) -> dict[str, Any]:
        """For the results: how many of the questions have references, and which of them are corrected (JSON)."""
        return {
            "choice": self.choice,
            "questions": sum(id in self.by_id for id in ids),
            "corrected": [id for id in self.corrected if id in ids],
        }


def mt_bench_references(choice: Choice, path: Path | None) -> References:
    """The references of MT-Bench. path: FastChat's file of GPT-4's answers.

    Raises UserError if a choice needs the file and there is none: with the 13 corrected references alone, the other 17
    questions of their categories would be judged by another prompt.
    """
    if choice == "none":
        if path is not None:
            raise UserError("--references none uses no --reference-file; leave one of the two out")
        return References("none")
    if path is None:
        raise UserError(
            f"--references {choice} needs --reference-file, GPT-4's answers to questions 101 to 130 ({PUBLISHED}); "
            "give it, or --references none to judge without right answers"
        )
    found = read_references(path)
    if choice == "gpt4":
        return References("gpt4", found)
    known = {str(id): one.turns for id, one in CORRECTED.items() if str(id) in found}
    return References("corrected", {**found, **known}, tuple(known))


def read_references(path: Path) -> dict[str, tuple[str, ...]]:
    """The answers in a file by question id: FastChat's form (`choices`), or `question_id` (or `id`) and `turns`.

    Raises UserError with file and line for a record of another form.
    """
    rows = read_jsonl(path, {})
    found: dict[str, tuple[str, ...]] = {}
    for row, place in zip(rows, rows.places, strict=True):
        id = row.get("question_id", row.get("id"))
        choices = row.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else row
        turns = first.get("turns") if isinstance(first, dict) else None
        if id is None or not isinstance(turns, list) or not turns or not all(isinstance(text, str) for text in turns):
            raise UserError(f"{place}: a reference answer needs question_id and choices (or turns: a list of texts)")
        if str(id) in found:
            raise UserError(f"{place}: question {id} has a reference answer already; remove one")
        found[str(id)] = tuple(turns)
    return found
