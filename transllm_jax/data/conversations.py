"""Conversations: three forms of records, read as one list of messages.

The forms are told apart by a record's fields: `conversations: [{from, value}]` (the reference code's, and ShareGPT's),
`messages: [{role, content}]` (OpenAI's), and `instruction`, `input`, `output` (Alpaca's).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transllm_jax.data.files import Collector, Place
from transllm_jax.data.records import Record, checked, missing_field, of_kind
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chat import Message

Form = Literal["conversations", "messages", "instruction"]

_FORMS: tuple[Form, ...] = ("conversations", "messages", "instruction")
_SHAPES: dict[Form, str] = {
    "conversations": "conversations: [{from, value}]",
    "messages": "messages: [{role, content}]",
    "instruction": "instruction, input, output",
}
# The names of a message's two fields, and of the roles in the first.
_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
_ROLES = {
    "conversations": {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
    },
    "messages": {"user": "user", "assistant": "assistant", "system": "system"},
}
# Fields that change what a conversation says, and that have no place in ours.
_MEANT = ("system", "history", "tools", "functions")
_MEANT_OF_MESSAGE = ("tool_calls", "function_call")
# All that is read of a record.
FIELDS = (*_FORMS, "input", "output", *_MEANT)


def form_of(record: Record, place: Place) -> Form:
    """The form of a record. Raises UserError with the place for a record of none, or of more than one."""
    # A table has all fields in all rows; what a row does not have is null there.
    found = [form for form in _FORMS if record.get(form) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{place} has {' and '.join(map(repr, found))}: a conversation is in one of them; remove the other"
        )
    has = ", ".join(map(str, record)) or "none"
    raise UserError(f"{place} is no conversation (it has: {has}): write one of {'; '.join(_SHAPES.values())}")


def conversation(record: Record, form: Form, place: Place, collector: Collector) -> list[Message]:
    """The messages of a record of this form: user and assistant in turns, after a system message, if there is one.

    A question at the end that nobody answers is kept. Contents are as written, without control characters.
    Raises UserError with the place for a record of another form, unknown roles, turns out of order, empty contents,
    a conversation without an answer, and fields that mean something and are not supported.
    """
    own = form_of(record, place)
    if own != form:
        raise UserError(
            f"{place} is of the form {_SHAPES[own]}, and what stands before it of {_SHAPES[form]}: "
            "make each form a source of its own"
        )
    _refuse(record, _MEANT, str(place))
    messages = _alpaca(record, place, collector) if form == "instruction" else _turns(record, form, place, collector)
    _check_order(messages, place)
    return messages


def _refuse(record: Record, names: tuple[str, ...], what: str) -> None:
    found = [name for name in names if record.get(name)]
    if found:
        raise UserError(
            f"{what} has {', '.join(map(repr, found))}, which is not supported: make it messages (a system message is "
            "the first one), or remove it"
        )


def _alpaca(record: Record, place: Place, collector: Collector) -> list[Message]:
    if "output" not in record:
        raise missing_field(record, "output", place)
    question = [checked(record["instruction"], "instruction", place, collector).strip()]
    more = record.get("input")
    if more not in (None, "") and (not isinstance(more, str) or more.strip()):
        question.append(checked(more, "input", place, collector).strip())
    answer = checked(record["output"], "output", place, collector)
    return [{"role": "user", "content": "\n\n".join(question)}, {"role": "assistant", "content": answer}]


def _turns(record: Record, form: str, place: Place, collector: Collector) -> list[Message]:
    role_key, text_key = _KEYS[form]
    messages: list[Message] = []
    for number, turn in enumerate(of_kind(_as_rows(record[form]), form, list, place), 1):
        where = f"{place}: message {number}"
        if not isinstance(turn, Mapping):
            raise UserError(f"{where} must be an object with {role_key!r} and {text_key!r}, not {str(turn)[:40]!r}")
        for key in (role_key, text_key):
            if key not in turn:
                raise missing_field(turn, key, where)
        _refuse(turn, _MEANT_OF_MESSAGE, where)
        role = turn[role_key]
        if not isinstance(role, str) or role not in _ROLES[form]:
            raise UserError(
                f"{where} has the role {str(role)[:40]!r} in {role_key!r}, which is not known: use one of "
                f"{', '.join(_ROLES[form])}, or remove the {place.unit}"
            )
        name = f"{form}.{number}.{text_key}"
        messages.append({"role": _ROLES[form][role], "content": checked(turn[text_key], name, place, collector)})
    return messages


def _as_rows(turns: Any) -> Any:
    """A list of objects. Some tables keep it as an object of lists, which is turned around."""
    if isinstance(turns, Mapping) and all(isinstance(column, list) for column in turns.values()):
        columns = list(turns.values())
        if columns and all(len(column) == len(columns[0]) for column in columns):
            return [dict(zip(turns, row, strict=True)) for row in zip(*columns, strict=True)]
    return turns


def _check_order(messages: list[Message], place: Place) -> None:
    begin = int(messages[0]["role"] == "system")
    for number, message in enumerate(messages[begin:]):
        wanted = ("user", "assistant")[number % 2]
        if message["role"] != wanted:
            raise UserError(
                f"{place}: message {number + begin + 1} is the {message['role']}'s where the {wanted}'s belongs: after "
                f"a system message, if there is one, user and assistant take turns; mend it or remove the {place.unit}"
            )
    if len(messages) < begin + 2:
        raise UserError(f"{place} has no answer to train on: add the assistant's message or remove the {place.unit}")
