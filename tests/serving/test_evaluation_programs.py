"""What evaluation programs send to the server, and how they read its answers; and our task for one of them.

The programs are no dependencies. Their requests are written here as lighteval 0.13.0 (litellm 1.89.2) sent them, and as
the sources of lm-evaluation-harness 0.4.13 and SEA-HELM 1.2.0 write them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx2
import pytest
from scripted import chain_tokenizer
from serving_setup import ScriptedThread, listening, scripted

from transllm_jax.serving.app import Settings
from transllm_jax.tokenizer.tokenizer import Tokenizer

CHAIN = "<EN>Who is it, and where do they live?<RESPONSE>It is a dog, and it lives in a house.<TH>หมา"
TASK = Path(__file__).parents[2] / "examples" / "lighteval_task.py"
USER = {"role": "user", "content": "ใคร"}
REQUESTS: dict[str, Mapping[str, Any]] = {
    "lm-evaluation-harness": {"max_tokens": 32, "temperature": 0, "stop": ["\n\n"], "seed": 1234},
    "lighteval": {
        "logprobs": False,
        "max_completion_tokens": 32,
        "max_tokens": 32,
        "n": 1,
        "response_format": {"type": "text"},
        "stop": [],
        "temperature": 0,
    },
    "SEA-HELM": {"max_tokens": 32, "seed": 1234},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chain_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("program", REQUESTS)
def test_the_visible_answer_arrives_within_a_tasks_own_limit(tokenizer: Tokenizer, program: str) -> None:
    assert len(tokenizer.encode(CHAIN)) > 32
    body = {"model": "demo", "messages": [USER], **REQUESTS[program]}
    for more, whole in ((0, False), (512, True)):
        with listening([scripted(ScriptedThread(tokenizer, CHAIN))], Settings(reasoning_tokens=more)) as address:
            found = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        choice = found["choices"][0]
        assert choice["finish_reason"] == ("stop" if whole else "length")
        assert (choice["message"]["content"] == "หมา") == whole
        # What they read besides.
        assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= found["usage"].keys()
        assert "Who is it" in choice["message"]["reasoning"] and choice["logprobs"] is None and choice["index"] == 0


@pytest.fixture
def lighteval(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of lighteval, objects that keep what they are given."""
    names = {
        "metrics.metrics_sample": {"SampleLevelComputation": object},
        "metrics.utils.metric_utils": {"SampleLevelMetric": SimpleNamespace},
        "models.model_output": {"ModelResponse": SimpleNamespace},
        "tasks.lighteval_task": {"LightevalTaskConfig": SimpleNamespace},
        "tasks.requests": {"Doc": SimpleNamespace, "SamplingMethod": SimpleNamespace(GENERATIVE="generative")},
    }
    for name, members in names.items():
        module = ModuleType(f"lighteval.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def load_task() -> Any:
    spec = importlib.util.spec_from_file_location("lighteval_task", TASK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("lighteval")
def test_the_task_reads_a_file_of_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {"question": "ใคร", "answers": ["หมา", "สุนัข"], "kind": "who", "question_en": ["Who?"], "answers_en": ["a dog"]},
        {"question": "แล้วเขาล่ะ", "answers": ["แมว"], "history": [USER, {"role": "assistant", "content": "หมา"}]},
        {"question": "ที่ไหน", "answers": ["Bangkok"]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    monkeypatch.setenv("QUESTIONS", str(path))
    (task,) = load_task().TASKS_TABLE
    (file,) = Path(task.hf_repo).iterdir()
    asked = [task.prompt_function(json.loads(line), "questions|0") for line in file.read_text("utf-8").splitlines()]
    assert [(doc.query, doc.choices, doc.gold_index) for doc in asked] == [
        ("ใคร", ["หมา", "สุนัข"], [0, 1]),
        ("ที่ไหน", ["Bangkok"], [0]),
    ]
    assert task.name == "questions" and task.evaluation_splits == [file.stem]
    (metric,) = task.metrics

    def score(number: int, answer: str) -> int:
        doc = SimpleNamespace(get_golds=lambda: asked[number].choices)
        return metric.sample_level_fn.compute(doc, SimpleNamespace(final_text=[answer]))

    assert score(0, "มันคือสุนัข") == 1 and score(0, "แมว") == 0 and score(1, "in BANGKOK.") == 1 and score(1, "") == 0
    assert metric.category == "generative" and metric.corpus_level_fn([0, 1]) == 0.5


@pytest.mark.usefixtures("lighteval")
@pytest.mark.parametrize("path", ["", "no-such-file.jsonl"])
def test_a_task_without_its_file_says_what_to_set(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUESTIONS", path)
    with pytest.raises(SystemExit, match="QUESTIONS names no file; set it"):
        load_task()
