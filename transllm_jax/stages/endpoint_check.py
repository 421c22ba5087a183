"""Whether another engine serves the model that the run has: both answer a few instructions, greedily.

The numbers of prompt tokens have to be the same: they differ with a doubled BOS token, another chat template, another
default system prompt or another tokenizer. The first tokens of most answers have to be the same, as text: rounding
makes a few differ, other weights make most differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from transllm_jax.config import Endpoint
from transllm_jax.disk import read_json, write_json
from transllm_jax.errors import UserError
from transllm_jax.generation.endpoint import Client, Reply
from transllm_jax.generation.engine import Engine
from transllm_jax.stages.endpoint import requests_of
from transllm_jax.stages.run import Run
from transllm_jax.tokenizer.chat import Message, encode_prompt
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer

# How many instructions both engines answer; how many tokens of the answers are compared; and the share of the answers
# that have to begin alike. Measured with SmolLM2-135M: see docs/endpoints.md.
PROMPTS, FIRST, SHARE = 20, 8, 0.8
# In the directory of a stage: what the check found.
CHECK = "check.json"


class Ours(NamedTuple):
    """What the run's own engine makes of an instruction. text: of the first tokens. ended: the answer has no more."""

    instruction: str
    prompt: list[int]
    text: str
    ended: bool


def check_teacher(
    run: Run, directory: Path, instructions: Sequence[str], settings: Endpoint, where: str, replies: Sequence[Reply]
) -> None:
    """Compare the run's original model with the engine of an endpoint, on instructions taken evenly.

    replies: those to all instructions, from batch files; empty for a server, which is asked for first tokens now.
    A check that found no difference is not made again. Raises UserError that says what differs, and why it may.
    """
    path, what = directory / CHECK, {"endpoint": settings.place, "model": settings.model}
    known = run.peers.run_on_primary("the check", lambda: path.is_file() and read_json(path).items() >= what.items())
    if known:
        return
    chosen = _evenly(len(instructions))
    ours = _first_tokens(run, [instructions[number] for number in chosen])

    def compare() -> str:
        theirs = [replies[number] for number in chosen] if replies else _ask(run, ours, settings, where)
        alike = compared(ours, theirs, run.models.tokenizer("base"), where, settings.place)
        write_json(path, {**what, **alike})
        return (
            f"  recover: {settings.place} has the numbers of prompt tokens that this model has for "
            f"{alike['prompts']} instructions, and {alike['same_first_tokens']} of {alike['prompts']} answers begin "
            "as this model's do"
        )

    line = run.peers.run_on_primary("the check of the endpoint", compare)
    run.progress.say(str(line))
    if run.models.tokenizer("base").writes_date:
        run.progress.say(
            f"  recover: this model's chat template writes the date, here {run.today}; {settings.place} writes its "
            f"own, unless {where}.body gives it one (chat_template_kwargs)",
            style="yellow",
        )


