"""Questions with known answers as a task of lighteval: `--custom-tasks examples/lighteval_task.py questions`.

The environment variable QUESTIONS names the file, with the records of `evaluation.answers`, because lighteval gives a
task no options. Questions with earlier turns are left out. An answer is right if an accepted text occurs in it.
(`transllm evaluate` is stricter: it wants whole words.)
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lighteval.metrics.metrics_sample import SampleLevelComputation
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc, SamplingMethod

QUESTIONS = Path(os.environ.get("QUESTIONS", ""))
if not QUESTIONS.is_file():
    raise SystemExit("QUESTIONS names no file; set it to one such as runs/text/th/questions.jsonl")

# lighteval 0.13 loads data sets and directories, but no single file.
directory = tempfile.TemporaryDirectory()
with (Path(directory.name) / "test.jsonl").open("w", encoding="utf-8") as asked:
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if not record.get("history"):
            print(json.dumps({name: record[name] for name in ("question", "answers")}), file=asked)


class Right(SampleLevelComputation):
    """1 if an accepted text occurs in the answer, in any case; else 0."""

    def compute(self, doc: Doc, model_response: ModelResponse, **others: Any) -> int:
        answer = model_response.final_text[0].casefold()
        return int(any(text.casefold() in answer for text in doc.get_golds()))


def question(record: dict[str, Any], task_name: str) -> Doc:
    """What is asked, and the accepted texts."""
    accepted = record["answers"]
    return Doc(task_name=task_name, query=record["question"], choices=accepted, gold_index=list(range(len(accepted))))


TASKS_TABLE = [
    LightevalTaskConfig(
        name="questions",
        prompt_function=question,
        hf_repo=directory.name,
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        generation_size=256,
        metrics=[
            SampleLevelMetric(
                metric_name="right",
                higher_is_better=True,
                category=SamplingMethod.GENERATIVE,
                sample_level_fn=Right(),
                corpus_level_fn=np.mean,
            )
        ],
    )
]
