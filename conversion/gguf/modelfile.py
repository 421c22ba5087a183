"""An Ollama Modelfile for a GGUF file: the chat template in Go's syntax, the tokens that end an answer, sampling.

Ollama does not run the Jinja template in a GGUF file. Most chat templates only put fixed texts around the messages
(ChatML, Llama 2, Llama 3, Mistral, Zephyr). These texts are found by rendering conversations, and the Go template
is accepted if it would write the same for others. Source: Ollama's docs/modelfile.md and docs/template.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chat import Message, render
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer

# Texts that no template contains, and that a change of their letters or order changes.
_MARKS = tuple(f"{letter}ab{letter}" for letter in "\ue000\ue001\ue002\ue003\ue004")
# Ollama's own context, which a model with a shorter one must not be given.
_CONTEXT = 4096
# In Go's syntax: whether a message follows this one.
_MORE = "gt (len (slice $.Messages $i)) 1"


@dataclass(frozen=True)
class _Around:
    """The texts around messages. A user's message is followed by what begins an answer.

    begin: before a conversation without a system message. before_system, after_system: around one. after_user,
    after_answer: after each message of these roles. prompt_end: after the last one, the user's: mostly after_user, but
    LLaMA 2's answers begin with a space. Without before_system, the template takes no system message.
    """

    begin: str
    after_user: str
    after_answer: str
    prompt_end: str
    before_system: str | None = None
    after_system: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        first = messages[0]
        text = self.begin
        if first["role"] == "system":
            text = f"{self.before_system}{first['content']}{self.after_system}"
        for number, message in enumerate(messages, 1):
            if message["role"] == "assistant":
                text += message["content"] + self.after_answer
            elif message["role"] == "user":
                text += message["content"] + (self.after_user if number < len(messages) else self.prompt_end)
        return text


def modelfile(tokenizer: Tokenizer, gguf: str, context: int, *, chains: bool) -> tuple[str, str | None]:
    """A Modelfile for the file `gguf` beside it, and a line that says why it has no template; None if it has one.

    context: the model's longest text in tokens. chains: whether the model answers in chains, which sampling and
    penalties for repeating the question's words damage.
    """
    lines = [f"FROM ./{gguf}"]
    around, problem = _around(tokenizer)
    if around is not None:
        lines += ["", f'TEMPLATE """{_go(around)}"""', ""]
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in _ends(tokenizer)]
    if chains:
        lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    if context < _CONTEXT:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n", problem


def _ends(tokenizer: Tokenizer) -> list[str]:
    try:
        ends = end_ids(tokenizer)
    except UserError:  # neither a chat template nor an eos token
        return []
    return [token for number in ends if (token := tokenizer.token(number)) is not None]


def _around(tokenizer: Tokenizer) -> tuple[_Around | None, str | None]:
    """The texts around messages, or why there are none."""
    if tokenizer.chat_template is None:
        return None, "the Modelfile has no TEMPLATE: the tokenizer has no chat template"
    try:
        begin, after_user, after_answer, prompt_end = _split(tokenizer, ("user", "assistant", "user"))
    except (UserError, ValueError) as error:
        return None, f"the Modelfile has no TEMPLATE: the chat template is not text around messages ({error})"
    found = _Around(begin, after_user, after_answer, prompt_end)
    try:
        before, after, *_ = _split(tokenizer, ("system", "user"))
    except (UserError, ValueError):
        pass  # a template that refuses system messages, or drops them
    else:
        found = replace(found, before_system=before, after_system=after)
    tried = [_conversation(roles) for roles in (("user",), ("user", "assistant", "user", "assistant", "user"))]
    if found.before_system is not None:
        tried += [_conversation(("system", "user")), _conversation(("system", "user", "assistant", "user"))]
    if any(found.render(m) != render(tokenizer, m, add_generation_prompt=True) for m in tried):
        return None, (
            "the Modelfile has no TEMPLATE: the chat template does more than put text around messages, which Go's "
            "templates cannot express; with llama.cpp, which runs the Jinja template, it is complete"
        )
    return _without_bos(found, tokenizer), None


def _conversation(roles: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=False)]


def _split(tokenizer: Tokenizer, roles: Sequence[str]) -> list[str]:
    """What a template writes before, between and after the messages. Raises ValueError if one is not there once."""
    text = render(tokenizer, _conversation(roles), add_generation_prompt=True)
    parts = []
    for role, mark in zip(roles, _MARKS, strict=False):
        if text.count(mark) != 1:
            raise ValueError(f"the {role}'s message is there {text.count(mark)} times")
        part, _, text = text.partition(mark)
        parts.append(part)
    return [*parts, text]


def _without_bos(around: _Around, tokenizer: Tokenizer) -> _Around:
    """Without the BOS token, if llama.cpp writes one before every text."""
    bos = tokenizer.token(tokenizer.bos_ids[0]) if tokenizer.bos_ids else None
    if bos is None:
        return around
    before = None if around.before_system is None else around.before_system.removeprefix(bos)
    return replace(around, begin=around.begin.removeprefix(bos), before_system=before)


def _go(around: _Around) -> str:
    """The Go template. All texts are string literals, so that no white space depends on its layout."""
    begin = _literal(around.begin)
    if around.before_system is not None:
        system = f"{_literal(around.before_system)}{{{{ .System }}}}{_literal(around.after_system)}"
        begin = f"{{{{ if .System }}}}{system}{{{{ else }}}}{begin}{{{{ end }}}}"
    after_user = _literal(around.after_user)
    if around.prompt_end != around.after_user:
        after_user = f"{{{{ if {_MORE} }}}}{after_user}{{{{ else }}}}{_literal(around.prompt_end)}{{{{ end }}}}"
    # An answer that is the last message is one to go on with, so nothing follows it.
    return (
        f"{begin}\n"
        "{{- range $i, $_ := .Messages }}\n"
        f'{{{{- if eq .Role "user" }}}}{{{{ .Content }}}}{after_user}\n'
        '{{- else if eq .Role "assistant" }}{{ .Content }}'
        f"{{{{ if {_MORE} }}}}{_literal(around.after_answer)}{{{{ end }}}}\n"
        "{{- end }}\n"
        "{{- end }}"
    )


def _literal(text: str) -> str:
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""
