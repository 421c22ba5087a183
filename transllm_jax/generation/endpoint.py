"""Answers of a server with OpenAI's chat completions API: several requests at once, and again after passing faults.

httpx2 and tenacity (the extra `endpoint`) are imported only here. The requests run in an event loop in a thread of its
own, so that a stopped run need not wait for the answers that are still under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from transllm_jax.config import Endpoint
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.chat import Message

# Seconds: the pause before a second attempt, which doubles with each one up to the longest. A server that asks for more
# than the longest ends the run.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
# Seconds in which a connection has to be made; between two lines about repeated requests; and between two looks at
# whether the run has been asked to stop.
CONNECT, TELL_EVERY, POLL = 30.0, 60.0, 0.2
# Statuses of passing faults besides 5xx, and those with which a server refuses one request but not others.
_PASSING, _REFUSED = (408, 429), (400, 413, 422)
# Why an answer ended before its end.
_CUT_OFF = ("length", "content_filter")


@dataclass(frozen=True)
class Request:
    """A request's body, and an id that no other request of the run has."""

    id: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """What came back for a request. tokens: as the server counts them, None if it does not.

    error: why there is no answer; the text is then empty. reasoning: what the model wrote before its answer, where the
    server sends it apart.
    """

    id: str
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    reasoning: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the answer is there and was not cut off."""
        return self.error is None and self.finish_reason not in _CUT_OFF

    def record(self) -> dict[str, Any]:
        """The reply as a JSON object, without its reasoning; `Reply(**record)` reads it back."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "reasoning"}


def request_body(settings: Endpoint, messages: Sequence[Message], max_tokens: int, seed: int) -> dict[str, Any]:
    """The body of a request for a greedy answer, with the keys that the config adds and without those that it takes
    away."""
    sent = {
        "model": settings.model,
        "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
        settings.max_tokens_as: max_tokens,
        "temperature": 0,
        "seed": seed,
        **settings.body,
    }
    return {key: value for key, value in sent.items() if value is not None}


def parse_reply(id: str, body: Any) -> Reply:
    """The reply in the body of a chat completion. Raises ValueError that says what is wrong with it."""
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        message = choice["message"]
        text = message.get("content") or ""
        # Servers name it one or the other way.
        reasoning = message.get("reasoning_content") or message.get("reasoning") or None
        reason, counts = choice.get("finish_reason"), [usage.get(f"{of}_tokens") for of in ("prompt", "completion")]
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"with no chat completion: {_short(body)}") from None
    if not isinstance(text, str) or any(not isinstance(count, int | None) for count in counts):
        raise ValueError(f"with a chat completion of another form: {_short(body)}")
    thought = _writable(reasoning) if isinstance(reasoning, str) else None
    ended = None if reason is None else str(reason)
    return Reply(id, _writable(text), ended, counts[0], counts[1], reasoning=thought)


