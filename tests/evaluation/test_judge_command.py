"""`transllm evaluate ... --judge ...`: the whole command, on servers and files of answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import Fault, Server, openai_server
from processes import wait_for

from transllm_jax.commands.evaluate import questions_given
from transllm_jax.errors import UserError
from transllm_jax.generation import endpoint as client

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Systems `one` and `two`, which answer in Thai, and the model `judge`, which likes the answers of `one`."""
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)

    def answer(body: dict[str, Any]) -> tuple[str, str]:
        text = body["messages"][-1]["content"]
        if body["model"] != "judge":
            return f"คำตอบของ {body['model']}: {text[-12:]}", "stop"
        if "Assistant B" in text:
            first = text.partition("[The Start of Assistant A's Answer]\n")[2].startswith("คำตอบของ one")
            return ("[[A]]" if first else "[[B]]"), "stop"
        if "<request>" in text:
            return "[[A]]", "stop"
        return ("Rating: [[9]]" if "คำตอบของ one" in text else "Rating: [[4]]"), "stop"

    with openai_server() as state:
        state.answer = answer
        yield state


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def words(server: Server, tmp_path: Path) -> list[object]:
    bench = write(
        tmp_path / "bench.jsonl", [{"question_id": 81 + n, "turns": [f"ถาม {n}", f"ต่อ {n}"]} for n in range(4)]
    )
    alpaca = write(tmp_path / "alpaca.jsonl", [{"index": n, "instruction": f"สั่ง {n}"} for n in range(5)])
    requests = tmp_path / "requests.csv"
    requests.write_text("goal,th\nKill,ฆ่า\n", encoding="utf-8")
    files = (f"mt_bench={bench}", f"alpaca_eval={alpaca}", f"safety={requests}")
    return [
        *("evaluate", f"{server.url}#one", f"{server.url}#two", "--suite", "mt_bench,alpaca_eval", "--suite", "safety"),
        *(word for file in files for word in ("--questions", file)),
        *("--judge", f"{server.url}#judge", "--baseline", "two", "--references", "none", "--out", tmp_path / "out"),
    ]


def test_the_whole_command(server: Server, words: list[object], transllm: Command, tmp_path: Path) -> None:
    code, printed = transllm(*words)
    assert code == 0, printed
    table = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    bench, alpaca, safe = table["suites"]
    rows = {(row["measure"], row["system"]): row for row in bench["rows"]}
    assert rows["rating", "one"]["value"] == 9 and rows["rating", "two"]["value"] == 4
    assert rows["rating", "two"]["difference"]["value"] == -5 and rows["rating", "two"]["samples"] == 4
    rows = {(row["measure"], row["system"]): row for row in alpaca["rows"]}
    assert rows["win rate", "one"]["value"] == 1 and rows["position consistency", "one"]["value"] == 1
    assert rows["win rate", "two"]["value"] == 0.5 and rows["in the language", "one"]["value"] == 1
    assert {row["measure"] for row in safe["rows"]} >= {"refused", "helps, by the judge"}
    assert "rating" in printed and "minus one" in printed
    judged = [body for body in server.bodies if body["model"] == "judge"]
    assert judged and all(body["temperature"] == 0 for body in judged)
    # Answers of the writing questions are drawn.
    assert {body["temperature"] for body in server.bodies if body["model"] == "one"} == {0, 0.7}
    # All is known now: neither the systems nor the judge are asked again.
    server.forget()
    code, printed = transllm(*words)
    assert (code, server.bodies) == (0, []), printed
    assert json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8")) == table


def test_a_judge_that_is_not_there_is_told_before_anything_is_asked(
    server: Server, words: list[object], transllm: Command
) -> None:
    place = words.index("--judge") + 1
    code, printed = transllm(*words[:place], "http://127.0.0.1:1/v1#judge", *words[place + 1 :])
    assert code == 2 and "http://127.0.0.1:1/v1 cannot be reached (ConnectError" in printed and not server.bodies


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_model_of_the_judge(
    status: int, server: Server, words: list[object], transllm: Command, tmp_path: Path
) -> None:
    server.fail = lambda body: Fault(status, {"error": {"message": "no"}}) if body["model"] == "judge" else None
    code, printed = transllm(*words, "--judge-endpoint", "concurrency=1")
    assert code == 2 and f"judge-endpoint: {server.url}/chat/completions answered {status}: no" in printed
    assert sum(body["model"] == "judge" for body in server.bodies) == 1
    # The answers are kept.
    server.forget()
    server.fail = lambda body: None
    assert transllm(*words)[0] == 0
    assert sum(body["model"] == "one" for body in server.bodies) == 5 + 1  # those of the other suites


