"""Instructions of any record: Alpaca's form, and conversations of one turn."""

from __future__ import annotations

from typing import Any

import pytest

from transllm_jax.data.read.files import Place
from transllm_jax.data.read.instructions import read_instruction
from transllm_jax.errors import UserError

PLACE = Place("a.jsonl", 3)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Say it.\n", "input": " Now. ", "output": "It."},
        {"messages": [{"role": "user", "content": "Say it.\n\nNow."}]},
        {
            "id": "1",
            "conversations": [
                {"from": "human", "value": "Say it.\n\nNow."},
                {"from": "gpt", "value": "<RESPONSE> It."},
            ],
        },
        # A table has all columns, empty or not.
        {"instruction": None, "messages": [{"role": "user", "content": " Say it.\n\nNow."}], "system": ""},
        {"instruction": "Say it.\n\nNow.", "messages": None},
    ],
    ids=str,
)
def test_all_forms_give_the_same_instruction(record: dict[str, Any]) -> None:
    assert read_instruction(record, PLACE) == "Say it.\n\nNow."


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "has no field 'instruction'"),
        ({"instruction": "a", **turns("user")}, "field 'messages' is not read"),
        ({**turns("user"), "conversations": [{"from": "human", "value": "x"}]}, "has 'conversations' and 'messages'"),
        ({**turns("user"), "system_prompt": "Be brief."}, "has a system message, which is not read: put its text into"),
        (turns("system", "user"), "has a system message"),
        (
            turns("user", "assistant", "user"),
            "has the turns user, assistant, user: give each question in a line of its",
        ),
        (turns("assistant"), "has the turns assistant"),
        ({**turns("user"), "tools": [1]}, "has 'tools', which is not supported"),
        (turns("tool"), "role 'tool'"),
    ],
    ids=str,
)
def test_what_would_change_the_answer_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^a.jsonl:3.*{message}"):
        read_instruction(record, PLACE)
