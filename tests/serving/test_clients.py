"""Clients that people use, against the server with a scripted engine: they find the answer, the English, the errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import chain_tokenizer
from serving_setup import ScriptedThread, listening, scripted

from transllm_jax.serving.app import Settings

CHAIN = "<EN>Who is it?<RESPONSE>A dog.<TH>หมา"
REASONING = "Question: Who is it?\n\nAnswer: A dog."
KEY = "secret"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    thread = ScriptedThread(chain_tokenizer(tmp_path_factory.mktemp("tokenizer")), CHAIN)
    models = [scripted(thread), scripted(thread, "demo-original", markers=None)]
    with listening(models, Settings(key=KEY)) as found:
        yield f"{found}/v1"


def test_openai(address: str) -> None:
    import openai

    client = openai.OpenAI(base_url=address, api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo", "demo-original"]
    messages: list[dict[str, str]] = [{"role": "user", "content": "ใคร"}]
    whole = client.chat.completions.create(model="demo", messages=messages, max_completion_tokens=100)  # type: ignore
    message = whole.choices[0].message
    assert message.content == "หมา" and whole.choices[0].finish_reason == "stop"
    assert message.model_extra == {"reasoning_content": REASONING, "reasoning": REASONING}
    assert whole.usage.completion_tokens_details.reasoning_tokens and whole.usage.model_extra == {"history": []}
    # The message as the client has it, sent back with everything in it.
    again = [*messages, message.model_dump(), {"role": "user", "content": "อะไร"}]
    longer = client.chat.completions.create(model="demo", messages=again)  # type: ignore[arg-type]
    assert longer.usage.model_extra == {"history": ["reasoning"]}
    stream = client.chat.completions.create(
        model="demo",
        messages=messages,
        stream=True,
        stream_options={"include_usage": True},  # type: ignore
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "หมา"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    text = client.completions.create(model="demo", prompt="Who", max_tokens=50, stop="dog")
    assert text.choices[0].text.endswith("A ")
    for error, options in (
        (openai.NotFoundError, {"model": "gpt"}),
        (openai.BadRequestError, {"model": "demo", "n": 2}),
        (openai.BadRequestError, {"model": "demo", "max_tokens": 10_000}),
        (openai.AuthenticationError, {"model": "demo", "extra_headers": {"Authorization": "Bearer x"}}),
    ):
        with pytest.raises(error) as refused:
            client.chat.completions.create(messages=messages, **options)  # type: ignore[call-overload]
        assert refused.value.body["code"] and refused.value.body["message"]  # type: ignore[index]


def test_litellm(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    options = {
        "model": "openai/demo",
        "api_base": address,
        "api_key": KEY,
        "messages": [{"role": "user", "content": "ใคร"}],
    }
    whole = litellm.completion(**options)
    assert whole.choices[0].message.content == "หมา" and whole.choices[0].message.reasoning_content == REASONING
    chunks = list(litellm.completion(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "หมา"
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**options, max_tokens=10_000)


def test_llm(address: str, tmp_path: Path) -> None:
    """Simon Willison's command line; a second turn sends the first one back."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: demo\n  model_name: demo\n  api_base: {address}\n  api_key_name: demo\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"}

    def llm(*words: str) -> str:
        command = [sys.executable, "-m", "llm", *words]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=120, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return done.stdout

    llm("keys", "set", "demo", "--value", KEY)
    assert "หมา" in llm("-m", "demo", "ใคร")
    assert "หมา" in llm("-m", "demo", "--no-stream", "-c", "อะไร")
