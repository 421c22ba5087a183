"""The records that `transllm generate` answers: read from a file of JSON lines, and why a line cannot be answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transllm_jax.commands.open_chat import ChatModel
from transllm_jax.disk import is_utf8
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chat import Message, encode_prompt, encode_text

# What a record may ask with: a conversation, a text to continue, or an instruction. One of them.
ASKS = ("messages", "prompt", "instruction")
# What is added to a record. Its own fields of these names are replaced.
ADDED = ("text", "finish_reason", "tokens", "how", "chain")


class Rejected(Exception):
    """Why a line of the input is not answered."""


@dataclass(frozen=True)
class Item:
    """A record that is to be answered. tokens: the length of its prompt."""

    record: dict[str, Any]
    tokens: int

    @property
    def key(self) -> str:
        """Its id, as JSON: the number 1 and the text "1" differ."""
        return json.dumps(self.record["id"])


def prompt_of(opened: ChatModel, record: Mapping[str, Any]) -> list[int]:
    """The ids of what a record asks. Raises Rejected."""
    tokenizer = opened.tokenizer
    (name,) = (name for name in ASKS if name in record)
    asked = record[name]
    if name == "prompt":
        ids = encode_text(tokenizer, asked)
        if not ids:
            raise Rejected("the prompt is empty")
        return ids
    try:
        return encode_prompt(tokenizer, messages_of(record), opened.markers.in_order())
    except UserError as error:
        raise Rejected(str(error)) from None


def messages_of(record: Mapping[str, Any]) -> list[Message]:
    """The conversation that a record asks to go on with."""
    if "instruction" in record:
        return [{"role": "user", "content": record["instruction"]}]
    messages: list[Message] = record["messages"]
    return messages


def read_items(
    source: Path, opened: ChatModel, share: tuple[int, int], max_new_tokens: int
) -> tuple[list[Item], list[dict[str, Any]]]:
    """The records of a share that can be answered, and the lines that cannot, with their numbers and reasons.

    Raises UserError for a file in UTF-16.
    """
    items: list[Item] = []
    rejected: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    own, of = share
    order = 0
    # Bytes, because a line may be no UTF-8; and because str.splitlines would split at more than line breaks.
    content = source.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{source} is UTF-16; save it as UTF-8")
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        order += 1
        mine = order % of == own % of
        try:
            record = _record(line, number)
            key = json.dumps(record["id"])
            if key in places:
                raise Rejected(f"line {places[key]} has the id {key}, too")
            prompt = prompt_of(opened, record)
            if len(prompt) + max_new_tokens > opened.config.context:
                more = f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones"
                raise Rejected(f"{more} exceed the model's context of {opened.config.context}")
        except Rejected as reason:
            if mine:
                text = line.decode(errors="backslashreplace")
                rejected.append({"line": number, "reason": str(reason), "text": text})
            continue
        places[key] = number
        if mine:
            items.append(Item(record, len(prompt)))
    return items, rejected


def _record(line: bytes, number: int) -> dict[str, Any]:
    """The record of a line, with an id: the line's number if it has none. Raises Rejected."""
    try:
        record = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Rejected(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise Rejected("not a JSON object")
    if not is_utf8(json.dumps(record, ensure_ascii=False)):
        raise Rejected("half of a character (a lone surrogate) is in it, which no UTF-8 file can hold")
    if not isinstance(record.setdefault("id", number), str | int) or isinstance(record["id"], bool):
        raise Rejected("its id is neither a text nor a whole number")
    asks = [name for name in ASKS if name in record]
    if len(asks) != 1:
        raise Rejected(f"it needs one of {', '.join(ASKS)}, and has {' and '.join(asks) or 'none'}")
    asked = record[asks[0]]
    if asks[0] == "messages":
        if not _are_messages(asked):
            raise Rejected("messages must be a list of {'role': text, 'content': text}")
        if asked[-1]["role"] == "assistant":
            raise Rejected("the last message is an answer already")
    elif not isinstance(asked, str) or not asked.strip():
        raise Rejected(f"its {asks[0]} is no text, or empty")
    return record


def _no_number(name: str) -> None:
    # Python writes and reads NaN and Infinity; other programs do not, and NaN is not equal to itself.
    raise ValueError(f"{name} is no number of JSON")


def _are_messages(value: Any) -> bool:
    def is_message(one: Any) -> bool:
        return isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)

    return isinstance(value, list) and bool(value) and all(map(is_message, value))