def _writable(text: str) -> str:
    """JSON can spell half of a pair of surrogates, which no file of text can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_key(settings: Endpoint, where: str) -> str | None:
    """The server's key from the environment; None if the config names none. where: the section, for messages.

    Raises UserError if the variable is not set or its value cannot be a key; the value is not shown.
    """
    if settings.key is None:
        return None
    key = os.environ.get(settings.key, "").strip()
    if not key:
        raise UserError(
            f"{where}.key: the environment variable {settings.key} is not set; export the key of {settings.place} in "
            "it, or leave key out if the server needs none"
        )
    if not all("!" <= letter <= "~" for letter in key):
        raise UserError(
            f"{where}.key: the environment variable {settings.key} holds characters that no key has (its value is not "
            "shown); export it again"
        )
    return key


def check_client() -> None:
    """Raises UserError if the libraries of the extra `endpoint` are not installed."""
    _libraries()


class Client:
    """Sends requests to the server of an endpoint."""

    def __init__(self, settings: Endpoint, where: str, say: Callable[[str], None], *, stop: bool = True) -> None:
        """where: the config's section, for messages. say: prints a line, from any thread. stop: whether a request that
        failed at its last attempt ends the run; otherwise its reply has the error.

        Raises UserError if a library or the key is missing.
        """
        assert settings.endpoint is not None
        self.settings, self._where, self._say = settings, where, say
        self._url = f"{settings.endpoint.rstrip('/')}/chat/completions"
        self._key = read_key(settings, where)
        self._httpx, self._tenacity = _libraries()
        self._stop, self._repeated, self._told = stop, 0, -TELL_EVERY

    def reach(self) -> None:
        """Raises UserError if nobody answers at the server's address; any answer will do."""
        try:
            self._httpx.get(self._url, timeout=CONNECT)
        except (self._httpx.ConnectError, self._httpx.ConnectTimeout) as error:
            raise UserError(
                f"{self._where}: {self.settings.endpoint} cannot be reached ({type(error).__name__}: {error}); correct "
                "the address, or start the server"
            ) from None
        except self._httpx.TransportError:
            return  # somebody is there

    def replies(self, requests: Sequence[Request]) -> Generator[Reply | None, None, None]:
        """Yields each reply when it comes, in any order, and None after each `POLL` seconds without one.

        A request that the server refuses gets a reply with an error, if the config says so; so does one whose last
        attempt failed, if the client does not stop. Closing the iterator ends
        the requests that are under way. Raises UserError for faults that do not pass, and after the last attempt.
        """
        found: queue.SimpleQueue[Reply | BaseException | None] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        work = loop.create_task(self._send(requests, found))
        thread = threading.Thread(target=_finish, args=(loop, work, found), daemon=True)
        thread.start()
        try:
            while True:
                try:
                    one = found.get(timeout=POLL)
                except queue.Empty:
                    yield None
                    continue
                if one is None:
                    return
                if isinstance(one, BaseException):
                    raise one
                yield one
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(work.cancel)
            thread.join(5)

    async def _send(self, requests: Sequence[Request], found: queue.SimpleQueue[Any]) -> None:
        httpx, settings = self._httpx, self.settings
        waiting = iter(requests)
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        # A proxy that the environment names does not know this machine's own servers.
        local = httpx.URL(self._url).host in ("localhost", "127.0.0.1", "::1")
        async with httpx.AsyncClient(
            headers=headers,
            trust_env=not local,
            timeout=httpx.Timeout(settings.timeout, connect=min(CONNECT, settings.timeout), pool=None),
            limits=httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency),
        ) as client:

            async def work() -> None:
                for request in waiting:
                    found.put(await self._reply(client, request))

            async with asyncio.TaskGroup() as group:
                for _ in range(min(settings.concurrency, len(requests))):
                    group.create_task(work())

    async def _reply(self, client: Any, request: Request) -> Reply:
        """The reply to a request, which is sent again after passing faults. Raises UserError."""
        tenacity = self._tenacity
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_PassingFault),
            stop=tenacity.stop_after_attempt(self.settings.attempts),
            wait=lambda state: _pause(state.attempt_number, state.outcome.exception()),
            before_sleep=lambda state: self._tell(state.outcome.exception(), state.next_action.sleep),
            reraise=True,
        )
        try:
            reply: Reply = await attempts(self._once, client, request)
        except _PassingFault as fault:
            many = f"{self.settings.attempts} attempts failed" if self.settings.attempts > 1 else "the attempt failed"
            failed = f"{self._url}: {many}, the last with {fault}"
            if not self._stop:
                return Reply(request.id, error=failed)
            raise UserError(
                f"{self._where}: {failed}; see whether the server works, and start the run again: it goes on from here"
            ) from None
        return reply

    async def _once(self, client: Any, request: Request) -> Reply:
        httpx = self._httpx
        try:
            response = await asyncio.wait_for(client.post(self._url, json=request.body), self.settings.timeout)
        except (httpx.TimeoutException, TimeoutError):
            raise _PassingFault(f"no answer within {self.settings.timeout:g} s") from None
        except httpx.TransportError as error:
            raise _PassingFault(self._clean(f"{type(error).__name__}: {error}")) from None
        status = response.status_code
        if status == 200:
            try:
                return parse_reply(request.id, _json(response))
            except ValueError as error:
                raise UserError(
                    f"{self._where}: {self._url} answered {self._clean(str(error))}; give the URL of a server with "
                    "OpenAI's chat completions API"
                ) from None
        message = self._clean(_message(response))
        if status in _PASSING or status >= 500:
            after = _retry_after(response.headers.get("retry-after"))
            if after is None or after <= LONGEST_PAUSE:
                raise _PassingFault(f"status {status}: {message}", after)
            message = f"{message} (try again in {after:.0f} s)"
        elif status in _REFUSED and self.settings.refused == "drop":
            return Reply(request.id, error=f"status {status}: {message}")
        raise UserError(
            f"{self._where}: {self._url} answered {status}: {message}; {self._remedy(status, message, response)}"
        )

    def _remedy(self, status: int, message: str, response: Any) -> str:
        """What to do about a status that does not pass."""
        settings, where = self.settings, self._where
        if status in (401, 403):
            if settings.key is None:
                return f"set {where}.key to the name of an environment variable that holds the server's key"
            return f"the key is that of the environment variable {settings.key}: see whether it is right"
        if status == 404:
            return f"see whether the server has a model {settings.model!r}, and whether {where}.endpoint ends in /v1"
        if 300 <= status < 400:
            return f"it points to {response.headers.get('location', 'another place')}: give that in {where}.endpoint"
        if "max_completion_tokens" in message and settings.max_tokens_as == "max_tokens":
            return f"set {where}.max_tokens_as to max_completion_tokens"
        for name in ("temperature", "seed"):
            if name in message and name not in settings.body:
                return f"set {where}.body to {{{name}: null}} for a server that refuses {name!r}"
        if status in _REFUSED:
            return f"correct the request, or set {where}.refused to drop to leave out texts that the server refuses"
        return "start the run again when this is settled: it goes on from here"

    def _clean(self, text: str) -> str:
        """A server's text in one short line, without the key, which some servers repeat."""
        return _short(text if self._key is None else text.replace(self._key, "***"))

    def _tell(self, fault: BaseException, pause: float) -> None:
        self._repeated += 1
        now = time.monotonic()
        if now - self._told >= TELL_EVERY:
            self._told = now
            so_far = "" if self._repeated == 1 else f" ({self._repeated} requests were repeated so far)"
            self._say(f"  {self._url}: {fault}: sent again in {pause:.0f} s{so_far}")


