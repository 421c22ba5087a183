"""Conversations: their forms, their errors, and answers that are only context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_sources import hash_of, items, jsonl

from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.shards import Reading, shards
from transllm_jax.errors import UserError


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


def flagged(**fields: object) -> dict[str, Any]:
    """A question, and an answer with these further fields."""
    return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", **fields}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"is not a conversation \(it has: text\): write one of"),
        ({"messages": None}, "is not a conversation"),
        ({**turns("user"), "instruction": "a"}, "has 'messages' and 'instruction'"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hello"}, "'messages' must be a list"),
        ({"messages": ["hello"]}, "message 1 must be an object"),
        ({"messages": [{"from": "human", "value": "x"}]}, "message 1 has no field 'role' .*from, value"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "message 1 has no field 'from'"),
        (turns("user", "tool"), "message 2 has the role 'tool' in 'role'.* user, assistant, system"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "the role 'bing' in 'from'"),
        (turns("assistant", "user"), "message 1 is the assistant's where the user's belongs"),
        (turns("user", "user"), "message 2 is the user's where the assistant's"),
        (turns("user", "system", "assistant"), "message 2 is the system's"),
        (turns("system", "assistant"), "message 2 is the assistant's"),
        (turns("user"), "no answer to train on"),
        (turns("system", "user"), "no answer to train on"),
        (turns("system"), "no answer to train on"),
        ({"messages": [{"role": "user", "content": " "}]}, r"'messages.1.content' is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"'messages.1.content' must be a string"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "has 'tool_calls', which is not supp"),
        ({**turns("user", "assistant"), "system": 5}, "'system' must be a string, not 5"),
        ({**turns("system", "user", "assistant"), "system": "Be good"}, "different system messages in system and the"),
        ({**turns("user", "assistant"), "system": "a", "system_prompt": "b"}, "in system and system_prompt"),
        ({**turns("user", "assistant"), "image": "0.jpg"}, "has 'image', which is not supported"),
        ({**turns("user", "assistant"), "chosen": ["a"], "tools": "[]"}, "has 'tools', 'chosen', which is not supp"),
        (flagged(reasoning_content="So."), "message 2 has 'reasoning_content', which is not supported"),
        (flagged(refusal="No."), "message 2 has 'refusal'"),
        (flagged(masked=False), "message 2 has 'masked', which is not read: set `train: true`"),
        (flagged(train_detail=[]), "message 2 has 'train_detail', which is not read"),
        (flagged(weight=0.5), "message 2 has the weight 0.5: an answer is trained on .1. or is only context .0."),
        (flagged(weight=True), "message 2 has the weight True"),
        (flagged(train="no"), "message 2 has 'no' in 'train': write true or false"),
        (flagged(train=False, weight=1), "message 2 has the weight 1 and train false: keep only one"),
        (flagged(weight=0), "no answer to train on"),
        (flagged(train=False), "no answer to train on"),
        ({"messages": [{"role": "user", "content": "x", "train": True}]}, "message 1 is the user's and has train true"),
        ({"instruction": "a"}, "has no field 'output'"),
        ({"instruction": "a", "output": " "}, "'output' is empty"),
        ({"instruction": "a", "output": "b", "input": 5}, "'input' must be a string"),
        ({"instruction": "a", "output": "b", "history": [["q", "a"]]}, "has 'history'"),
    ],
)
def test_bad_conversations_are_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [record])
    with pytest.raises(UserError, match=message) as caught:
        items(Reading(str(path), "conversations"))
    assert "a.jsonl:1" in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_of_two_forms_is_refused(tmp_path: Path) -> None:
    chat, alpaca = turns("user", "assistant"), {"instruction": "a", "output": "b"}
    path = jsonl(tmp_path / "a.jsonl", [chat, alpaca])
    with pytest.raises(UserError, match=r"a\.jsonl:2 is of the form instruction, input, output.*messages"):
        items(Reading(str(path), "conversations"))
    jsonl(tmp_path / "b" / "a.jsonl", [chat])
    jsonl(tmp_path / "b" / "b.jsonl", [alpaca])
    _, second = shards(Reading(str(tmp_path / "b" / "*.jsonl"), "conversations"), hash_of)
    with pytest.raises(UserError, match=r"b\.jsonl:1 is of the form instruction"):
        list(second.items(Collector("refuse")))


def test_a_table_of_columns_is_a_list_of_messages(tmp_path: Path) -> None:
    columns = {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}
    assert items(Reading(str(jsonl(tmp_path / "a.jsonl", [columns])), "conversations")) == [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ]


@pytest.mark.parametrize("form", ["conversations", "messages"])
@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}])
def test_an_answer_may_be_context_only(tmp_path: Path, form: str, flag: dict[str, Any]) -> None:
    role, text, assistant = ("from", "value", "gpt") if form == "conversations" else ("role", "content", "assistant")
    turns = [
        # Exports give every message a weight.
        {role: "user", text: "a", "weight": 1},
        {role: assistant, text: "WRONG", **flag},
        {role: "user", text: "b", "weight": 0, "train": None},
        {role: assistant, text: "right", "weight": 1, "train": True},
    ]
    (found,) = items(Reading(str(jsonl(tmp_path / "a.jsonl", [{form: turns}])), "conversations"))
    assert isinstance(found, list)
    assert [message.get("train") for message in found] == [None, False, None, None]
    assert [message["content"] for message in found] == ["a", "WRONG", "b", "right"]


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_field_becomes_the_first_message(tmp_path: Path, name: str) -> None:
    shapes: list[dict[str, Any]] = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"instruction": "a", "output": "b"},
    ]
    same = {"messages": [{"role": "system", "content": "Be brief. "}, *shapes[1]["messages"]]}
    for record in (*shapes, same):
        path = str(jsonl(tmp_path / "a.jsonl", [{**record, name: "Be brief."}, {**shapes[0], name: " "}][:1]))
        (found,) = items(Reading(path, "conversations"))
        assert [str(message["content"]).strip() for message in found if isinstance(message, dict)] == [
            "Be brief.",
            "a",
            "b",
        ]
        assert isinstance(found[0], dict) and found[0]["role"] == "system"
    path = str(jsonl(tmp_path / "a.jsonl", [{**shapes[0], name: " "}]))
    assert len(items(Reading(path, "conversations"))[0]) == 2


def test_unread_fields_are_counted(tmp_path: Path) -> None:
    records = [
        {**flagged(timestamp=5), "id": "1", "source": "here"},
        {**flagged(timestamp=None, train=None), "id": "2", "source": None, "image": "", "tools": []},
    ]
    (shard,) = shards(Reading(str(jsonl(tmp_path / "a.jsonl", records)), "conversations"), hash_of)
    collector = Collector("refuse")
    assert len(list(shard.items(collector))) == 2
    assert collector.ignored == {"id": 2, "source": 1, "messages.timestamp": 1}
