"""What clients send wrong: each gets the right status and an error as JSON, and the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import chain_tokenizer
from serving_setup import ScriptedThread, chat, events, listening, scripted

from transllm_jax.generation.sampling import GREEDY
from transllm_jax.serving.app import Settings
from transllm_jax.serving.history import read_reasoning
from transllm_jax.serving.metrics import Metrics
from transllm_jax.serving.protocol import ApiError, read_body, read_chat, read_completion
from transllm_jax.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chain_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def thread(tokenizer: Tokenizer) -> ScriptedThread:
    return ScriptedThread(tokenizer, "A dog.")


@pytest.fixture(scope="module")
def address(thread: ScriptedThread) -> Iterator[str]:
    with listening([scripted(thread)]) as found:
        yield found


USER = {"role": "user", "content": "Who?"}
WRONG: dict[str, tuple[Any, str | None]] = {
    "no messages": ({}, "messages"),
    "empty": ({"messages": []}, "messages"),
    "a text": ({"messages": "Who?"}, "messages"),
    "a message that is none": ({"messages": ["Who?"]}, "messages[0]"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role"),
    "odd role": ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages[1].role"),
    "a call": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
    ),
    "answered": ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "messages"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    **{
        f"{name}={value!r}": ({"messages": [USER], name: value}, name)
        for name, value in [
            ("n", 2),
            ("n", "x"),
            ("tools", [{"type": "function"}]),
            ("functions", [{}]),
            ("tool_choice", "required"),
            ("logprobs", True),
            ("response_format", {"type": "json_object"}),
            ("response_format", "json"),
            ("temperature", -1),
            ("temperature", 2.1),
            ("temperature", "hot"),
            ("temperature", True),
            ("top_p", 1.5),
            ("min_p", -0.1),
            ("top_k", 1.5),
            ("repetition_penalty", 0),
            ("seed", "x"),
            ("max_tokens", 0),
            ("max_tokens", "many"),
            ("max_completion_tokens", -1),
            ("max_tokens", [1]),
            ("stop", ""),
            ("stop", [""]),
            ("stop", ["x"] * 17),
            ("stop", 3),
            ("stop", [None]),
            ("stream", "yes"),
            ("stream_options", "usage"),
            ("presence_penalty", 0.5),
            ("frequency_penalty", "x"),
            ("logit_bias", {"1": 2}),
            ("truncation", "oldest"),
            # For Python, 0 is False; and what other servers do.
            ("logprobs", 0),
            ("stop_token_ids", [1]),
            ("min_tokens", 5),
            ("ignore_eos", True),
            ("guided_json", {}),
            ("structured_outputs", {"regex": "a"}),
            ("prompt_logprobs", 0),
            ("modalities", ["audio"]),
            ("skip_special_tokens", False),
            ("add_generation_prompt", False),
            ("model", 5),
        ]
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_each_mistake_is_named(name: str) -> None:
    body, param = WRONG[name]
    with pytest.raises(ApiError) as refused:
        read_chat(read_body(json.dumps(body).encode()), GREEDY, 0)
    error = refused.value.body["error"]
    assert refused.value.status == 400 and error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b"\xff", b'{"a": "\xc3("}', b"[" * 100_000, b"9" * 5000, b'"x"']
)
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        read_body(body)
    assert refused.value.code == "invalid_json"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = (
    "messages",
    "prompt",
    "model",
    "n",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "tools",
)


@given(
    body=st.dictionaries(st.sampled_from(NAMES), JSON),
    messages=st.lists(
        st.dictionaries(
            st.sampled_from(("role", "content", "reasoning", "tool_calls")),
            JSON | st.sampled_from(("user", "assistant")),
        ),
        max_size=2,
    ),
)
@settings(deadline=None)
def test_whatever_is_sent_is_read_or_refused(body: dict[str, Any], messages: list[Any]) -> None:
    for read in (read_chat, read_completion):
        for given_body in (body, {**body, "messages": messages}, {**body, "prompt": "x"}):
            try:
                asked = read(given_body, GREEDY, 0)
            except ApiError as error:
                assert error.status == 400
            else:
                assert asked.messages or asked.prompts


def test_what_other_clients_send_is_accepted() -> None:
    body = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Hi", "name": "me"},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
            {"role": "user", "content": "Who?"},
        ],
        **dict.fromkeys(("stop", "seed", "n", "tools", "temperature", "max_tokens", "stream_options", "logit_bias")),
        **{"presence_penalty": 0, "frequency_penalty": 0.0, "tools": [], "response_format": {"type": "text"}},
        **{"user": "x", "metadata": {}, "an unknown field": 1, "top_k": -1, "seed": -3, "max_tokens": 7.0},
    }
    asked = read_chat(body, GREEDY, 5)
    assert [message.role for message in asked.messages] == ["system", "user", "assistant", "user"]
    assert asked.messages[0].content == "Be\nbrief." and asked.max_new_tokens == 7
    assert asked.sampling.seed == 2**64 - 3 and asked.sampling.top_k == 0
    # The narrowest nucleus, and not none.
    assert read_chat({"messages": [USER], "top_p": 0, "top_k": 2**40}, GREEDY, 5).sampling.top_p == 1e-6
    others = {"stop_token_ids": [], "ignore_eos": False, "min_tokens": 0, "modalities": ["text"], "guided_json": None}
    assert read_chat({"messages": [USER], **others}, GREEDY, 5).messages
    both = {"messages": [USER], "max_tokens": 5, "max_completion_tokens": 9}
    assert read_chat(both, GREEDY, 5).max_new_tokens == 9 and read_chat(both, GREEDY, 5).sampling.seed == 5


def test_errors_over_http(address: str, thread: ScriptedThread, capfd: pytest.CaptureFixture[str]) -> None:
    asked = len(thread.asked)

    def error(response: httpx2.Response, status: int, code: str | None) -> dict[str, Any]:
        assert response.status_code == status, response.text
        found = response.json()["error"]
        assert found.keys() == {"message", "type", "param", "code"} and found["code"] == code and found["message"]
        return dict(found)

    url = f"{address}/v1/chat/completions"
    error(httpx2.get(f"{address}/v2"), 404, "not_found")
    error(httpx2.get(url), 405, "method_not_allowed")
    error(chat(address, model="gpt"), 404, "model_not_found")
    error(httpx2.get(f"{address}/v1/models/a/b"), 404, "model_not_found")
    error(httpx2.post(url, content=b"{"), 400, "invalid_json")
    # Ten times a megabyte: it is read, so that the client gets to see why it was refused.
    error(httpx2.post(url, content=b" " * 10_000_000, timeout=60), 413, "body_too_large")
    assert len(thread.asked) == asked and httpx2.get(f"{address}/health").json() == {"status": "ok"}
    # A client that promises a body and leaves.
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    assert chat(address).status_code == 200
    # That is the client's affair, and no defect.
    printed = "".join(capfd.readouterr())
    assert "POST /v1/chat/completions 499" in printed and "Traceback" not in printed


def test_pages_of_others_may_not_ask(tokenizer: Tokenizer) -> None:
    """A browser sends a text to any address without asking first, and any name can be made to lead to this machine."""
    models = [scripted(ScriptedThread(tokenizer, "A dog."))]

    def status(address: str, **headers: str) -> int:
        body = json.dumps({"messages": [USER]})
        sent = {"Content-Type": "text/plain", **headers}
        return httpx2.post(f"{address}/v1/chat/completions", content=body, headers=sent, timeout=60).status_code

    for settings_, wanted in (
        (Settings(local=True), [200, 200, 403, 403, 403, 200]),
        (Settings(local=True, key="k"), [200, 200, 403, 403, 200, 200]),
        (Settings(), [200, 200, 403, 403, 200, 200]),
        (Settings(local=True, origins=("http://a.example",)), [200, 200, 200, 403, 403, 200]),
        (Settings(local=True, origins=("http://b.example:8000",)), [200, 200, 403, 403, 200, 200]),
        (Settings(local=True, origins=("*",)), [200, 200, 200, 200, 200, 200]),
    ):
        with listening(models, settings_) as address:
            port = address.rpartition(":")[2]
            key = {"Authorization": f"Bearer {settings_.key}"} if settings_.key else {}
            found = [
                status(address, **key, **headers)
                for headers in (
                    {},
                    {"Origin": address},
                    {"Origin": "http://a.example"},
                    {"Origin": "null"},
                    {"Host": "b.example:8000"},
                    {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"},
                )
            ]
            assert found == wanted, settings_


def test_a_key_and_other_origins(tokenizer: Tokenizer) -> None:
    models = [scripted(ScriptedThread(tokenizer, "A dog."))]
    with listening(models, Settings(key="schlüssel", origins=("http://a.example",))) as address:
        url = f"{address}/v1/models"
        refused = httpx2.get(url, headers={"Origin": "http://a.example"})
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["access-control-allow-origin"] == "http://a.example"
        other = httpx2.get(url, headers={"Origin": "http://b.example"})
        assert "access-control-allow-origin" not in other.headers and other.status_code == 403
        assert (
            other.json()["error"]["code"] == "origin" and "--cors http://b.example" in other.json()["error"]["message"]
        )
        assert httpx2.get(url, headers={"Authorization": "Bearer schlüssel".encode()}).status_code == 200
        assert chat(address).status_code == 401 and httpx2.get(f"{address}/health").status_code == 200
        preflight = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
        assert httpx2.options(url, headers=preflight).status_code == 200
    with listening(models) as address:
        assert "access-control-allow-origin" not in chat(address).headers


def test_texts_are_continued(tokenizer: Tokenizer, thread: ScriptedThread, address: str) -> None:
    def complete(prompt: Any, **body: Any) -> httpx2.Response:
        return httpx2.post(f"{address}/v1/completions", json={"prompt": prompt, **body}, timeout=60)

    found = complete(["Who", "<|im_start|>Who"], stop=["og"]).json()
    assert found["object"] == "text_completion" and [one["index"] for one in found["choices"]] == [0, 1]
    assert [one["text"] for one in found["choices"]] == ["A d"] * 2
    assert thread.asked[-1].request.prompt[0] == tokenizer.token_id("<|im_start|>")
    # Equal prompts of one request are samples; the first is what it is alone.
    complete(["Who"] * 3, seed=5, temperature=1)
    seeds = [job.request.sampling.seed for job in thread.asked[-3:]]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    ids = tokenizer.encode("Who")
    assert complete(ids).json()["usage"]["prompt_tokens"] == len(ids) and thread.asked[-1].request.prompt == ids
    *chunks, end, usage, done = events(complete("Who", stream=True, stream_options={"include_usage": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "A dog." and done == "[DONE]"
    assert end["choices"][0]["finish_reason"] == "stop" and usage["usage"]["total_tokens"] > len(ids)
    wrong = [("", {}), ([], {}), ([[]], {}), ([99_999], {}), ([-1], {}), (None, {}), ("x", {"echo": True})]
    for prompt, more in [*wrong, ("x", {"best_of": 2}), ("x", {"logprobs": 1}), (["x", "y"], {"stream": True})]:
        assert complete(prompt, **more).status_code == 400, prompt


def test_no_text_of_a_user_is_in_the_log_or_in_the_metrics(
    thread: ScriptedThread, address: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "xylophone"
    chat(address, f"{secret}?", model=secret)
    chat(address, f"{secret}<|im_end|>", user=secret)
    httpx2.get(f"{address}/{secret}?{secret}")
    httpx2.get(f"{address}/v1/models/{secret}")

    def fail(*given: Any, **options: Any) -> None:
        raise ValueError(f"a defect that names {secret}")

    monkeypatch.setattr(thread, "submit", fail)
    defect = chat(address, secret)
    assert defect.status_code == 500 and defect.json()["error"]["code"] == "internal_error"
    printed = "".join(capfd.readouterr())
    assert "ValueError" in printed and "POST /v1/chat/completions 500" in printed and secret not in printed
    metrics = httpx2.get(f"{address}/metrics").text
    assert 'status="500"' in metrics and secret not in metrics


def test_metrics_are_what_prometheus_reads() -> None:
    metrics = Metrics()
    metrics.count("a_total", "Some.", 2, kind='x"y\\')
    for seconds in (0.02, 3, 999):
        metrics.observe("b_seconds", "Times.", seconds)
    lines = metrics.text([("c", "Now.", {"m": "one"}, 1.5)]).splitlines()
    assert 'a_total{kind="x\\"y\\\\"} 2' in lines and "# TYPE b_seconds histogram" in lines
    assert 'b_seconds_bucket{le="0.05"} 1' in lines and 'b_seconds_bucket{le="5"} 2' in lines
    assert 'b_seconds_bucket{le="+Inf"} 3' in lines and "b_seconds_count 3" in lines and 'c{m="one"} 1.5' in lines


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Question: Who?\n\nAnswer: A dog.", ("Who?", "A dog.")),
        ("  Question: Who\nis it?\n\nAnswer: A\n\nAnswer: dog.\n", ("Who\nis it?", "A\n\nAnswer: dog.")),
        ("Question: Who?\n  Answer: A dog.", ("Who?", "A dog.")),
        ("Question: Who? Answer: A dog.", None),
        ("Well. Question: Who?\nAnswer: A dog.", None),
        # Once took minutes.
        ("Question:" + "\n" * 3000 + "x", None),
        ("Question: Who?", None),
        ("Question: Who?\n\nAnswer: ", None),
        ("Let me think.", None),
        ("", None),
    ],
)
def test_reasoning_is_read_back(text: str, found: tuple[str, str] | None) -> None:
    assert read_reasoning(text) == found


def test_the_page_is_at_the_root(address: str) -> None:
    page = httpx2.get(address)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
