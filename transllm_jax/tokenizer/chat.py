"""Conversations as token ids, by the model's own chat template: one way for training, generation and export.

The template is rendered as transformers renders it (a test compares them). Which part is the assistant's is
found by rendering prefixes of the conversation, so any template works that only ever appends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn, NotRequired, TypedDict

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chain import MARKERS
from transllm_jax.tokenizer.tokenizer import ROLES, Tokenizer


class Message(TypedDict):
    """One message of a conversation; `role` is `system`, `user` or `assistant`.

    train: False makes an answer context alone; every other answer is trained on.
    """

    role: str
    content: str
    train: NotRequired[bool]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: some templates mark the assistant's part with it; it renders its body."""

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
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def render(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The conversation as text by the model's chat template, as `apply_chat_template(tokenize=False)`
    does it.

    Raises UserError where there is no template, or where the template refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.source} has no chat template: take a chat model, or add chat_template.jinja")
    roles = {name: token for name in ROLES if (token := tokenizer.role(name)) is not None}
    try:
        return _compile(tokenizer.chat_template).render(
            messages=[dict(m) for m in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **roles,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template of {tokenizer.source} refuses the conversation: {error}") from error


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


def _segments(
    tokenizer: Tokenizer, messages: Sequence[Message], markers: Sequence[str], generate: bool
) -> list[tuple[str, bool]]:
    """The rendered conversation cut into (text, is an answer with its end token), in order."""
    _check(tokenizer, messages, markers)
    segments: list[tuple[str, bool]] = []
    done = ""  # the part of the rendered text that `segments` holds already
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:i], add_generation_prompt=True) if i else ""
        whole = render(tokenizer, messages[: i + 1])
        if not whole.startswith(prompt) or not prompt.startswith(done):
            raise _not_appending(tokenizer, i)
        answer = whole[len(prompt) :]
        content = message["content"].strip()
        start = answer.find(content)
        tail = answer[start + len(content) :]
        end = tokenizer.find_special(tail)
        problem = None
        if start < 0:
            problem = "changes the answer's text"
        elif answer[:start].strip():
            problem = f"puts {answer[:start].strip()!r} between the generation prompt and an answer"
        elif end is None:
            problem = "ends an answer without a special token"
        if problem or end is None:
            raise UserError(f"the chat template of {tokenizer.source} {problem}: use a template that does not")
        stop = len(answer) - len(tail) + tail.index(end) + len(end)
        segments += [(prompt[len(done) :], False), (answer[:stop], True)]
        done = prompt + answer[:stop]
    last = render(tokenizer, messages, add_generation_prompt=generate)
    if not last.startswith(done):
        raise _not_appending(tokenizer, len(messages) - 1)
    return [*segments, (last[len(done) :], False)]


def _not_appending(tokenizer: Tokenizer, position: int) -> UserError:
    return UserError(
        f"the chat template of {tokenizer.source} rewrites what stands before message {position} once that "
        f"is there, so training and generation would see different texts: use a template that only appends"
    )


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], markers: Sequence[str] = MARKERS.in_order()
) -> list[int]:
    """The ids that generation starts from: the conversation so far and the header of the next answer.

    Earlier answers have exactly the ids that `encode_conversation` gives them. Raises UserError for a special
    token inside a message (in an answer, the chain's markers are allowed).
    """
    segments = _segments(tokenizer, messages, markers, generate=True)
    return [i for ids, _ in _encoded(tokenizer, segments) for i in ids]


def _encoded(tokenizer: Tokenizer, segments: Sequence[tuple[str, bool]]) -> Iterator[tuple[list[int], bool]]:
    """The segments' ids, each as it stands behind the one before it."""
    before = ""
    for text, is_answer in segments:
        # Behind a special token a text begins anew, as it does where the whole is encoded at once.
        continuing = before != "" and not any(before.endswith(token) for token in tokenizer.special_tokens)
        yield tokenizer.encode(text, continuing=continuing), is_answer
        before = text or before


def is_trained(message: Message) -> bool:
    """Whether a message is an answer that is trained on."""
    return message["role"] == "assistant" and message.get("train", True)


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], markers: Sequence[str] = MARKERS.in_order()
) -> tuple[list[int], list[int]]:
    """A conversation to train on: (ids, mask), of equal lengths.

    The mask is 1 on every token of every answer, its end token included, and 0 on everything else: system and
    user messages, headers, what the template puts after an end token, answers with `train` False. Each answer's ids
    follow the ids that `encode_prompt` gives for what precedes it, so training sees what generation will see.
    Raises UserError as `encode_prompt` does, and where there is no answer to train on.
    """
    if not any(map(is_trained, messages)):
        raise UserError("a conversation without an assistant message has nothing to train on: drop it")
    trained = [is_trained(m) for m in messages if m["role"] == "assistant"]
    answers = iter(trained)
    ids: list[int] = []
    mask: list[int] = []
    for piece, is_answer in _encoded(tokenizer, _segments(tokenizer, messages, markers, generate=False)):
        ids += piece
        mask += [int(is_answer and next(answers))] * len(piece)
    return ids, mask


def cut_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    max_length: int,
    markers: Sequence[str] = MARKERS.in_order(),
) -> tuple[list[Message] | None, int]:
    """Makes a conversation fit into `max_length` tokens by dropping whole turns from its end.

    Returns (messages that fit, turns cut); a turn is a user message with its answer. (None, all turns) where
    not even the first turn fits, or no answer that fits is trained on. A user message left without an answer at the
    end is dropped with its turn.
    """
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    turns = sum(m["role"] == "user" for m in messages)
    for last in reversed(answers):
        kept = list(messages[: last + 1])
        if not any(map(is_trained, kept)):
            break
        if len(encode_conversation(tokenizer, kept, markers)[0]) <= max_length:
            return kept, turns - sum(m["role"] == "user" for m in kept)
    return None, turns
