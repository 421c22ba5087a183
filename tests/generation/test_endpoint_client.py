"""The client of an endpoint: what it sends, what it sends again, and what ends the run with one line."""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from openai_server import Fault, Server, completion, openai_server

from transllm_jax.config import Endpoint
from transllm_jax.errors import UserError
from transllm_jax.generation import endpoint as module
from transllm_jax.generation.endpoint import Client, Reply, Request, parse_reply, read_key, request_body

KEY = "sk-very-secret-123"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("SOME_KEY", KEY)
    with openai_server() as state:
        yield state


def settings_of(server: Server, **changes: Any) -> Endpoint:
    return Endpoint(**{"endpoint": server.url, "model": "small", **changes})


def requests(settings: Endpoint, *texts: str) -> list[Request]:
    return [Request(text, request_body(settings, [{"role": "user", "content": text}], 5, 7)) for text in texts]


def ask(server: Server, *texts: str, say: Any = lambda line: None, **changes: Any) -> dict[str, Reply]:
    settings = settings_of(server, **changes)
    replies = Client(settings, "recover.teacher", say).replies(requests(settings, *texts))
    return {reply.id: reply for reply in replies if reply is not None}


def refused(server: Server, *texts: str, **changes: Any) -> str:
    """The one line with which a request ends the run."""
    with pytest.raises(UserError) as raised:
        ask(server, *(texts or ("a",)), **changes)
    line = str(raised.value)
    assert "\n" not in line and KEY not in line and line.startswith(f"recover.teacher: {server.url}/chat/completions")
    return line


