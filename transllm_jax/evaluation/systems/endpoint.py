"""Any server with OpenAI's chat completions API."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from transllm_jax.config import Endpoint
from transllm_jax.evaluation.systems.rounds import Talk, converse, plain_memory
from transllm_jax.evaluation.systems.system import Asked, Turn
from transllm_jax.generation.answer import answer_of
from transllm_jax.generation.endpoint import Client, Reply, Request, request_body
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.chat import Message

# Reasoning that a server leaves in the answer; without an end, the answer was cut off before it began.
_THOUGHT = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)", re.DOTALL)


class EndpointSystem:
    """Answers of a server.

    A conversation's history is what was visible: what a server makes of it is its own. markers: of the chains that a
    server may write as plain text (`skip_special_tokens: false`); they are read as chains then.
    """

    def __init__(self, name: str, settings: Endpoint, say: Callable[[str], None], markers: Markers | None = None):
        """Raises UserError if a library of the extra `endpoint`, or the key, is missing."""
        self.name, self.settings, self._markers = name, settings, markers or Markers()
        self._client = Client(settings, "endpoint", say)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The server's URL, the model's name there, and what each request carries."""
        settings = self.settings
        return {"kind": "endpoint", "url": settings.endpoint, "model": settings.model, "body": settings.body}

    def answers(
        self, asked: Sequence[Asked], between: Callable[[], None] = lambda: None, *, at_once: int | None = None
    ) -> Iterator[tuple[Asked, list[Turn]]]:
        """As `System.answers`. A request that the server refuses (400, 413, 422) is a turn with an error."""
        yield from converse(asked, partial(self._round, between=between), window=4 * self.settings.concurrency)

    def _round(
        self, talks: Sequence[Talk], between: Callable[[], None]
    ) -> Iterator[tuple[Talk, Turn, Sequence[Message]]]:
        requests = [Request(str(number), self._body(talk)) for number, talk in enumerate(talks)]
        for reply in self._client.replies(requests):
            between()
            if reply is not None:
                talk = talks[int(reply.id)]
                turn = self._turn(talk, reply)
                yield talk, turn, plain_memory(talk, turn.visible)

    def _body(self, talk: Talk) -> dict[str, Any]:
        asked, settings = talk.asked, self.settings
        sampling = asked.sampling
        if talk.turns:
            sampling = sampling.for_row(len(talk.turns))
        # Servers differ in how large a seed may be; 31 bits all take.
        body = request_body(settings, talk.messages, asked.max_new_tokens, sampling.seed & 0x7FFFFFFF)
        if sampling.temperature and "temperature" not in settings.body:
            body["temperature"] = sampling.temperature
        if sampling.top_p != 1 and "top_p" not in settings.body:
            body["top_p"] = sampling.top_p
        return body

    def _turn(self, talk: Talk, reply: Reply) -> Turn:
        if reply.error is not None:
            return talk.failed(reply.error)
        visible = _THOUGHT.sub("", reply.text).strip()
        raw = reply.text if reply.reasoning is None else f"<think>{reply.reasoning}</think>{reply.text}"
        cut_off = not reply.finished
        chain, how = None, None
        if any(marker in visible for marker in self._markers.in_order()):
            answer = answer_of(visible, self._markers, cut_off=cut_off)
            visible, how = answer.visible, answer.how
            if (found := answer.chain) is not None:
                chain = {"question_en": found.question_en, "answer_en": found.answer_en, "answer": found.answer_target}
        return Turn(talk.messages, raw, visible, chain, how, cut_off)
