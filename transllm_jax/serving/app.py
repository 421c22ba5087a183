"""The server: what is at which address, and how many requests it answers at once."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from transllm_jax.errors import UserError
from transllm_jax.generation.chain import ask_original, remembered
from transllm_jax.generation.sampling import GREEDY, Sampling
from transllm_jax.serving.access import MIB, Access
from transllm_jax.serving.guard import Guard
from transllm_jax.serving.history import English, Find, Memory, Source, Turn, as_said, keys_of, seen_by_model
from transllm_jax.serving.metrics import Metrics
from transllm_jax.serving.page import page
from transllm_jax.serving.protocol import ApiError, Asked, Said, read_body, read_chat, read_completion, wrong
from transllm_jax.serving.responses import Envelope, Fields, Reasoning, message_of, model_object, usage_of
from transllm_jax.serving.served import EngineFailed, Reply, Served
from transllm_jax.serving.stream import KEEP_ALIVE, EventStream, event, to_json, unless_gone
from transllm_jax.tokenizer.chat import Message, encode_prompt, encode_text


@dataclass(frozen=True)
class Settings:
    """How the server answers.

    max_new_tokens: where a client gives no limit. queue: how many requests may wait for each model. key: what clients
    have to send; None if anybody may ask. origins: of other pages that may ask from a browser. most_bytes: of a body.
    reasoning_tokens: on top of a client's limit, for the English steps of a chain. local: whether the address is one
    that this machine alone reaches.
    """

    max_new_tokens: int = 512
    sampling: Sampling = GREEDY
    reasoning: Reasoning = "both"
    queue: int = 64
    key: str | None = None
    origins: tuple[str, ...] = ()
    most_bytes: int = 4 * MIB
    reasoning_tokens: int = 0
    local: bool = False


class Place:
    """A request's place among those that a model works on, or that wait for it. Raises ApiError if there is none."""

    def __init__(self, model: Served, count: int, queue: int, wait: int) -> None:
        if model.requests and model.requests + count > model.lane.size + queue:
            raise ApiError(
                429,
                f"{model.requests} requests are being answered or wait; ask again in {wait} s",
                code="queue_full",
                kind="rate_limit_error",
                headers={"Retry-After": str(wait)},
            )
        self._model, self._count = model, count
        model.requests += count

    def leave(self) -> None:
        """Give it back; a second time changes nothing."""
        self._model.requests -= self._count
        self._count = 0


