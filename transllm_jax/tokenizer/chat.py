"""Conversations as token ids, by the model's own chat template: the same for training, generation and export.

The template is rendered as in transformers (a test compares them), with thinking switched off
(`enable_thinking=False`): a template that writes an empty block of thoughts puts it into the prompt, in training as in
generation. The assistant's parts are found by rendering prefixes of the conversation. Most templates only append, so a
conversation is one row. If a template rewrites earlier turns (Qwen3's removes the block from them), each answer is a
row of its own, after exactly the prompt that generation would have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, time
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn, NotRequired, TypedDict

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chain import MARKERS
from transllm_jax.tokenizer.tokenizer import ROLES, Tokenizer


class Message(TypedDict):
    """One message of a conversation; `role` is `system`, `user` or `assistant`.

    An answer with `train: False` is context and not trained on.
    """

    role: str
    content: str
    train: NotRequired[bool]


class Row(NamedTuple):
    """A row to train on. mask: 1 on the tokens of trained answers, including their end tokens, else 0.

    size: the UTF-8 bytes of these answers.
    """

    ids: list[int]
    mask: list[int]
    size: int


class _Turn(NamedTuple):
    """An answer as the template writes it after `prompt`, up to its end token; `end` is that token."""

    prompt: str
    answer: str
    end: str


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which some templates mark the assistant's part; it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def render(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The conversation as text by the model's chat template, as in transformers.

    That is `apply_chat_template(tokenize=False, enable_thinking=False)`, with the tokenizer's date. Raises UserError if
    there is no template, or if the template refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.source} has no chat template: take a chat model, or add chat_template.jinja")
    roles = {name: token for name in ROLES if (token := tokenizer.role(name)) is not None}
    today = datetime.combine(tokenizer.today, time())
    try:
        return _compile(tokenizer.chat_template).render(
            messages=[{"role": m["role"], "content": m["content"]} for m in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
            strftime_now=today.strftime,
            **roles,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template of {tokenizer.source} refuses the conversation: {error}") from error


def default_system_prompt(tokenizer: Tokenizer) -> str | None:
    """The system message that the template writes if a conversation has none; None if it writes none.

    None, too, for a template that refuses system messages, and for a system message that depends on the user's.
    """
    probe: Message = {"role": "user", "content": "question"}
    try:
        given = render(tokenizer, [{"role": "system", "content": "\ue000"}, probe], add_generation_prompt=True)
    except UserError:
        return None
    before, mark, after = given.partition("\ue000")
    own = render(tokenizer, [probe], add_generation_prompt=True)
    if not mark or not own.startswith(before) or not own.endswith(after) or len(own) <= len(before) + len(after):
        return None
    return own[len(before) : len(own) - len(after)]


def _check(tokenizer: Tokenizer, messages: Sequence[Message], markers: Sequence[str]) -> None:
    if not messages:
        raise UserError("an empty conversation: give at least one message")
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] not in ("system", "user", "assistant"):
            raise UserError(f"message {i} has the role {message['role']!r}: use system, user or assistant")
        if message["role"] == "assistant":
            for marker in markers:
                content = content.replace(marker, " ")
            if not content.strip():
                raise UserError(f"message {i} is an empty answer: drop this conversation")
        found = tokenizer.find_special(content)
        if found:
            raise UserError(
                f"message {i} ({message['role']}) contains the special token {found!r}: remove it from {content[:60]!r}"
            )


def _turn(tokenizer: Tokenizer, messages: Sequence[Message], number: int) -> _Turn:
    """The answer in message `number`. Raises UserError if answers cannot be located in the template's text."""
    prompt = render(tokenizer, messages[:number], add_generation_prompt=True) if number else ""
    whole = render(tokenizer, messages[: number + 1])
    content = messages[number]["content"].strip()
    answer = whole[len(prompt) :]
    start = answer.find(content)
    tail = answer[start + len(content) :]
    end = tokenizer.find_special(tail)
    problem = None
    if not whole.startswith(prompt):
        problem = "writes a text before an answer that differs from the generation prompt"
    elif start < 0:
        problem = "changes the answer's text"
    elif answer[:start].strip():
        problem = f"puts {answer[:start].strip()!r} between the generation prompt and an answer"
    elif end is None:
        problem = "ends an answer without a special token"
    if problem or end is None:
        raise UserError(f"the chat template of {tokenizer.source} {problem}: use a template that does not")
    return _Turn(prompt, answer[: len(answer) - len(tail) + tail.index(end) + len(end)], end)


def answer_end(tokenizer: Tokenizer) -> str | None:
    """The special token with which the chat template ends an answer; None if there is no template.

    Raises UserError for a template that cannot be trained on.
    """
    if tokenizer.chat_template is None:
        return None
    return _turn(tokenizer, _PROBE[:2], 1).end


