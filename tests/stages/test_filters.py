"""Which answers of the original model are left out, and for which reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from transllm_jax.config import Filters
from transllm_jax.stages.filters import DROPPED, counts, shown, sort_out, write_dropped

LOOP = "I do not know what to say about it. " * 6


def row(answer: str, finished: bool = True) -> dict[str, Any]:
    return {"instruction": "Say it.", "answer": answer, "finished": finished}


GOOD = [row("The capital of France is Paris."), row("42"), row("Say สวัสดี to greet somebody in Thai.")]
BAD = {
    "empty": row(" \n"),
    "cut off": row("The capital of", finished=False),
    "repetitive": row(LOOP),
    "wrong language": row("สวัสดีครับ ยินดีที่ได้รู้จัก OK"),
}


def test_each_answer_has_one_reason() -> None:
    rows = [GOOD[0], *BAD.values(), *GOOD[1:]]
    found = sort_out(rows, Filters(), keep_unfinished=False)
    assert found.usable == GOOD
    assert [dropped["reason"] for dropped in found.dropped] == list(BAD)
    assert [dropped["answer"] for dropped in found.dropped] == [given["answer"] for given in BAD.values()]
    assert {dropped["of"] for dropped in found.dropped} == {"answer"}
    assert found.dropped[2]["measure"] > 0.8 and found.dropped[3]["measure"] < 0.2
    # A loop that was cut off is cut off.
    assert counts(sort_out([row(LOOP, finished=False)], Filters(), keep_unfinished=False).dropped) == {"cut off": 1}
    assert counts(sort_out([row(LOOP, finished=False)], Filters(), keep_unfinished=True).dropped) == {"repetitive": 1}


@pytest.mark.parametrize(
    ("filters", "keep_unfinished", "left"),
    [
        (Filters(max_repeated=1), False, {"empty", "cut off", "wrong language"}),
        (Filters(min_latin_share=0), False, {"empty", "cut off", "repetitive"}),
        (Filters(max_repeated=1, min_latin_share=0), True, {"empty"}),
    ],
)
def test_each_filter_can_be_switched_off(filters: Filters, keep_unfinished: bool, left: set[str]) -> None:
    found = sort_out(list(BAD.values()), filters, keep_unfinished=keep_unfinished)
    assert set(counts(found.dropped)) == left


def test_the_file_lists_what_is_left_out(tmp_path: Path) -> None:
    rows = [*BAD.values(), row("x", finished=False)]
    dropped = sort_out(rows, Filters(), keep_unfinished=False).dropped
    write_dropped(tmp_path, dropped)
    assert [json.loads(line) for line in (tmp_path / DROPPED).read_text(encoding="utf-8").splitlines()] == dropped
    assert shown(counts(dropped)) == "2 cut off, 1 empty, 1 repetitive, 1 wrong language"
    write_dropped(tmp_path, [])
    assert (tmp_path / DROPPED).read_bytes() == b""