def _evenly(size: int) -> list[int]:
    """At most `PROMPTS` of the numbers below `size`, at equal distances."""
    count = min(PROMPTS, size)
    return [number * size // count for number in range(count)]


def _first_tokens(run: Run, instructions: Sequence[str]) -> list[Ours]:
    """What the original model answers first, by the run's own engine."""
    tokenizer, section = run.models.tokenizer("base"), run.config.recover
    prompts = [encode_prompt(tokenizer, _conversation(text)) for text in instructions]
    first = min(FIRST, section.max_new_tokens)
    engine = Engine(run.models.split("base"), run.models.config, batch_size=section.batch_size)
    answers = engine.generate(prompts, max_new_tokens=first, stop=end_ids(tokenizer))
    return [
        # A character whose bytes go on in the next token is left out.
        Ours(text, prompt, tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd").strip(), len(ids) < first)
        for text, prompt, ids in zip(instructions, prompts, answers, strict=True)
    ]


def _conversation(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _ask(run: Run, ours: Sequence[Ours], settings: Endpoint, where: str) -> list[Reply]:
    """A server's first tokens, in order."""
    first = min(FIRST, run.config.recover.max_new_tokens)
    requests = requests_of(settings, "check", [one.instruction for one in ours], first, run.config.seed)
    client = Client(settings, where, lambda line: run.progress.say(line, style="yellow"))
    found: dict[str, Reply] = {}
    with closing(client.replies(requests)) as coming:
        for reply in coming:
            run.interrupt.check("recover: the check of the endpoint")
            if reply is not None:
                found[reply.id] = reply
    return [found[request.id] for request in requests]


def compared(
    ours: Sequence[Ours], theirs: Sequence[Reply], tokenizer: Tokenizer, where: str, place: str
) -> dict[str, Any]:
    """How many instructions were compared, and how many answers begin alike. Raises UserError for a difference."""
    on_purpose = f"if it is another model on purpose, set {where}.check to false"
    pairs = [(one, reply) for one, reply in zip(ours, theirs, strict=True) if reply.error is None]
    if not pairs:
        raise UserError(f"{where}: {place} answered none of {len(theirs)} instructions; the first: {theirs[0].error}")
    if any(reply.prompt_tokens is None for _, reply in pairs):
        raise UserError(
            f"{where}: {place} does not say how many tokens a prompt has (usage.prompt_tokens), so its chat template "
            f"cannot be compared with this model's; switch that on there, or set {where}.check to false"
        )
    other = [(one, reply) for one, reply in pairs if reply.prompt_tokens != len(one.prompt)]
    if other:
        one, reply = other[0]
        more = [(reply.prompt_tokens or 0) - len(one.prompt) for one, reply in other]
        raise UserError(
            f"{where}: {place} counts {reply.prompt_tokens} prompt tokens and this model {len(one.prompt)} for "
            f"{one.instruction[:60]!r} ({len(other)} of {len(pairs)} instructions differ, by {_span(more)}): "
            f"{_cause(tokenizer, [one for one, _ in other], more, len(other) == len(pairs), where)}; correct that, or, "
            f"{on_purpose}"
        )
    unlike = [(one, reply) for one, reply in pairs if not _begins_alike(one, reply)]
    alike = len(pairs) - len(unlike)
    least = math.ceil(len(pairs) * SHARE)
    if alike < least:
        one, reply = unlike[0]
        date = f", or its template writes another date than {tokenizer.today}" if tokenizer.writes_date else ""
        raise UserError(
            f"{where}: only {alike} of {len(pairs)} answers of {place} begin with this model's first {FIRST} tokens, "
            f"and {least} should; to {one.instruction[:60]!r} it answers {reply.text[:60]!r}, and this model "
            f"{one.text!r}: most likely it has other weights or a coarse quantisation, or it does not answer greedily "
            "(it may take a repetition penalty from generation_config.json: start vLLM with --generation-config vllm)"
            f"{date}; correct that, or, {on_purpose}"
        )
    return {"prompts": len(pairs), "same_first_tokens": alike}


def _begins_alike(one: Ours, reply: Reply) -> bool:
    text = reply.text.rstrip("\ufffd").strip()
    return text == one.text if one.ended else text.startswith(one.text)


def _span(more: Sequence[int]) -> str:
    low, high = min(more), max(more)
    return f"{low:+}" if low == high else f"{low:+} to {high:+}"


def _cause(tokenizer: Tokenizer, ours: Sequence[Ours], more: Sequence[int], all_differ: bool, where: str) -> str:
    """The likely cause of other numbers of prompt tokens. more: by how many each of `ours` differs."""
    if len(set(more)) > 1 or not all_differ:
        return "most likely it has another tokenizer, so it is another model or another version of this one"
    begins = {tokenizer.token(one.prompt[0]) for one in ours} == {tokenizer.role("bos_token")}
    if more[0] == 1 and begins:
        return "most likely it writes a second BOS token before the one of the chat template"
    if more[0] == -1 and begins:
        return "most likely it leaves out the BOS token of the chat template"
    if more[0] == _thinking(tokenizer, ours[0]):
        return f"it leaves thinking on: set {where}.body to {{chat_template_kwargs: {{enable_thinking: false}}}}"
    return "most likely it has another chat template or another default system prompt"


def _thinking(tokenizer: Tokenizer, one: Ours) -> int | None:
    """How many more tokens a prompt has if the chat template leaves thinking on; None if it knows no such thing."""
    template = tokenizer.chat_template or ""
    if "enable_thinking" not in template:
        return None
    on = tokenizer.derived(chat_template="{%- set enable_thinking = true %}\n" + template)
    return len(encode_prompt(on, _conversation(one.instruction))) - len(one.prompt)