def without_thinking(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a chat template that always switches thinking off, as `render` does.

    Otherwise other programs that render a template with `enable_thinking` would make prompts that were never trained.
    """
    template = tokenizer.chat_template
    if template is None or "enable_thinking" not in template or template.startswith(_THINKING_OFF):
        return tokenizer
    return tokenizer.derived(chat_template=_THINKING_OFF + template)


# `trim_blocks` removes the line break after a block.
_THINKING_OFF = "{%- set enable_thinking = false %}\n"


def check_template(tokenizer: Tokenizer) -> None:
    """Raise UserError, with the reason, if a conversation in this chat template cannot be trained on."""
    encode_conversation(tokenizer, _PROBE)


# A conversation that every template must accept: no system message, two turns.
_PROBE: list[Message] = [
    {"role": "user", "content": "Which month follows April?"},
    {"role": "assistant", "content": "May follows it."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "June follows May."},
]


def _answers(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def is_trained(message: Message) -> bool:
    """Whether a message is an answer that is trained on."""
    return message["role"] == "assistant" and message.get("train", True)


def _segments(tokenizer: Tokenizer, messages: Sequence[Message], generate: bool) -> list[tuple[str, bool]] | None:
    """The rendered conversation as segments (text, is trained), in order: each answer with its end token is one.

    None if the template rewrites a turn when another one follows it.
    """
    segments: list[tuple[str, bool]] = []
    done = ""  # the rendered text that is in `segments` already
    for number in _answers(messages):
        turn = _turn(tokenizer, messages, number)
        if not turn.prompt.startswith(done):
            return None
        segments += [(turn.prompt[len(done) :], False), (turn.answer, is_trained(messages[number]))]
        done = turn.prompt + turn.answer
    last = render(tokenizer, messages, add_generation_prompt=generate)
    return [*segments, (last[len(done) :], False)] if last.startswith(done) else None


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], markers: Sequence[str] = MARKERS.in_order()
) -> list[int]:
    """The ids that generation starts from: the conversation so far and the header of the next answer.

    `encode_conversation` puts the same ids before this answer. Raises UserError for a special token inside a message
    (in an answer the chain's markers are allowed).
    """
    _check(tokenizer, messages, markers)
    return [i for ids, _ in _encoded(tokenizer, _prompt(tokenizer, messages)) for i in ids]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that is continued. It may spell out special tokens, also the first, as a rendered template
    does."""
    ids, first = tokenizer.encode(text), tokenizer.bos_ids
    return ids if first and ids[: len(first)] == first else [*first, *ids]


def _prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    segments = _segments(tokenizer, messages, generate=True)
    return segments or [(render(tokenizer, messages, add_generation_prompt=True), False)]


def _encoded(tokenizer: Tokenizer, segments: Sequence[tuple[str, bool]]) -> Iterator[tuple[list[int], bool]]:
    """The ids of each segment, the same as when the whole conversation is encoded at once."""
    before = ""
    for text, trained in segments:
        # Some special tokens (Phi's) absorb the white space after them.
        if any(before.endswith(token) for token in tokenizer.right_stripping_tokens):
            text = text.lstrip()
        # After a special token the tokenizer treats text as the beginning of a text.
        continuing = before != "" and not any(before.endswith(token) for token in tokenizer.special_tokens)
        yield tokenizer.encode(text, continuing=continuing), trained
        before = text or before


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], markers: Sequence[str] = MARKERS.in_order()
) -> list[Row]:
    """A conversation to train on: one row, or one for each trained answer if the template rewrites earlier turns.

    The mask is 1 on every token of every trained answer, including its end token, and 0 on everything else: system and
    user messages, headers, and what the template writes after an end token. The ids before each answer are those of
    `encode_prompt`, so training sees what generation will see. Raises UserError as `encode_prompt` does, if no answer
    is trained, and if answers cannot be located in the template's text.
    """
    if not any(map(is_trained, messages)):
        raise UserError("a conversation without an assistant message has nothing to train on: drop it")
    _check(tokenizer, messages, markers)
    whole = _segments(tokenizer, messages, generate=False)
    if whole is not None:
        return [_row(tokenizer, whole, [message for message in messages if is_trained(message)])]
    rows = []
    for number in _answers(messages):
        if is_trained(messages[number]):
            context = [(text, False) for text, _ in _prompt(tokenizer, messages[:number])]
            answer = _turn(tokenizer, messages, number).answer
            rows.append(_row(tokenizer, [*context, (answer, True)], [messages[number]]))
    return rows


def _row(tokenizer: Tokenizer, segments: Sequence[tuple[str, bool]], trained: Sequence[Message]) -> Row:
    ids: list[int] = []
    mask: list[int] = []
    for piece, counts in _encoded(tokenizer, segments):
        ids += piece
        mask += [int(counts)] * len(piece)
    return Row(ids, mask, sum(len(message["content"].encode()) for message in trained))


def fitting_rows(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    max_length: int,
    markers: Sequence[str] = MARKERS.in_order(),
) -> tuple[list[Row], int]:
    """The rows of a conversation, and how many of its turns were left out so that no row exceeds `max_length` tokens.

    Whole turns are left out, from the end: a turn is a user message with its answer, if there is one. There are no rows
    if not even the first turn fits, or if no turn that fits is trained. Raises UserError as `encode_conversation` does.
    """
    turns = sum(message["role"] == "user" for message in messages)
    rows = encode_conversation(tokenizer, messages, markers)
    answers = _answers(messages)
    if len(rows) > 1:
        kept_rows = [row for row in rows if len(row.ids) <= max_length]
        return kept_rows, len(rows) - len(kept_rows) + (messages[-1]["role"] == "user")
    for last in reversed(answers):
        kept = messages[: last + 1]
        if not any(map(is_trained, kept)):
            break
        if last + 1 < len(messages):
            rows = encode_conversation(tokenizer, kept, markers)
        if all(len(row.ids) <= max_length for row in rows):
            return rows, turns - sum(message["role"] == "user" for message in kept)
    return [], turns