def test_killed_among_verdicts_it_ends_the_same(
    server: Server, words: list[object], transllm: Command, tmp_path: Path
) -> None:
    server.fail = lambda body: None
    server.delay = 0.1
    verdicts = tmp_path / "out" / "verdicts.jsonl"
    command = [sys.executable, "-m", "transllm_jax.cli.main", *map(str, words), "--judge-endpoint", "concurrency=1"]
    with subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: verdicts.exists() and verdicts.read_bytes().count(b"\n") >= 3, 300)
        process.send_signal(signal.SIGKILL)
    known = verdicts.read_bytes().count(b"\n")
    server.delay = 0.0
    server.forget()
    assert transllm(*words)[0] == 0
    asked = sum(body["model"] == "judge" for body in server.bodies)
    killed = {path: path.read_text(encoding="utf-8") for path in sorted((tmp_path / "out").rglob("items.jsonl"))}
    rows = [json.loads(line) for line in verdicts.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == known + asked and len(killed) == 6
    words[-1] = tmp_path / "undisturbed"
    assert transllm(*words)[0] == 0
    for path, text in killed.items():
        other = tmp_path / "undisturbed" / path.relative_to(tmp_path / "out")
        assert other.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--judge", "{url}#one"), "the judge one is the system one: it would judge its own answers"),
        (("--max-cost", "100"), "more than --max-cost 100 tokens"),
        (("--max-cost", "much"), "--max-cost 'much': give tokens"),
        (("--judge-prices", "3"), "--judge-prices '3': give two prices"),
        (("--preset", "gpt"), "--preset 'gpt' does not exist; choose from fastchat, transllm-as-published"),
        (("--references", "all"), "--references 'all' does not exist; choose from corrected, gpt4, none"),
        (("--asked-in", "th"), "--asked-in 'th' does not exist; choose from target, english"),
        (("--references", "corrected"), "needs --reference-file, GPT-4's answers to questions 101 to 130"),
        (("--judge", "answers:x"), "a judge is a server's model (URL#MODEL) or a local model"),
        (("--judge-endpoint", "kye=1"), "judge-endpoint: kye: unknown key; did you mean 'key'?"),
        (("--judge-endpoint", "key=NO_SUCH_KEY"), "environment variable NO_SUCH_KEY is not set"),
        (("--baseline", "answers:nowhere"), "nowhere: no such file"),
        (("--baseline", "http://elsewhere/v1#two"), "a system has the name two, too; write NAME=http://elsewhere"),
        (("--preset", "transllm-as-published"), "grades single answers only; leave --baseline out"),
        (("--suite", "questions"), "the suite questions needs a file of questions; give --questions"),
        (("--questions", "safety=other"), "--questions: safety has two files"),
    ],
)
def test_bad_arguments_end_with_one_line(
    more: tuple[str, ...], problem: str, server: Server, words: list[object], transllm: Command
) -> None:
    code, printed = transllm(*words, *(word.format(url=server.url) for word in more))
    lines = printed.strip().splitlines()
    assert code == 2 and problem in lines[-1], printed
    assert not any(body["model"] == "judge" for body in server.bodies)
    # Only the cost is known after the answers.
    assert len(lines) == 1 or "100" in more


def test_a_judge_may_judge_itself_if_one_says_so(server: Server, words: list[object], transllm: Command) -> None:
    assert transllm(*words, "--judge", f"{server.url}#one", "--judge-is-system")[0] == 0


def test_a_local_model_judges(
    server: Server, words: list[object], transllm: Command, tiny_model: Path, tmp_path: Path
) -> None:
    words[words.index("mt_bench,alpaca_eval")] = "safety"
    code, printed = transllm(*words, "--judge", tiny_model, "--judge-tokens", 8, "--limit", 1)
    assert code == 0, printed
    results = json.loads((tmp_path / "out" / "one" / "safety" / "results.json").read_text(encoding="utf-8"))
    assert results["made_with"]["judge"]["kind"] == "model"
    # The tiny model's context is too short for the question, or its words are no verdict: said, and counted.
    assert (results["parsed"], results["asked"], results["worst"], results["best"]) == (0, 1, 0, 1)


def test_questions_of_single_suites(tmp_path: Path) -> None:
    assert questions_given(["a.jsonl", "safety=b.csv"]) == (Path("a.jsonl"), {"safety": Path("b.csv")})
    assert questions_given(["other=b.csv"]) == (Path("other=b.csv"), {}) and questions_given([]) == (None, {})
    with pytest.raises(UserError, match="are both for all suites"):
        questions_given(["a", "b"])
