"""Conversations: records of three forms, read as lists of messages.

A record's fields tell its form: `conversations: [{from, value}]` (the reference code and ShareGPT),
`messages: [{role, content}]` (OpenAI), or `instruction`, `input`, `output` (Alpaca).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transllm_jax.data.read.files import BadRow, Collector, Place
from transllm_jax.data.read.records import Record, missing_field, require_text, require_type
from transllm_jax.tokenizer.chat import Message, is_trained

Form = Literal["conversations", "messages", "instruction"]

_FORMS: tuple[Form, ...] = ("conversations", "messages", "instruction")
_SHAPES: dict[Form, str] = {
    "conversations": "conversations: [{from, value}]",
    "messages": "messages: [{role, content}]",
    "instruction": "instruction, input, output",
}
# The names of a message's two fields, and the roles that the first may hold.
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
# Fields that hold a system message, next to the list of messages.
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
# Fields that change what a conversation says or what is learned from it, and that are not supported.
_UNSUPPORTED = (
    *("history", "tools", "functions", "documents", "chosen", "rejected"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
_UNSUPPORTED_IN_MESSAGE = (
    *("tool_calls", "tool_call_id", "function_call", "name", "refusal", "prefix"),
    *("reasoning_content", "reasoning", "thinking"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
# Other programs' counterparts of `weight` and `train`: each has a meaning of its own.
_FLAGS = ("training", "trainable", "loss", "loss_weight", "mask", "masked", "train_detail", "train_offsets")
# All fields of a record that are read.
FIELDS = (*_FORMS, "input", "output", *SYSTEM_FIELDS, *_UNSUPPORTED)


def form_of(record: Record, place: Place) -> Form:
    """The form of a record. Raises BadRow with the place if it has no known form or more than one."""
    # A table has every field in every row; a field that a row lacks is null.
    found = [form for form in _FORMS if record.get(form) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise BadRow(
            f"{place} has {' and '.join(map(repr, found))}: a conversation is in one of them; remove the other",
            "two forms",
        )
    has = ", ".join(map(str, record)) or "none"
    raise BadRow(
        f"{place} is not a conversation (it has: {has}): write one of {'; '.join(_SHAPES.values())}", "no conversation"
    )


def conversation(record: Record, form: Form, place: Place, collector: Collector) -> list[Message]:
    """The messages of a record of this form: an optional system message, then user and assistant in turns.

    An answer that is not trained on (`weight: 0` or `train: false`) has `train` False. An unanswered question at the
    end is kept. Contents are as written, without control characters. The collector counts the fields that are not read,
    by name. Raises BadRow with the place for a record of another form, unknown roles, turns out of order, empty
    contents, a conversation without an answer to train on, and unsupported fields that change the meaning.
    """
    found = form_of(record, place)
    if found != form:
        raise BadRow(
            f"{place} is of the form {_SHAPES[found]}, and the records before it are of {_SHAPES[form]}: "
            "make each form a source of its own",
            "another form",
        )
    _refuse(record, _UNSUPPORTED, str(place))
    messages = _alpaca(record, place, collector) if form == "instruction" else _turns(record, form, place, collector)
    messages = _with_system(messages, record, place, collector)
    _check_order(messages, place)
    read = {form, *SYSTEM_FIELDS, *_UNSUPPORTED, *(("input", "output") if form == "instruction" else ())}
    collector.ignored.update(name for name, value in record.items() if name not in read and value is not None)
    return messages


def first_question(record: Record, place: Place) -> str:
    """The question of a conversation (`conversations` or `messages`) of one turn; an answer to it is not used.

    Raises BadRow with the place for a system message, more turns, and what `conversation` refuses.
    """
    form = form_of(record, place)
    _refuse(record, _UNSUPPORTED, str(place))
    collector = Collector("refuse")
    messages = _with_system(_turns(record, form, place, collector), record, place, collector)
    roles = [message["role"] for message in messages]
    if roles[0] == "system":
        raise BadRow(
            f"{place} has a system message, which is not read: put its text into the question, or remove it",
            "system message",
        )
    if roles not in (["user"], ["user", "assistant"]):
        raise BadRow(
            f"{place} has the turns {', '.join(roles)[:60]}: give each question in a {place.unit} of its own",
            "more turns",
        )
    return messages[0]["content"].strip()


def _refuse(record: Record, names: tuple[str, ...], what: str) -> None:
    found = [name for name in names if record.get(name)]
    if found:
        raise BadRow(
            f"{what} has {', '.join(map(repr, found))}, which is not supported: move its content into the messages, or "
            "remove it",
            "unsupported field",
        )


def _with_system(messages: list[Message], record: Record, place: Place, collector: Collector) -> list[Message]:
    """The messages, after the system message that the record has in a field of its own, if there is one."""
    given = {name: record.get(name) for name in SYSTEM_FIELDS}
    found = {
        name: require_text(value, name, place, collector)
        for name, value in given.items()
        if value is not None and (not isinstance(value, str) or value.strip())
    }
    if messages[0]["role"] == "system":
        found["the first message"] = messages[0]["content"]
        messages = messages[1:]
    if len({text.strip() for text in found.values()}) > 1:
        raise BadRow(
            f"{place} has different system messages in {' and '.join(found)}: keep only one of them",
            "two system messages",
        )
    return [*[Message(role="system", content=text) for text in list(found.values())[-1:]], *messages]


def _alpaca(record: Record, place: Place, collector: Collector) -> list[Message]:
    if "output" not in record:
        raise missing_field(record, "output", place)
    question = [require_text(record["instruction"], "instruction", place, collector).strip()]
    more = record.get("input")
    if more not in (None, "") and (not isinstance(more, str) or more.strip()):
        question.append(require_text(more, "input", place, collector).strip())
    answer = require_text(record["output"], "output", place, collector)
    return [{"role": "user", "content": "\n\n".join(question)}, {"role": "assistant", "content": answer}]


def _turns(record: Record, form: str, place: Place, collector: Collector) -> list[Message]:
    role_key, text_key = _KEYS[form]
    messages: list[Message] = []
    unread: set[str] = set()
    for number, turn in enumerate(require_type(_as_rows(record[form]), form, list, place), 1):
        where = f"{place}: message {number}"
        if not isinstance(turn, Mapping):
            raise BadRow(
                f"{where} must be an object with {role_key!r} and {text_key!r}, not {str(turn)[:40]!r}", "not an object"
            )
        for key in (role_key, text_key):
            if key not in turn:
                raise missing_field(turn, key, where)
        _refuse(turn, _UNSUPPORTED_IN_MESSAGE, where)
        role = turn[role_key]
        if not isinstance(role, str) or role not in _ROLES[form]:
            raise BadRow(
                f"{where} has the role {str(role)[:40]!r} in {role_key!r}, which is not known: use one of "
                f"{', '.join(_ROLES[form])}, or remove the {place.unit}",
                "unknown role",
            )
        name = f"{form}.{number}.{text_key}"
        message: Message = {"role": _ROLES[form][role], "content": require_text(turn[text_key], name, place, collector)}
        if not _trained(turn, message["role"], where):
            message["train"] = False
        messages.append(message)
        read = (role_key, text_key, "weight", "train", *_UNSUPPORTED_IN_MESSAGE, *_FLAGS)
        unread |= {f"{form}.{key}" for key, value in turn.items() if key not in read and value is not None}
    collector.ignored.update(unread)
    return messages


def _trained(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a message is trained on as its role implies: False for an answer that is only context."""
    other = [name for name in _FLAGS if turn.get(name) is not None]
    if other:
        raise BadRow(
            f"{where} has {', '.join(map(repr, other))}, which is not read: set `train: true` or `train: false` "
            "on the answer instead",
            "unsupported field",
        )
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise BadRow(
            f"{where} has the weight {str(weight)[:40]}: an answer is trained on (1) or is only context (0)",
            "unsupported weight",
        )
    if train is not None and not isinstance(train, bool):
        raise BadRow(f"{where} has {str(train)[:40]!r} in 'train': write true or false", "unsupported weight")
    if weight is not None and train is not None and bool(weight) != train:
        raise BadRow(
            f"{where} has the weight {weight} and train {str(train).lower()}: keep only one", "unsupported weight"
        )
    if role != "assistant":
        # Exports give every message weight 1; train: true is set on purpose.
        if train:
            raise BadRow(
                f"{where} is the {role}'s and has train true: only answers are trained on", "train of no answer"
            )
        return True
    return train is not False and weight != 0


def _as_rows(turns: Any) -> Any:
    """The turns as a list of objects. Some tables store an object of lists, which is transposed."""
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
            raise BadRow(
                f"{place}: message {number + begin + 1} is the {message['role']}'s where the {wanted}'s belongs: after "
                f"a system message, if there is one, user and assistant take turns; fix it or remove the {place.unit}",
                "turns out of order",
            )
    if not any(map(is_trained, messages)):
        raise BadRow(
            f"{place} has no answer to train on: add the assistant's message or remove the {place.unit}", "no answer"
        )