class Server:
    """Answers over HTTP with one model or more; the first is the one that is asked if a client names none."""

    def __init__(self, models: Sequence[Served], settings: Settings) -> None:
        self._models = {model.name: model for model in models}
        self._first, self._settings = models[0], settings
        self._access = Access(settings.key, settings.origins, settings.local, settings.most_bytes)
        self._memory = Memory()
        self._metrics = Metrics()
        self._created = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        middleware = [Middleware(Guard, metrics=self._metrics, paths=frozenset(route.path for route in routes))]
        if self._settings.origins:
            allowed: Any = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"], "expose_headers": ["Retry-After"]}
            middleware.insert(0, Middleware(CORSMiddleware, allow_origins=self._settings.origins, **allowed))
        handlers: Any = {ApiError: _api_error, HTTPException: _http_error, EngineFailed: _engine_failed}
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    # --- what is not generated ----------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        found = page()
        return Response(found.html, headers=found.headers)

    async def _health(self, request: Request) -> Response:
        alive = self._first.thread.alive
        return _json({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    async def _show_metrics(self, request: Request) -> Response:
        gauges: list[tuple[str, str, dict[str, str], float]] = []
        for name, meaning, value in (
            ("transllm_slots", "Answers that a model can generate at once.", lambda lane: lane.size),
            ("transllm_running", "Requests that are read or answered.", lambda lane: lane.running),
            ("transllm_waiting", "Requests that wait for a slot.", lambda lane: lane.waiting),
        ):
            gauges += [(name, meaning, {"model": model.name}, value(model.lane)) for model in self._models.values()]
        gauges.append(("transllm_remembered_turns", "Turns whose English is kept.", {}, len(self._memory)))
        gauges.append(("transllm_engine_failures", "Defects of the engine.", {}, self._first.thread.failures))
        return PlainTextResponse(self._metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def _list_models(self, request: Request) -> Response:
        self._access.authorise(request)
        return _json({"object": "list", "data": [model_object(one, self._created) for one in self._models.values()]})

    async def _show_model(self, request: Request) -> Response:
        self._access.authorise(request)
        return _json(model_object(self._model(request.path_params["name"]), self._created))

    # --- chat ---------------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        body = read_body(await self._access.body(request))
        asked = read_chat(body, self._settings.sampling, secrets.randbits(64))
        model = self._model(asked.model)
        request.scope["transllm"] = model.name
        place, began = self._place(model), time.monotonic()
        asking = asyncio.ensure_future(self._begun(model, asked))
        try:
            # A translation of earlier turns may take long. What is wrong before that is a status, and later an event.
            await unless_gone(request, asyncio.wait({asking}, timeout=KEEP_ALIVE if asked.stream else None))
            if asked.stream:
                if asking.done():
                    asking.result()
                return EventStream(self._events(asking, asked, began), on_end=place.leave)
            whole = await unless_gone(request, self._whole(*asking.result(), asked))
        except BaseException:
            asking.cancel()
            place.leave()
            raise
        place.leave()
        return _json(whole)

    async def _begun(self, model: Served, asked: Asked) -> tuple[Reply, dict[str, Any]]:
        """The reply to a conversation, of which nothing is generated yet, and more for its usage."""
        prompt, messages, sources, dropped = await self._conversation(model, asked)
        room = self._room(model, asked, len(prompt), "messages")
        ask = None if model.english_by is None else ask_original(model.english_by.tokenizer, messages)
        reply = Reply(model, prompt, room, asked.sampling, asked.stop, ask_original=ask)
        return reply, {"history": sources if model.markers is not None else None, "dropped_turns": dropped}

    async def _whole(self, reply: Reply, usage: dict[str, Any], asked: Asked) -> dict[str, Any]:
        fields, found = Fields(self._shown(asked)), []
        async with aclosing(reply.deltas()) as parts:
            async for deltas in parts:
                found += fields.of(deltas)
        found += fields.of([], last=True)
        self._done(reply, asked)
        choice = {"index": 0, "message": message_of(found), "logprobs": None, "finish_reason": reply.finish_reason}
        return Envelope(reply.model.name, "chat.completion").whole([choice], usage_of([reply.prompt], [reply], **usage))

    async def _events(
        self, asking: asyncio.Future[tuple[Reply, dict[str, Any]]], asked: Asked, began: float
    ) -> AsyncGenerator[bytes]:
        """The events of a stream. asking: becomes the reply, when earlier turns are translated."""
        try:
            reply, usage = await asking
        except (ApiError, EngineFailed) as error:
            yield event(error.body if isinstance(error, ApiError) else _failure().body)
            yield event("[DONE]")
            return
        envelope, fields = Envelope(reply.model.name, "chat.completion"), Fields(self._shown(asked))

        def chunk(delta: dict[str, str], reason: str | None = None) -> bytes:
            choice = {"delta": delta, "logprobs": None, "finish_reason": reason}
            return event(envelope.chunk(choice, None, told=asked.usage))

        yield chunk({"role": "assistant", "content": ""})
        waiting = True
        try:
            async with aclosing(reply.deltas()) as parts:
                async for deltas in parts:
                    if waiting:
                        self._observe("transllm_first_token_seconds", "From asking to the first token.", began, reply)
                        waiting = False
                    for delta in fields.of(deltas):
                        yield chunk(delta)
            for delta in fields.of([], last=True):
                yield chunk(delta)
            self._done(reply, asked)
            yield chunk({}, reply.finish_reason)
            if asked.usage:
                yield event(envelope.chunk(None, usage_of([reply.prompt], [reply], **usage), told=True))
        except EngineFailed:
            yield event(_failure().body)
        yield event("[DONE]")

    async def _conversation(self, model: Served, asked: Asked) -> tuple[list[int], list[Message], list[Source], int]:
        """A conversation as ids, and as the messages that the model sees; where each earlier turn's English is from;
        and how many turns were dropped."""
        letters = sum(len(message.content) + len(message.reasoning) for message in asked.messages)
        self._refuse_long(model, letters, "messages")
        if (count := len(asked.messages)) * model.least > model.longest:
            raise _too_long(model, f"{count} messages take at least {count * model.least}", "messages")
        tokenizer, markers = model.tokenizer, model.markers
        for number, message in enumerate(asked.messages):
            if message.role != "assistant" and (found := tokenizer.find_special(message.content)):
                where = f"messages[{number}].content"
                raise wrong(f"{where} contains the special token {found}; write it in another way", where)
        find: Find = partial(as_said, asked.messages)
        if markers is not None:
            find = English(model.name, asked.messages, self._memory, model.to_english)
        messages, sources = await seen_by_model(asked.messages, find, tokenizer)
        for source in sources if markers is not None else ():
            self._metrics.count("transllm_history_turns_total", "Earlier turns, by their English.", source=source)
        marks = () if markers is None else markers.in_order()

        def encoded(messages: Sequence[Message]) -> list[int]:
            try:
                return encode_prompt(tokenizer, messages, marks)
            except UserError as error:
                raise wrong(str(error), "messages") from None

        # In another thread, because a long text takes long.
        prompt, dropped = await asyncio.to_thread(encoded, messages), 0
        least = asked.max_new_tokens or min(self._settings.max_new_tokens, model.longest // 4)
        while asked.truncates and len(prompt) + least > model.longest:
            turns = [place for place, message in enumerate(messages) if message["role"] == "user"]
            if len(turns) < 2:
                break
            del messages[turns[0] : turns[1]]
            dropped += 1
            prompt = await asyncio.to_thread(encoded, messages)
        return prompt, messages, sources, dropped

    def _done(self, reply: Reply, asked: Asked) -> None:
        """Count an answer, and remember its turn in English."""
        self._count(reply)
        model, whole = reply.model, reply.whole
        if model.markers is None or whole is None:
            return
        self._metrics.count("transllm_answers_total", "Answers, by how they were obtained.", how=whole.how)
        said = (*asked.messages, Said("assistant", reply.content.strip()))
        turn = remembered(asked.messages[-1].content, whole, model.tokenizer)
        if turn and reply.content.strip():
            *_, keys = keys_of(model.name, said)
            self._memory.keep(keys, Turn(*(message["content"] for message in turn)))

    # --- texts that are continued -------------------------------------------------------------------------------------

    async def _complete(self, request: Request) -> Response:
        body = read_body(await self._access.body(request))
        asked = read_completion(body, self._settings.sampling, secrets.randbits(64))
        model = self._model(asked.model)
        request.scope["transllm"] = model.name
        prompts = [await asyncio.to_thread(self._ids, model, prompt) for prompt in asked.prompts]
        replies = [
            Reply(
                model,
                ids,
                self._room(model, asked, len(ids), "prompt"),
                # The first one as it is asked for alone; equal prompts are samples, so they differ.
                asked.sampling.for_row(number) if number else asked.sampling,
                asked.stop,
                raw=True,
            )
            for number, ids in enumerate(prompts)
        ]
        place = self._place(model, len(replies))
        try:
            if asked.stream:
                events = self._text_events(replies[0], asked, time.monotonic())
                return EventStream(events, on_end=place.leave)
            whole = await unless_gone(request, self._texts(replies))
        except BaseException:
            place.leave()
            raise
        place.leave()
        return _json(whole)

    async def _texts(self, replies: Sequence[Reply]) -> dict[str, Any]:
        async def finish(reply: Reply) -> None:
            async with aclosing(reply.deltas()) as parts:
                async for _ in parts:
                    pass
            self._count(reply)

        tasks = [asyncio.ensure_future(finish(reply)) for reply in replies]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        choices = [
            {"index": number, "text": reply.content, "logprobs": None, "finish_reason": reply.finish_reason}
            for number, reply in enumerate(replies)
        ]
        usage = usage_of([reply.prompt for reply in replies], replies)
        return Envelope(replies[0].model.name, "text_completion").whole(choices, usage)

    async def _text_events(self, reply: Reply, asked: Asked, began: float) -> AsyncGenerator[bytes]:
        envelope = Envelope(reply.model.name, "text_completion")

        def chunk(text: str, reason: str | None = None) -> bytes:
            choice = {"text": text, "logprobs": None, "finish_reason": reason}
            return event(envelope.chunk(choice, None, told=asked.usage))

        try:
            async with aclosing(reply.deltas()) as parts:
                async for deltas in parts:
                    for delta in deltas:
                        yield chunk(delta.text)
            self._count(reply)
            yield chunk("", reply.finish_reason)
            if asked.usage:
                yield event(envelope.chunk(None, usage_of([reply.prompt], [reply]), told=True))
        except EngineFailed:
            yield event(_failure().body)
        yield event("[DONE]")

    def _ids(self, model: Served, prompt: str | tuple[int, ...]) -> list[int]:
        """The ids of a text that is to be continued. It may spell out special tokens, as a rendered template does."""
        if isinstance(prompt, str):
            self._refuse_long(model, len(prompt), "prompt")
            ids = encode_text(model.tokenizer, prompt)
        else:
            ids = list(prompt)
            # The original model's own tokens are fewer.
            if any(not 0 <= token < model.tokenizer.vocab_size for token in ids):
                raise wrong(f"prompt has ids outside of 0 to {model.tokenizer.vocab_size - 1}", "prompt")
        if not ids:
            raise wrong("the prompt is empty; give at least one token", "prompt")
        return ids

    # --- what both have in common -------------------------------------------------------------------------------------

    def _model(self, name: str | None) -> Served:
        if name is not None and name not in self._models:
            known = " and ".join(self._models)
            raise ApiError(
                404, f"there is no model of this name; there are {known}", code="model_not_found", param="model"
            )
        return self._first if name is None else self._models[name]

    def _place(self, model: Served, count: int = 1) -> Place:
        seconds = self._metrics.mean("transllm_request_seconds") or 1.0
        wait = math.ceil(seconds * max(model.lane.waiting, 1) / model.lane.size)
        return Place(model, count, self._settings.queue, min(max(wait, 1), 60))

    def _room(self, model: Served, asked: Asked, size: int, param: str) -> int:
        """How many tokens the answer to a prompt of `size` may have. Raises ApiError if it has no room."""
        left = model.longest - size
        wanted = asked.max_new_tokens or max(min(left, self._settings.max_new_tokens), 1)
        if wanted > left:
            way = f"ask for at most {left} new ones, or shorten the prompt" if left > 0 else "shorten the prompt"
            raise _too_long(model, f"the prompt has {size} tokens, and {wanted} new ones are asked for; {way}", param)
        limits_a_chain = asked.max_new_tokens is not None and asked.messages and model.markers is not None
        return min(wanted + self._settings.reasoning_tokens, left) if limits_a_chain else wanted

    def _refuse_long(self, model: Served, letters: int, param: str) -> None:
        """Refuse a text that is too long by far, before it takes time."""
        if letters > 100 * model.longest:
            raise _too_long(model, f"a text of {letters} characters is far longer than that", param)

    def _shown(self, asked: Asked) -> Reasoning:
        return self._settings.reasoning if asked.shows_reasoning else "none"

    def _count(self, reply: Reply) -> None:
        name = reply.model.name
        self._metrics.count("transllm_prompt_tokens_total", "Tokens read.", len(reply.prompt), model=name)
        self._metrics.count("transllm_completion_tokens_total", "Tokens written.", reply.completion_tokens, model=name)

    def _observe(self, name: str, meaning: str, began: float, reply: Reply) -> None:
        self._metrics.observe(name, meaning, time.monotonic() - began, model=reply.model.name)


def _too_long(model: Served, message: str, param: str) -> ApiError:
    # Clients look for these words.
    return wrong(
        f"this model's maximum context length is {model.longest} tokens: {message}", param, "context_length_exceeded"
    )


def _failure() -> ApiError:
    return ApiError(500, "the engine failed; ask again", code="engine_failed", kind="server_error")


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(document), status, headers, media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error.body, error.status, error.headers)


async def _engine_failed(request: Request, error: Exception) -> Response:
    return await _api_error(request, _failure())


async def _http_error(request: Request, error: Exception) -> Response:
    """No such address, or a method that it does not have."""
    assert isinstance(error, HTTPException)
    what = "there is nothing at this address; the API is at /v1" if error.status_code == 404 else str(error.detail)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return await _api_error(request, ApiError(error.status_code, what, code=code, headers=error.headers))
