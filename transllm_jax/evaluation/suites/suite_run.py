"""What a suite is given: a system, a directory, the user's options; and the questions asked so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transllm_jax.config import Language, Prompts
from transllm_jax.data.read.shards import Reading
from transllm_jax.disk import sha256_of_json, whole_lines, write_json, write_text
from transllm_jax.errors import UserError
from transllm_jax.evaluation.suites.judging import Judging
from transllm_jax.evaluation.suites.records import open_records
from transllm_jax.evaluation.suites.results import Results
from transllm_jax.evaluation.systems.system import Asked, System, Turn
from transllm_jax.progress import Progress

# The files of a suite's directory: what was answered, in the order of finishing; the same with scores, in the order of
# the questions; and what follows from it.
ANSWERS, ITEMS, RESULTS = "answers.jsonl", "items.jsonl", "results.json"


@dataclass(frozen=True)
class SuiteOptions:
    """What the user gives, or else the config of the first work directory among the systems.

    text, english_text: text in the target language and in English. pairs: a file of `English<TAB>target` lines.
    instructions: a file of English instructions, in `instruction_field`. limit: the first questions, texts or pairs of
    each file, at most this many. max_new_tokens: of an answer, chain included; max_answer_tokens: of a short answer in
    English. length: tokens of a row of text. judging: the judge, for suites that have one.
    """

    questions: Path | None = None
    text: tuple[Reading, ...] = ()
    english_text: tuple[Reading, ...] = ()
    pairs: Path | None = None
    instructions: Path | None = None
    instruction_field: str = "instruction"
    limit: int | None = None
    max_new_tokens: int = 512
    max_answer_tokens: int = 64
    length: int = 512
    language: Language = field(default_factory=Language)
    prompts: Prompts = field(default_factory=Prompts)
    judging: Judging = field(default_factory=Judging)


@dataclass(frozen=True)
class SuiteRun:
    """One suite on one system.

    directory: where the suite keeps its files. stop: raises Preempted if a stop was requested; given how far the suite
    is, such as `answers of demo: 3 of 9`. first: the directory of the same suite on the first system of the command,
    which is done; None for the first system itself.
    """

    suite: str
    system: System
    directory: Path
    options: SuiteOptions
    progress: Progress
    stop: Callable[[str], None] = lambda where: None
    first: Path | None = None

    def ask(self, asked: Sequence[Asked], name: str = ANSWERS, **made_with: Any) -> dict[str, list[Turn]]:
        """The answered turns of each question, by its id: those of the file `name`, and those that were missing.

        Each answer is in the file when it is there. made_with: what else the answers depend on (JSON). Raises UserError
        if the file was made with something else; Preempted.
        """
        depends = {
            "system": self.system.identity,
            "questions": sha256_of_json([asdict(one) for one in asked]),
            **made_with,
        }
        with (
            open_records(self.directory / name, depends) as records,
            self.progress.task(
                f"{self.suite} of {self.system.name}", total=len(asked), done=len(records), unit="answer"
            ) as bar,
        ):

            def between() -> None:
                self.stop(f"{self.suite} of {self.system.name}: {len(records)} of {len(asked)} questions")

            missing = [one for one in asked if one.id not in records]
            for one, turns in self.system.answers(missing, between, at_once=len(asked)) if missing else ():
                records.add({"id": one.id, "turns": [turn.recorded() for turn in turns]})
                bar.update(len(records))
            return {one.id: [Turn(**turn) for turn in records[one.id]["turns"]] for one in asked}

    def keep(self, items: Iterable[Mapping[str, Any]], results: Results) -> Results:
        """Write items.jsonl, then results.json."""
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        write_text(self.directory / ITEMS, "".join(lines))
        write_json(self.directory / RESULTS, results.recorded())
        return results

    @property
    def made_with(self) -> dict[str, Any]:
        """For `Results.made_with`: the system, and the files and settings that every suite has."""
        return {"system": dict(self.system.identity)}


def read_items(directory: Path) -> list[dict[str, Any]]:
    """The items of a suite that is done. Raises UserError with the place for a line that is no item."""
    path = directory / ITEMS
    found: list[dict[str, Any]] = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            item = json.loads(line)
            _ = item["id"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number} is no item of a suite; remove {directory}, and evaluate the system again"
            ) from None
        found.append(item)
    return found