def test_what_is_sent(server: Server) -> None:
    found = ask(server, "a", key="SOME_KEY")
    assert found == {"a": Reply("a", "to a", "stop", 1, 1)} and found["a"].finished
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    message = {"role": "user", "content": "a"}
    wanted = {"model": "small", "messages": [message], "max_tokens": 5, "temperature": 0, "seed": 7}
    assert server.bodies == [wanted]
    server.forget()
    body = {"temperature": None, "seed": 3, "chat_template_kwargs": {"enable_thinking": False}}
    ask(server, "ก", endpoint=f"{server.url}/", max_tokens_as="max_completion_tokens", body=body)
    assert server.paths == ["/v1/chat/completions"] and "authorization" not in server.headers[0]
    assert server.bodies == [
        {
            "model": "small",
            "messages": [{"role": "user", "content": "ก"}],
            "max_completion_tokens": 5,
            "seed": 3,
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ]


def test_several_at_once_and_each_once(server: Server) -> None:
    server.delay = 0.2
    texts = [f"question {number}" for number in range(30)]
    assert {id: reply.text for id, reply in ask(server, *texts, concurrency=6).items()} == {
        text: f"to {text}" for text in texts
    }
    assert sorted(server.asked) == sorted(texts) and server.most_at_once == 6
    server.forget()
    ask(server, *texts[:3], concurrency=1)
    assert server.asked == texts[:3] and server.most_at_once == 1
    assert ask(server) == {}


@pytest.mark.parametrize(
    "fault",
    [Fault(429, {}), Fault(500, "oops"), Fault(503, {}), Fault(408, {}), Fault(drop=True), Fault(hang=0.4)],
    ids=["429", "500", "503", "408", "connection", "time-out"],
)
def test_passing_faults_are_tried_again(server: Server, fault: Fault) -> None:
    server.faults = [fault, fault]
    said: list[str] = []
    assert ask(server, "a", timeout=0.2, say=said.append)["a"].text == "to a"
    assert server.asked == ["a"] * 3
    # The first is told, and no other within a minute.
    assert len(said) == 1 and server.url in said[0] and "sent again" in said[0]


def test_retry_after_is_honoured(server: Server) -> None:
    server.faults = [Fault(429, {}, {"Retry-After": "1"})]
    ask(server, "a")
    assert server.times[1] - server.times[0] >= 1.0
    server.forget()
    # HTTP's dates have whole seconds.
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    server.faults = [Fault(503, {}, {"Retry-After": date})]
    ask(server, "a")
    assert server.times[1] - server.times[0] >= 0.9
    server.forget()
    server.faults = [Fault(429, {}, {"Retry-After": "soon"})]
    ask(server, "a")
    assert server.times[1] - server.times[0] < 0.9
    server.forget()
    server.faults = [Fault(429, {"error": {"message": "daily limit"}}, {"Retry-After": "86400"})]
    assert "answered 429: daily limit (try again in 86400 s); start the run again" in refused(server)
    assert len(server.asked) == 1


def test_pauses_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.random, "uniform", lambda low, high: high)
    fault = module._PassingFault("busy")
    assert [module._pause(attempt, fault) for attempt in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert module._pause(99, fault) == module.LONGEST_PAUSE
    assert module._pause(1, module._PassingFault("busy", 20.0)) == 21
    monkeypatch.setattr(module.random, "uniform", lambda low, high: low)
    assert module._pause(3, fault) == 2 and module._pause(3, module._PassingFault("busy", 20.0)) == 20


def test_attempts_are_bounded(server: Server) -> None:
    server.fail = lambda body: Fault(500, {"error": {"message": "out of memory"}})
    line = refused(server, attempts=3)
    assert "3 attempts failed, the last with status 500: out of memory" in line and "start the run again" in line
    assert len(server.asked) == 3
    with pytest.raises(UserError, match="2 attempts failed, the last with ConnectError"):
        ask(server, "a", endpoint="http://127.0.0.1:9/v1", attempts=2)


@pytest.mark.parametrize(
    ("status", "body", "changes", "words"),
    [
        (
            401,
            {"error": {"message": f"bad key {KEY}"}},
            {"key": "SOME_KEY"},
            "401: bad key ***; the key is that of the ",
        ),
        (401, {"error": {"message": "no key"}}, {}, "no key; set recover.teacher.key to the name of an environment"),
        (403, {"detail": "not yours"}, {"key": "SOME_KEY"}, "403: not yours; the key is that of the environment var"),
        (404, {"error": "no model"}, {}, "404: no model; see whether the server has a model 'small', and whether"),
        (400, {"message": "too long"}, {}, "400: too long; correct the request, or set recover.teacher.refused to"),
        (422, "text\nof two lines", {}, "422: with text that is not JSON: text of two lines; correct the request"),
        (400, {"message": "use max_completion_tokens"}, {}, "set recover.teacher.max_tokens_as to max_completion_tok"),
        (400, {"message": "temperature is fixed"}, {}, "set recover.teacher.body to {temperature: null} for a server"),
        (409, {}, {}, "answered 409: {}; start the run again when this is settled"),
    ],
)
def test_other_statuses_end_the_run_at_once(
    server: Server, status: int, body: Any, changes: dict[str, str], words: str
) -> None:
    server.fail = lambda given: Fault(status, body)
    assert words in refused(server, **changes)
    assert len(server.asked) == 1
    # refused is for single requests: no key and no model fail all of them.
    if status in (401, 403, 404, 409):
        assert words in refused(server, refused="drop", **changes)


def test_a_redirection_is_not_followed(server: Server) -> None:
    server.fail = lambda body: Fault(307, {}, {"Location": "https://elsewhere/v1"})
    assert "it points to https://elsewhere/v1: give that in recover.teacher.endpoint" in refused(server, key="SOME_KEY")
    assert len(server.asked) == 1


def test_requests_that_a_server_refuses_can_be_left_out(server: Server) -> None:
    server.fail = lambda body: Fault(400, {"error": {"message": "unsafe"}}) if "bad" in str(body) else None
    found = ask(server, "a", "bad", "b", refused="drop")
    assert found["bad"] == Reply("bad", error="status 400: unsafe") and not found["bad"].finished
    assert (found["a"].text, found["b"].text) == ("to a", "to b") and len(server.asked) == 3


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{not", "answered with text that is not JSON: {not"),
        ("", "answered with text that is not JSON: nothing"),
        ({"choices": []}, "answered with no chat completion: {'choices': []}"),
        ([1], "answered with no chat completion: [1]"),
        ({"choices": [{"message": {"content": 3}}]}, "answered with a chat completion of another form"),
        ({"object": "page", "echo": KEY}, "'echo': '***'"),
    ],
)
def test_what_is_no_answer_ends_the_run_at_once(server: Server, body: Any, words: str) -> None:
    server.fail = lambda given: Fault(200, body)
    line = refused(server, key="SOME_KEY")
    assert words in line and line.endswith("give the URL of a server with OpenAI's chat completions API")
    assert len(server.asked) == 1


def test_one_fault_ends_all_requests(server: Server) -> None:
    server.fail = lambda body: Fault(401, {}) if "bad" in str(body) else Fault(hang=30)
    started = time.monotonic()
    refused(server, "a", "b", "bad", "c", concurrency=4)
    assert time.monotonic() - started < 5


def test_a_stopped_run_does_not_wait_for_answers(server: Server) -> None:
    server.fail = lambda body: Fault(hang=30)
    settings = settings_of(server)
    replies = Client(settings, "recover.teacher", print).replies(requests(settings, "a", "b"))
    started = time.monotonic()
    assert next(replies) is None
    replies.close()
    assert time.monotonic() - started < 5


def test_replies_are_read_as_they_are() -> None:
    assert parse_reply("a", completion("hello", "length")) == Reply("a", "hello", "length", 1, 1)
    assert not parse_reply("a", completion("hello", "length")).finished
    assert not parse_reply("a", completion("hello", "content_filter")).finished
    assert parse_reply("a", completion("hello", None)).finished
    assert parse_reply("a", completion(None, "stop", None)) == Reply("a", "", "stop")
    # Half of a pair of surrogates is not text.
    assert parse_reply("a", completion("b\ud83d")).text == "b?"
    for reply in (Reply("a", "b", "stop", 1, 2), Reply("a", error="no"), Reply("a")):
        assert Reply(**reply.record()) == reply


def test_keys_are_of_the_environment_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Endpoint(endpoint="http://host/v1", model="m", key="SOME_KEY")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match=r"recover\.teacher\.key: the environment variable SOME_KEY is not set"):
        read_key(settings, "recover.teacher")
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert read_key(settings, "recover.teacher") == KEY
    monkeypatch.setenv("SOME_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(UserError, match="holds characters that no key has") as raised:
        read_key(settings, "recover.teacher")
    assert KEY not in str(raised.value)


def test_a_missing_library_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *given: Any, **more: Any) -> Any:
        if name == "tenacity":
            raise ImportError(name)
        return whole(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'transllm-jax\[endpoint\]'"):
        Client(settings_of(server), "recover.teacher", print)
