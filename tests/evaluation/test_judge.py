"""A judge behind a server: what it is asked, what is kept and paid for, and judges that do not do as they are told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai_server import Fault, Server, openai_server

from transllm_jax.config import Endpoint
from transllm_jax.errors import Preempted, UserError
from transllm_jax.evaluation.judge.cache import open_cache
from transllm_jax.evaluation.judge.cost import Prices, Spending, parse_limit, parse_prices, text_tokens, tokens_of
from transllm_jax.evaluation.judge.judge import SILENT, Ask, Judge, Verdict
from transllm_jax.evaluation.judge.model import EndpointModel, SystemModel, is_same, refuse_own_judge
from transllm_jax.evaluation.judge.prompts import again, single_prompt
from transllm_jax.evaluation.judge.verdict import rating_of
from transllm_jax.evaluation.systems.system import Asked, Turn
from transllm_jax.generation import endpoint as client


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    with openai_server() as state:
        state.answer = lambda body: ("It is fine.\n\nRating: [[7]]", "stop")
        yield state


@contextmanager
def judge_of(server: Server, directory: Path, spending: Spending | None = None, **settings: Any) -> Iterator[Judge]:
    endpoint = Endpoint(**{"endpoint": server.url, "model": "judge", "concurrency": 1, "attempts": 2, **settings})
    with open_cache(directory / "verdicts.jsonl") as cache:
        yield Judge(EndpointModel(endpoint, print), cache, spending or Spending())


def asks(*answers: str, repeats: int = 1) -> dict[str, Ask[float]]:
    found = {}
    for number, answer in enumerate(answers):
        for repeat in range(repeats):
            messages = single_prompt("fastchat", ["Q?"], [answer], None)
            found[f"{number}/{repeat}"] = Ask(messages, rating_of, again(messages, "rating"), repeat)
    return found


def values(verdicts: Mapping[str, Verdict[float]]) -> list[float | None]:
    return [one.value for one in verdicts.values()]


def test_a_verdict_is_asked_for_once(server: Server, tmp_path: Path) -> None:
    with judge_of(server, tmp_path) as judge:
        assert values(judge.verdicts(asks("a", "b", "a", repeats=2))) == [7] * 6
        # The third answer is the first one; the repeats differ in their seed.
        assert len(server.bodies) == 4 and {body["seed"] for body in server.bodies} == {0, 1}
        assert all(body["temperature"] == 0 and body["max_tokens"] == 2048 for body in server.bodies)
        assert judge.recorded()["spent"] == {"tokens_read": sum(map(len, server.asked)), "tokens_written": 4}
    with judge_of(server, tmp_path) as judge:
        assert values(judge.verdicts(asks("b", "a", repeats=2))) == [7] * 4
        assert len(server.bodies) == 4 and judge.recorded()["spent"]["tokens_read"] == 0
        # Another model, or another parameter, is another judge.
        judge.model.max_tokens = 100
        judge.verdicts(asks("a"))
        assert len(server.bodies) == 5
    with judge_of(server, tmp_path, model="other") as judge:
        judge.verdicts(asks("a"))
        assert len(server.bodies) == 6
    rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6 and rows[0]["reply"]["text"] == "It is fine.\n\nRating: [[7]]"
    assert rows[0]["messages"] == server.bodies[0]["messages"] and rows[0]["judge"] == "judge"


def test_a_killed_judge_goes_on(server: Server, tmp_path: Path) -> None:
    with judge_of(server, tmp_path) as judge:
        judge.verdicts(asks("a", "b"))
    path = tmp_path / "verdicts.jsonl"
    # The last line was not finished.
    path.write_bytes(path.read_bytes()[:-10])
    with judge_of(server, tmp_path) as judge:
        assert len(judge.cache) == 1
        assert values(judge.verdicts(asks("a", "b"))) == [7, 7] and len(server.bodies) == 3
    with open_cache(path) as cache:
        assert len(cache) == 2
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"verdicts\.jsonl:1 is no reply"), open_cache(path):
        pass


def test_a_stop_keeps_what_was_said(server: Server, tmp_path: Path) -> None:
    def stop() -> None:
        if len(judge.cache) == 2:
            raise Preempted("stopped")

    with judge_of(server, tmp_path) as judge, pytest.raises(Preempted):
        judge.verdicts(asks("a", "b", "c", "d"), stop)
    with judge_of(server, tmp_path) as judge:
        assert len(judge.cache) >= 2
        assert values(judge.verdicts(asks("a", "b", "c", "d"))) == [7] * 4


def odd(first: str, second: str | None = None) -> Callable[[dict[str, Any]], tuple[str, str]]:
    """A judge that says one thing, and another when it is asked again."""

    def answer(body: dict[str, Any]) -> tuple[str, str]:
        repeated = body["messages"][-1]["content"].endswith('"Rating: [[number]]".')
        return (second if repeated and second is not None else first), "stop"

    return answer


@pytest.mark.parametrize(
    ("first", "second", "value", "requests"),
    [
        ("Rating: [[5]]", None, 5, 1),
        ("Rating: [[11]]", None, None, 2),
        ("Rating: [[11]]", "Rating: [[10]]", 10, 2),
        ("คำตอบนี้ดีมาก ให้แปดคะแนน", None, None, 2),
        ("คำตอบนี้ดีมาก", "คะแนน: [[๘]]", 8, 2),
        ("", "Rating: [[3]]", 3, 2),
        ("[[3]] or [[4]]", "[[4]] or [[3]]", None, 2),
        ("<think>[[2]] perhaps</think>Rating: [[4]]", None, 4, 1),
        ("[[2]] perhaps</think>Rating: [[4]]", None, 4, 1),
        ("<think>It could be a [[3]]. But wait,", "Rating: [[6]]", 6, 2),
        ("<think>It could be a [[3]]. But wait,", None, None, 2),
    ],
)
def test_what_cannot_be_read_is_asked_again_once(
    server: Server, tmp_path: Path, first: str, second: str | None, value: float | None, requests: int
) -> None:
    server.answer = odd(first, second)
    for _ in range(2):
        with judge_of(server, tmp_path) as judge:
            (verdict,) = judge.verdicts(asks("a")).values()
    # By the second command nothing is asked, not even what could not be read.
    assert verdict.value == value and len(server.bodies) == requests == len(verdict.raw) and verdict.raw[0] == first


def test_a_judge_that_times_out(server: Server, tmp_path: Path) -> None:
    def fail(body: dict[str, Any]) -> Fault | None:
        return Fault(hang=0.3) if "slow" in body["messages"][-1]["content"] else None

    server.fail = fail
    with judge_of(server, tmp_path, timeout=0.1) as judge:
        verdicts = judge.verdicts(asks("a", "slow", "b"))
        assert values(verdicts) == [7, None, 7]
        error = verdicts["1/0"].error
        assert error is not None and "2 attempts failed, the last with no answer within 0.1 s" in error
        assert verdicts["1/0"].recorded() == {"value": None, "raw": [], "error": error}
    server.fail = lambda body: None
    # It is no verdict that could be kept.
    with judge_of(server, tmp_path) as judge:
        assert values(judge.verdicts(asks("a", "slow", "b"))) == [7, 7, 7] and len(server.bodies) == 5


def test_a_judge_that_never_replies_ends_the_run(server: Server, tmp_path: Path) -> None:
    server.fail = lambda body: Fault(500, {"error": {"message": "out of memory"}})
    with (
        judge_of(server, tmp_path, attempts=1) as judge,
        pytest.raises(
            UserError, match=rf"no reply to {SILENT} prompts in a row.*status 500: out of memory.*start again"
        ),
    ):
        judge.verdicts(asks(*"abcdefghijk"))
    assert SILENT <= len(server.bodies) <= SILENT + 1


@pytest.mark.parametrize(("status", "words"), [(401, "set judge-endpoint.key to the name"), (404, "a model 'judge'")])
def test_a_wrong_key_or_model_ends_the_run_at_once(server: Server, tmp_path: Path, status: int, words: str) -> None:
    server.fail = lambda body: Fault(status, {"error": {"message": "no"}})
    with judge_of(server, tmp_path, attempts=9) as judge, pytest.raises(UserError, match=words):
        judge.verdicts(asks("a", "b"))
    assert len(server.bodies) == 1


def test_a_refused_prompt_has_no_verdict(server: Server, tmp_path: Path) -> None:
    server.fail = lambda body: Fault(400, {"error": {"message": "unsafe"}}) if "bad" in str(body) else None
    with judge_of(server, tmp_path) as judge:
        verdicts = judge.verdicts(asks("a", "bad", "b"))
    assert values(verdicts) == [7, None, 7] and verdicts["1/0"].error == "status 400: unsafe"


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("use max_completion_tokens", "max_tokens_as=max_completion_tokens"),
        ("temperature must be 1", "body={temperature: null}"),
    ],
)
def test_what_every_request_has_is_not_refused_again_and_again(
    server: Server, tmp_path: Path, message: str, remedy: str
) -> None:
    server.fail = lambda body: Fault(400, {"error": {"message": message}})
    with judge_of(server, tmp_path) as judge, pytest.raises(UserError) as raised:
        judge.verdicts(asks("a", "b"))
    assert str(raised.value).endswith(f"give --judge-endpoint '{remedy}'") and len(server.bodies) < SILENT


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_the_cost_is_estimated_before_the_first_request(server: Server, tmp_path: Path) -> None:
    server.tokens = lambda messages: None
    said: list[str] = []
    few, many = asks("a"), asks(*map(str, range(10)))
    limit = sum(tokens_of(ask.messages) for ask in few.values()) + 400
    with judge_of(server, tmp_path, Spending(limit=limit)) as judge:
        judge.say = said.append
        judge.verdicts(few)
        assert len(server.bodies) == 1 and len(said) == 1
        assert "  judge judge: 1 request, about 180 tokens" in said[0] and "at most 2.05k)" in said[0]
        with pytest.raises(UserError, match=r"10 requests.*more than --max-cost .* tokens, of which"):
            judge.verdicts(many)
        # What is known costs nothing.
        judge.verdicts(few)
    assert len(server.bodies) == 1 and len(said) == 1


def test_spending_more_than_expected_ends_the_run(server: Server, tmp_path: Path) -> None:
    server.answer = lambda body: ("Rating: [[7]]", "stop")
    server.tokens = lambda messages: 1_000_000
    spending = Spending(Prices(2.0, 8.0), limit=5.0)
    with judge_of(server, tmp_path, spending) as judge:
        with pytest.raises(UserError, match=r"6\.00 are spent, more than --max-cost 5\.00"):
            judge.verdicts(asks("a", "b", "c", "d"))
        assert len(judge.cache) == 3
    assert spending.recorded() == {"tokens_read": 3_000_000, "tokens_written": 3, "price": 6.0}


def test_prices_and_limits_are_read() -> None:
    assert parse_prices("2.5/10") == Prices(2.5, 10) and Prices(2.5, 10).of(10**6, 10**5) == 3.5
    assert [parse_limit(text) for text in ("200000", "2M", "1.5k", "3.50")] == [200_000, 2_000_000, 1500, 3.5]
    assert (text_tokens("eight letters"), text_tokens("ภาษา"), text_tokens("")) == (4, 4, 0)
    for parse, text in ((parse_prices, "2.5"), (parse_prices, "a/b"), (parse_limit, "-3"), (parse_limit, "2 G")):
        with pytest.raises(UserError, match="give"):
            parse(text)


# --- who judges ------------------------------------------------------------------------------------------------------


class Scripted:
    """A system that answers what a test says."""

    def __init__(self, name: str, identity: dict[str, Any], answer: str = "Rating: [[6]]") -> None:
        self.name, self.identity, self.answer = name, identity, answer
        self.asked: list[Asked] = []

    def answers(self, asked: Any, between: Any = None, *, at_once: int | None = None) -> Iterator[Any]:
        for one in asked:
            self.asked.append(one)
            failed = "slow" in one.turns[0]
            yield one, [Turn([], self.answer, "" if failed else self.answer, error="too long" if failed else None)]


def test_a_local_model_judges(tmp_path: Path) -> None:
    system = Scripted("local", {"kind": "model", "weights": "1"})
    with open_cache(tmp_path / "verdicts.jsonl") as cache:
        for _ in range(2):
            verdicts = Judge(SystemModel(system), cache).verdicts(asks("a", "slow"))
    assert values(verdicts) == [6, None] and verdicts["1/0"].error == "too long"
    one = system.asked[0]
    assert one.history[0]["role"] == "system" and one.language == "english" and one.sampling.temperature == 0
    # The one that failed is asked again by a second command; the other is known.
    assert len(system.asked) == 3


def test_a_judge_of_its_own_answers_is_refused(server: Server) -> None:
    model = EndpointModel(Endpoint(endpoint=server.url, model="m"), print)
    same = Scripted("here", {"kind": "endpoint", "url": "http://elsewhere/v1", "model": "m", "body": {}})
    other = Scripted("there", {"kind": "endpoint", "url": server.url, "model": "n", "body": {}})
    refuse_own_judge(model, [other], confirmed=False)
    refuse_own_judge(model, [other, same], confirmed=True)
    with pytest.raises(UserError, match=r"judge m is the system here.*--judge-is-system"):
        refuse_own_judge(model, [other, same], confirmed=False)
    assert is_same({"kind": "model", "weights": "1"}, {"weights": "1", "kind": "model"})
    assert not is_same({"kind": "model", "weights": "1"}, {"kind": "model", "weights": "2"})
