"""What clients send, in OpenAI's protocol: the body of a request, checked. Unknown fields are accepted.

What would change an answer and cannot be done here is refused, and not passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transllm_jax.disk import is_utf8
from transllm_jax.errors import UserError
from transllm_jax.generation.sampling import MOST_K, Sampling

# The most stop strings, and prompts of one request.
MOST_STOPS, MOST_PROMPTS = 16, 64
# What other servers do with an answer, and what it is where nothing is asked of them.
_OF_OTHERS: dict[str, Any] = {
    "stop_token_ids": [],
    "min_tokens": 0,
    "ignore_eos": False,
    "top_logprobs": 0,
    "prompt_logprobs": None,
    "use_beam_search": False,
    "length_penalty": 1,
    "guided_json": None,
    "guided_regex": None,
    "guided_choice": None,
    "guided_grammar": None,
    "structured_outputs": None,
    "modalities": ["text"],
    "audio": None,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "skip_special_tokens": True,
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ApiError(Exception):
    """A response with an error: its status, and the fields of the error as OpenAI writes them."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.code = code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake."""
    return ApiError(400, message, param=param, code=code)


@dataclass(frozen=True)
class Said:
    """A message of a conversation. role: system, user or assistant. reasoning: what a client sends back of an answer's
    way, besides the answer.
    """

    role: str
    content: str
    reasoning: str = ""


@dataclass(frozen=True)
class Asked:
    """A request for an answer. messages: of a conversation; or else prompts: texts or ids that the model continues.

    max_new_tokens: None for the server's own limit. truncates: the oldest turns may be dropped.
    """

    model: str | None
    messages: tuple[Said, ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    truncates: bool = False
    shows_reasoning: bool = True


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError."""
    try:
        body = json.loads(data)
        right = isinstance(body, dict) and is_utf8(json.dumps(body, ensure_ascii=False))
    except (ValueError, RecursionError):
        raise wrong("the body is not JSON; send a JSON object in UTF-8", code="invalid_json") from None
    if not right:
        raise wrong("the body is not a JSON object in UTF-8 (half a character counts as none)", code="invalid_json")
    return dict(body)


def read_chat(body: Mapping[str, Any], defaults: Sampling, seed: int) -> Asked:
    """A request to /v1/chat/completions. seed: where the client gives none. Raises ApiError."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages must be a list with at least one message", "messages")
    said = tuple(_message(message, f"messages[{number}]") for number, message in enumerate(messages))
    if said[-1].role == "assistant":
        raise wrong("the last message is an answer already; end with a message of the user", "messages")
    for name in ("tools", "functions"):
        if body.get(name):
            raise wrong(
                f"{name} are not supported: this model calls no functions; leave {name} out", name, "unsupported"
            )
    _refuse(body, "tool_choice", (None, "none", "auto"), "this model calls no functions")
    _refuse(body, "logprobs", (None, False), "log-probabilities are not given")
    form = body.get("response_format")
    if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        raise wrong("response_format must be text: answers are not constrained", "response_format", "unsupported")
    return Asked(messages=said, **_common(body, defaults, seed, ("max_completion_tokens", "max_tokens")))


def read_completion(body: Mapping[str, Any], defaults: Sampling, seed: int) -> Asked:
    """A request to /v1/completions. seed: where the client gives none. Raises ApiError."""
    prompts = _prompts(body.get("prompt"))
    _refuse(body, "echo", (None, False), "the prompt is not repeated, nor are its log-probabilities given")
    _refuse(body, "logprobs", (None, False), "log-probabilities are not given")
    _refuse(body, "suffix", (None, ""), "a text is continued at its end")
    _refuse(body, "best_of", (None, 1), "one answer is given")
    asked = Asked(prompts=prompts, **_common(body, defaults, seed, ("max_tokens", "max_completion_tokens")))
    if asked.stream and len(prompts) > 1:
        raise wrong("several prompts cannot be streamed; send one, or leave stream out", "prompt", "unsupported")
    return asked


