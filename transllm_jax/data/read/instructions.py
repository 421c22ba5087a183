"""Instructions of any record: with a field `instruction`, or a conversation of one turn. Answers are not read."""

from __future__ import annotations

from transllm_jax.data.read.conversations import SYSTEM_FIELDS, first_question
from transllm_jax.data.read.files import Place
from transllm_jax.data.read.records import Record, require
from transllm_jax.errors import UserError

# Fields that other data sets have, which would change the answer and are not supported, each with how to fix it.
_TURNS = ("history", "messages", "conversations", "conversation", "dialog", "dialogue")
_INPUT = ("context", "inputs")
_OTHER = ("tools", "functions", "image", "images")
_UNSUPPORTED = {
    **dict.fromkeys(SYSTEM_FIELDS, "put its text into 'instruction', or remove it"),
    **dict.fromkeys(_TURNS, "give each question in an 'instruction' of its own, or remove it"),
    **dict.fromkeys(_INPUT, "name it 'input', or remove it"),
    **dict.fromkeys(_OTHER, "remove it, or leave the record out"),
}


def read_instruction(record: Record, place: Place) -> str:
    """What a record asks for: an instruction with its input after a blank line, or the question of a conversation.

    Raises UserError with the place for a record of another form, and for fields that would change the answer.
    """
    if record.get("instruction") is None and any(
        record.get(form) is not None for form in ("conversations", "messages")
    ):
        return first_question(record, place)
    instruction: str = require(record, "instruction", str, place)
    for name in _UNSUPPORTED.keys() & record.keys():
        if record[name] not in (None, "", [], {}):
            raise UserError(f"{place}: field {name!r} is not read ({str(record[name])[:40]!r}): {_UNSUPPORTED[name]}")
    more = record.get("input") or ""
    if not isinstance(more, str):
        raise UserError(f"{place}: field 'input' must be a string, not {str(more)[:40]}; write it as one")
    return "\n\n".join(part.strip() for part in (instruction, more) if part.strip())
