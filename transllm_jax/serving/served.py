"""A model that is served, and one answer of it while it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import cached_property

from transllm_jax.errors import UserError
from transllm_jax.generation.answer import Answer, Delta, Deltas
from transllm_jax.generation.engine import Request
from transllm_jax.generation.request import Reason
from transllm_jax.generation.sampling import GREEDY, Sampling
from transllm_jax.generation.translate import translation_ends, translation_prompt
from transllm_jax.generation.writing import AskOriginal, Leg, Writing
from transllm_jax.serving.engine_thread import EngineThread, Job, Lane, Told
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.chat import Message, encode_prompt
from transllm_jax.tokenizer.text_stream import INCOMPLETE
from transllm_jax.tokenizer.tokenizer import Tokenizer


class EngineFailed(Exception):
    """The engine could not finish an answer."""


@dataclass
class Served:
    """A model under a name. markers: None if it writes no chains. english_by: the original model, if that writes the
    English answers."""

    name: str
    thread: EngineThread
    lane: Lane
    tokenizer: Tokenizer
    markers: Markers | None
    english_by: Served | None = None
    # Requests that it works on or that wait.
    requests: int = field(default=0, init=False)

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self.lane.longest

    @cached_property
    def least(self) -> int:
        """The fewest tokens that a message takes, with what the chat template writes around it."""
        turn: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        try:
            one, two = (len(encode_prompt(self.tokenizer, [*turn * count, turn[0]])) for count in (0, 1))
        except UserError:
            return 1
        return max((two - one) // 2, 1)

    @cached_property
    def specials(self) -> frozenset[int]:
        """The ids of special tokens. They are no text, and a client that sent one back would be refused."""
        return frozenset(self.tokenizer.special_tokens.values())

    @cached_property
    def hidden(self) -> frozenset[int]:
        """The special tokens that are left out of a chain's text."""
        marks = () if self.markers is None else self.markers.in_order()
        return self.specials - {self.tokenizer.token_id(marker) for marker in marks}

    async def generate(self, request: Request, *, ahead: bool = False) -> AsyncGenerator[Told]:
        """Yield more of the answer as it comes; with the last of it, why it ended.

        It is given up if the iteration ends early. Raises EngineFailed.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Told] = asyncio.Queue()

        def tell(told: Told) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(queue.put_nowait, told)

        job = Job(request, tell)
        self.thread.submit(self.lane, job, ahead=ahead)
        try:
            told = Told([])
            while told.reason is None:
                told = await queue.get()
                while not queue.empty():
                    more = queue.get_nowait()
                    told = more._replace(ids=[*told.ids, *more.ids])
                if told.failed:
                    raise EngineFailed
                yield told
        finally:
            self.thread.cancel(job)

    async def to_english(self, text: str) -> str | None:
        """The model's own translation of a text into English; None if it did not end it, or has no room for it."""
        assert self.markers is not None
        prompt = translation_prompt(self.tokenizer, self.markers, self.tokenizer.without_specials(text), "to_english")
        room = min(self.longest - len(prompt), 2 * len(prompt) + 32)
        if room < 1:
            return None
        stop = translation_ends(self.tokenizer, self.markers)
        ids: list[int] = []
        reason: Reason | None = None
        async with aclosing(self.generate(Request(prompt, room, stop))) as progress:
            async for told in progress:
                ids += told.ids
                reason = told.reason
        found = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return found or None if reason == "stop" else None


class StopStrings:
    """A growing text up to the first of some strings. What may be the beginning of one is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.found = False

    def more(self, text: str) -> str:
        """What can be shown after some more text."""
        if self.found:
            return ""
        text = self._held + text
        # The one that is whole first, as if the text came letter by letter.
        ends = [(at + len(string), at) for string in self._strings if (at := text.find(string)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        size = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def rest(self) -> str:
        """What is held back, when the text has ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of a text are the beginning of a string."""
    return next((size for size in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:size])), 0)


@dataclass
class Reply:
    """One answer: what is asked, and, while its parts are taken (`deltas`), what is known about it.

    raw: the model continues a text, so nothing in its answer is a chain. ask_original: how `Served.english_by` is
    asked, if it writes the English answers. content: what the user sees so far. whole: the answer once it has ended.
    """

    model: Served
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_strings: Sequence[str] = ()
    raw: bool = False
    ask_original: AskOriginal | None = None
    finish_reason: Reason | None = field(default=None, init=False)
    completion_tokens: int = field(default=0, init=False)
    reasoning_tokens: int = field(default=0, init=False)
    content: str = field(default="", init=False)
    whole: Answer | None = field(default=None, init=False)

    async def deltas(self) -> AsyncGenerator[list[Delta]]:
        """Yield more of the answer as it comes. All its legs are within the same limits.

        Raises EngineFailed.
        """
        model = self.model
        hidden = model.specials if self.raw else model.hidden
        markers = None if self.raw else model.markers
        writing = Writing(
            model.tokenizer, markers, self.prompt, raw=self.raw, hidden=hidden, ask_original=self.ask_original
        )
        given, stops = Deltas(), StopStrings(self.stop_strings)

        def has_room(leg: Leg) -> bool:
            # After a stop string nothing follows.
            return not stops.found and self._room(leg.prompt) > 0

        whole: Answer | None = None
        while whole is None:
            leg = writing.leg
            by = model.english_by if leg.original and model.english_by is not None else model
            request = Request(leg.prompt, self._room(leg.prompt), leg.stop, sampling=self.sampling)
            ids: list[int] = []
            told = Told([])
            async with aclosing(by.generate(request, ahead=leg.prompt is not self.prompt)) as progress:
                async for told in progress:
                    ids += told.ids
                    self.completion_tokens += len(told.ids)
                    yield self._passed(given.of(writing.grow(ids)), stops)
                    if stops.found:
                        break
            cut_off = told.reason == "length" and not stops.found
            whole = writing.end(cut_off=cut_off, stopped_by=told.stopped_by, has_room=has_room)
        self.whole = whole
        cut_off = whole.cut_off and not stops.found
        self.reasoning_tokens = self._before_target(writing.ids)
        self.finish_reason = "length" if cut_off else "stop"
        # The limit may have cut a character in half.
        rest_of = [Delta(part, text.rstrip(INCOMPLETE) if cut_off else text) for part, text in given.of(whole)]
        last = [] if stops.found else self._passed(rest_of, stops)
        if rest := stops.rest():
            self.content += rest
            last.append(Delta("answer", rest))
        yield last

    def _room(self, prompt: Sequence[int]) -> int:
        """How many tokens may follow a prompt."""
        return min(self.max_new_tokens - self.completion_tokens, self.model.longest - len(prompt))

    def _passed(self, deltas: list[Delta], stops: StopStrings) -> list[Delta]:
        """The deltas, the answer only up to a stop string."""
        found = []
        for part, text in deltas:
            shown = stops.more(text) if part == "answer" else text
            if shown:
                found.append(Delta(part, shown))
                if part == "answer":
                    self.content += shown
        return found

    def _before_target(self, ids: Sequence[int]) -> int:
        """How many tokens of a chain come before the answer in the target language."""
        markers = None if self.raw else self.model.markers
        target = None if markers is None else self.model.tokenizer.token_id(markers.target)
        return 0 if target not in ids else ids.index(target) + 1
