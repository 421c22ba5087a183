"""Stage `recover` by batch files: written, answered in any order, and read; what is missing is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import recover_setup
from openai_server import Server, completion
from recover_setup import ANSWERS, CHAINS, LIMIT, Go, Said

from transllm_jax.errors import UserError
from transllm_jax.generation import endpoint as client
from transllm_jax.stages.endpoint_check import CHECK

# Fixtures.
config, translated, own, table = recover_setup.config, recover_setup.translated, recover_setup.own, recover_setup.table
tokenizer, server, go = recover_setup.tokenizer, recover_setup.server, recover_setup.go


def by_batch(directory: Path, more: str = "") -> str:
    """The setting of a teacher that answers batch files."""
    return f"recover.teacher={{batch: '{directory}', model: small{more}}}"


def respond(directory: Path, table: dict[str, tuple[str, str]], tokens: Callable[[Any], int | None]) -> list[Any]:
    """The output lines of a batch."""
    lines = []
    for line in (directory / "requests.jsonl").read_text(encoding="utf-8").splitlines():
        request = json.loads(line)
        assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
        messages = request["body"]["messages"]
        body = completion(*table[messages[-1]["content"]], tokens(messages))
        lines.append({"id": "r", "custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}})
    return lines


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_batch_is_written_and_read(
    go: Go, server: Server, table: dict[str, tuple[str, str]], own: Path, tmp_path: Path
) -> None:
    batch = tmp_path / "batch"
    settings = by_batch(batch)
    with pytest.raises(UserError) as raised:
        go(settings)
    assert str(raised.value) == (
        f"recover.teacher: {LIMIT} requests are in {batch}/requests.jsonl; have them answered as a batch, put its "
        f"output into {batch}/responses.jsonl, and start the run again"
    )
    rows = respond(batch, table, server.tokens)
    # In any order, and with a failure that was answered later.
    failed = {"custom_id": rows[0]["custom_id"], "response": {"status_code": 500, "body": {"error": {"message": "x"}}}}
    write_lines(batch / "responses.1.jsonl", [failed, *rows[:0:-1]])
    with pytest.raises(UserError) as raised:
        go(settings)
    line, id = str(raised.value), rows[0]["custom_id"]
    assert (
        f"no answer to 1 of {LIMIT} requests; 1 failed: {id} (status 500: x); have {batch}/requests.again.jsonl" in line
    )
    again = [json.loads(one) for one in (batch / "requests.again.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["custom_id"] for one in again] == [id]
    write_lines(batch / "responses.again.jsonl", rows[:1])
    go(settings)
    here = tmp_path / "run" / "recover"
    for name in (ANSWERS, CHAINS):
        assert (here / name).read_bytes() == (own / name).read_bytes()
    assert json.loads((here / CHECK).read_text(encoding="utf-8"))["same_first_tokens"] == LIMIT


def test_missing_and_failed_ids_of_a_batch_are_named_and_counted(
    go: Go, server: Server, table: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    batch = tmp_path / "batch"
    settings = by_batch(batch)
    with pytest.raises(UserError):
        go(settings)
    rows = respond(batch, table, server.tokens)
    ids = [row["custom_id"] for row in rows]
    rows[0] = {"custom_id": ids[0], "response": None, "error": {"code": "batch_expired", "message": "too late"}}
    write_lines(batch / "responses.jsonl", rows[:4])
    with pytest.raises(UserError) as raised:
        go(settings)
    line = str(raised.value)
    assert (
        f"no answer to 7 of 10 requests; 6 missing: {', '.join(ids[4:9])} and 1 more; 1 failed: {ids[0]} (too late)"
        in line
    )
    assert len((batch / "requests.again.jsonl").read_bytes().splitlines()) == 7
    said = Said()
    summary = go(by_batch(batch, ", refused: drop"), progress=said)
    assert summary["answers"] == 10 and summary["unfinished"] >= 7 and summary["chains"] <= 3
    assert any(
        f"{batch} has no answer to 7 of 10 requests, left out; the first, {ids[0]}: too late" in x for x in said.lines
    )
    # Answers to other questions are none to these.
    shutil.rmtree(tmp_path / "run" / "recover")
    with pytest.raises(UserError, match=r"\(the 4 responses that are there are to other requests: remove them\)"):
        go(settings.replace("small", "large"))
    (batch / "responses.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"responses\.jsonl:1 is no line of a batch's output \('custom_id'\)"):
        go(settings)


def test_a_batch_of_another_model_stops_the_run(
    go: Go, server: Server, table: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    batch = tmp_path / "batch"
    settings = by_batch(batch)
    with pytest.raises(UserError):
        go(settings)
    write_lines(batch / "responses.jsonl", respond(batch, table, lambda messages: (server.tokens(messages) or 0) + 1))
    with pytest.raises(UserError, match="most likely it writes a second BOS token"):
        go(settings)
    assert not (tmp_path / "run" / "recover" / ANSWERS).exists()


def test_batches_of_all_translations_are_written_at_once(go: Go, tmp_path: Path) -> None:
    changes = [
        f"recover.translate_{kind}={{translator: {{batch: '{tmp_path / kind}', model: mt}}}}"
        for kind in ("instructions", "answers")
    ]
    with pytest.raises(UserError) as raised:
        go(*changes)
    assert str(raised.value).count("start the run again") == 2
    for kind in ("instructions", "answers"):
        assert (tmp_path / kind / "requests.jsonl").is_file()


def test_large_batches_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transllm_jax.generation import batch_files

    some = [client.Request(f"id {number}", {"text": "x" * number}) for number in range(7)]
    monkeypatch.setattr(batch_files, "MOST_REQUESTS", 3)
    paths = batch_files.write_requests(tmp_path, some)
    assert [path.name for path in paths] == ["requests.jsonl", "requests.2.jsonl", "requests.3.jsonl"]
    assert [len(path.read_bytes().splitlines()) for path in paths] == [3, 3, 1]
    monkeypatch.setattr(batch_files, "MOST_BYTES", paths[0].stat().st_size - 1)
    assert len(batch_files.write_requests(tmp_path / "b", some[:3])) == 2
