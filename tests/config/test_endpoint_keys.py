"""The sections of other engines: what is refused, and that no message shows what may be a secret."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from transllm_jax.config import load_config
from transllm_jax.errors import UserError

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{model: m}", "give one of the two, endpoint (the URL of a server) or batch (a directory)"),
        ("{endpoint: 'http://h/v1', batch: d, model: m}", "give one of the two"),
        ("{endpoint: 'http://h/v1'}", "recover.teacher.model: missing"),
        ("{endpoint: 'http://h/v1', model: ' '}", "model is empty"),
        ("{endpoint: h/v1, model: m}", "endpoint is not the URL of a server, such as http://localhost:8000/v1"),
        ("{endpoint: 'ftp://h/v1', model: m}", "endpoint is not the URL"),
        ("{endpoint: 'http://h:port/v1', model: m}", "endpoint is not the URL"),
        ("{endpoint: 'http://:80/v1', model: m}", "endpoint is not the URL"),
        ("{endpoint: 'http://h/v1/chat/completions', model: m}", "endpoint ends before /chat/completions"),
        ("{batch: d, model: m, timeout: 3}", "timeout is for an endpoint; with batch, remove it"),
        ("{batch: d, model: m, key: A_KEY}", "key is for an endpoint; with batch, remove it"),
        ("{endpoint: 'http://h/v1', model: m, concurrency: 0}", "concurrency: Input should be greater than 0"),
        ("{endpoint: 'http://h/v1', model: m, timeout: 0}", "timeout: Input should be greater than 0"),
        ("{endpoint: 'http://h/v1', model: m, body: {stream: true}}", "body: 'stream' is set by the run"),
        ("{endpoint: 'http://h/v1', model: m, concurency: 3}", "unknown key; did you mean 'concurrency'?"),
        ("{endpoint: 'http://h/v1', model: m, prompt: a}", "unknown key"),
    ],
)
def test_what_a_teacher_may_not_be(given: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        load_config(DEMO, [f"recover.teacher={given}"])
    assert "recover.teacher" in str(raised.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{endpoint: 'https://h/v1', model: m, key: sk-s3cret}", "key is the name of an environment variable"),
        ("{endpoint: 'https://h/v1', model: m, key: hf_s3cret}", "key is the name of an environment variable"),
        ("{endpoint: 'https://me:s3cret@h/v1', model: m}", "endpoint holds a user name or a password"),
        ("{endpoint: 'https://s3cret@h/v1', model: m}", "endpoint holds a user name or a password"),
        ("{endpoint: 'https://h/v1?key=s3cret', model: m}", "endpoint goes on after ? or #"),
        ("{endpoint: 'https://h/v1#s3cret', model: m}", "endpoint goes on after ? or #"),
        ("{endpoint: 'https://h/v 1s3cret', model: m}", "endpoint is not the URL"),
    ],
)
def test_secrets_are_refused_and_not_shown(given: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        load_config(DEMO, [f"recover.teacher={given}"])
    assert "s3cret" not in str(raised.value)


def test_a_translator_is_for_what_is_missing() -> None:
    engine = "translator: {endpoint: 'http://h/v1', model: m}"
    read = load_config(DEMO, [f"recover.translate_answers={{{engine}}}"]).recover
    assert read.translate_answers.missing == "endpoint" and read.translate_instructions.translator is None
    assert read.translate_answers.translator is not None and "{text}" in read.translate_answers.translator.prompt
    written = load_config(DEMO, [f"recover.translate_answers={{missing: endpoint, {engine}, file: a.jsonl}}"])
    assert written.recover.translate_answers.file == "a.jsonl"
    for given, said in (
        (
            f"{{missing: model, {engine}}}",
            "missing: endpoint and translator (an endpoint and its model) need each other",
        ),
        (f"{{missing: drop, file: a, {engine}}}", "need each other"),
        ("{missing: endpoint}", "need each other"),
        ("{missing: drop}", "or 'endpoint', not 'drop'"),
        (f"{{{engine[:-1]}, prompt: Translate.}}}}", "prompt lacks {text}, which the text replaces"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            load_config(DEMO, [f"recover.translate_answers={given}"])


def test_what_a_run_used_is_a_config_itself(tmp_path: Path) -> None:
    given = "{endpoint: 'http://h/v1', model: m, key: A_KEY, body: {a: {b: [1, null]}, temperature: null}}"
    first = load_config(DEMO, [f"recover.teacher={given}"])
    path = tmp_path / "run.yaml"
    path.write_text(first.to_yaml(), encoding="utf-8")
    assert load_config(path) == first and first.recover.teacher is not None
    assert first.recover.teacher.body == {"a": {"b": [1, None]}, "temperature": None} and first.recover.teacher.check