class _PassingFault(Exception):
    """A fault after which a request is sent again. after: the seconds that the server asks to wait, if it does."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


def _libraries() -> tuple[Any, Any]:
    """The modules httpx2 and tenacity."""
    try:
        import httpx2
        import tenacity
    except ImportError as error:
        raise UserError("an endpoint needs httpx2 and tenacity; pip install 'transllm-jax[endpoint]'") from error
    return httpx2, tenacity


def _finish(loop: asyncio.AbstractEventLoop, work: asyncio.Task[None], found: queue.SimpleQueue[Any]) -> None:
    """Run the loop until the work is done; the queue's last item is None, or the error that ended the work."""
    asyncio.set_event_loop(loop)
    last: BaseException | None = None
    try:
        loop.run_until_complete(work)
    except BaseExceptionGroup as errors:
        # All tasks are cancelled when the first one fails.
        last = errors.exceptions[0]
    except BaseException as error:
        last = error
    finally:
        found.put(last)
        loop.close()


def _pause(attempt: int, fault: BaseException | None) -> float:
    """Seconds before the next attempt: what the server asks for, or growing ones; both with some at random."""
    asked = fault.after if isinstance(fault, _PassingFault) else None
    if asked is not None:
        return asked + random.uniform(0, FIRST_PAUSE)
    return random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))


def _retry_after(given: str | None) -> float | None:
    """The seconds of a header Retry-After, which has seconds or a date; None if there is none that can be read."""
    if given is None:
        return None
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(given)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _json(response: Any) -> Any:
    """A response's JSON. Raises ValueError that shows what is there instead."""
    try:
        return response.json()
    except ValueError:
        raise ValueError(f"with text that is not JSON: {_short(response.text) or 'nothing'}") from None


def _message(response: Any) -> str:
    """A server's own words about an error."""
    try:
        body = _json(response)
    except ValueError as error:
        return str(error)
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(key):
            body = body[key]
    return body if isinstance(body, str) else str(body)


def _short(value: Any) -> str:
    """Anything as one line of at most 300 characters."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)).split())
    return text if len(text) <= 300 else f"{text[:299]}…"