def _common(body: Mapping[str, Any], defaults: Sampling, seed: int, limits: tuple[str, str]) -> dict[str, Any]:
    """The fields of both kinds of requests. limits: the names of the limit of tokens, the first one first."""
    _refuse(body, "n", (None, 1), "one answer is given; ask again for another")
    for name in ("presence_penalty", "frequency_penalty"):
        _refuse(body, name, (None, 0), "repetition_penalty is supported")
    _refuse(body, "logit_bias", (None, {}, []), "tokens cannot be weighted")
    for name, accepted in _OF_OTHERS.items():
        _refuse(body, name, (None, accepted), "this server does not do it")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise wrong("stream_options must be an object", "stream_options")
    limit = next((name for name in limits if body.get(name) is not None), None)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise wrong("model must be a text", "model")
    truncation = body.get("truncation")
    if truncation not in (None, "auto", "disabled"):
        raise wrong("truncation must be auto or disabled", "truncation")
    return {
        "model": model,
        "max_new_tokens": None if limit is None else _whole(body, limit, least=1),
        "sampling": _sampling(body, defaults, seed),
        "stop": _stop(body.get("stop")),
        "stream": _flag(body, "stream"),
        "usage": options is not None and _flag(options, "include_usage", "stream_options.include_usage"),
        "truncates": truncation == "auto",
        "shows_reasoning": body.get("include_reasoning") is not False,
    }


def _message(message: Any, where: str) -> Said:
    if not isinstance(message, dict):
        raise wrong(f"{where} must be an object with role and content", where)
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise wrong(f"{where} belongs to a call of a function, which this model does not do", where, "unsupported")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{where}.role must be one of {', '.join(ROLES)}", f"{where}.role")
    content = _content(message.get("content"), f"{where}.content", empty=role == "assistant")
    if role != "assistant":
        return Said(ROLES[role], content)
    given = next(
        (text for name in ("reasoning_content", "reasoning") if isinstance(text := message.get(name), str)), ""
    )
    thought = _THOUGHT.match(content)
    if thought is not None:
        content, given = content[thought.end() :], given or thought.group(1)
    return Said("assistant", content.strip(), given.strip())


# An answer with its way before it, as `--reasoning think` writes it.
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def _content(content: Any, where: str, *, empty: bool) -> str:
    """The text of a message: a text, or parts with texts."""
    if content is None and empty:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(f"{where} must be a text, or a list of parts of type text", where)
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type") not in ("text", "input_text", "output_text"):
            raise wrong(
                f"{where}[{number}] is no text; this model reads text alone", f"{where}[{number}]", "unsupported"
            )
        texts.append(text)
    return "\n".join(texts)


def _prompts(prompt: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if all(_is_whole(token) for token in prompt):
            return (tuple(prompt),)
        if len(prompt) <= MOST_PROMPTS and all(isinstance(one, str) for one in prompt):
            return tuple(prompt)
        if len(prompt) <= MOST_PROMPTS and all(
            isinstance(one, list) and one and all(map(_is_whole, one)) for one in prompt
        ):
            return tuple(map(tuple, prompt))
    raise wrong(f"prompt must be a text, a list of token ids, or a list of up to {MOST_PROMPTS} of either", "prompt")


def _stop(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or len(strings) > MOST_STOPS or not all(isinstance(one, str) for one in strings):
        raise wrong(f"stop must be a text or a list of up to {MOST_STOPS} texts", "stop")
    if not all(strings):
        raise wrong("a stop string is empty", "stop")
    return tuple(strings)


def _sampling(body: Mapping[str, Any], defaults: Sampling, seed: int) -> Sampling:
    temperature = _number(body, "temperature", defaults.temperature, 0, 2)
    top_p = _number(body, "top_p", defaults.top_p, 0, 1)
    min_p = _number(body, "min_p", defaults.min_p, 0, 1)
    penalty = _number(body, "repetition_penalty", defaults.repetition_penalty, 0.01, 100)
    top_k = _whole(body, "top_k", least=-1) if body.get("top_k") is not None else defaults.top_k
    given = _whole(body, "seed") if body.get("seed") is not None else seed
    try:
        # Some clients write -1 for all. A nucleus of 0 is the likeliest token; in float32 less than this would be none.
        return Sampling(temperature, max(top_p, 1e-6), given % 2**64, min(max(top_k, 0), MOST_K), min_p, penalty)
    except UserError as error:
        raise wrong(str(error)) from None


def _refuse(body: Mapping[str, Any], name: str, accepted: tuple[Any, ...], reason: str) -> None:
    value = body.get(name)
    # For Python, 0 is False.
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
        raise wrong(f"{name} is not supported: {reason}; leave it out", name, "unsupported")


def _flag(body: Mapping[str, Any], name: str, where: str | None = None) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(f"{where or name} must be true or false", where or name)
    return bool(value)


def _number(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise wrong(f"{name} must be a number from {least} to {most}", name)
    return float(value)


def _whole(body: Mapping[str, Any], name: str, least: int | None = None) -> int:
    value: Any = body.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not _is_whole(value) or (least is not None and value < least):
        raise wrong(f"{name} must be a whole number{'' if least is None else f', at least {least}'}", name)
    return int(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
