"""An answer while it is generated, as the host sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transllm_jax.generation.request import Reason, Request, Result


class Row:
    """An answer on its way. number: its place among the requests. new: how many tokens the last call made of `made`,
    which counts the stop token, too. reason: why it ended; None while it goes on."""

    def __init__(self, number: int, request: Request) -> None:
        self.number, self.request = number, request
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.reason: Reason | None = None
        self.text: str | None = None
        self.stopped_by: int | None = None
        self.made = self.new = 0

    def take(self, ids: Sequence[int], logprobs: Sequence[float], going_on: bool) -> None:
        """More tokens; not `going_on`: the last of them ended the answer."""
        self.new = len(ids)
        self.made += self.new
        self.ids += ids
        self.logprobs += logprobs
        if not going_on:
            stopped = bool(ids) and ids[-1] in self.request.stop
            self.reason = "stop" if stopped else "length"
            if stopped:
                self.stopped_by = self.ids.pop()
                self.logprobs.pop()

    def look(self, decode: Callable[[Sequence[int]], str]) -> None:
        """End the answer before the first stop string in it."""
        text = decode(self.ids)
        ends = [at for string in self.request.stop_strings if (at := text.find(string)) >= 0]
        if ends:
            self.text, self.reason = text[: min(ends)], "stop"
            kept = len(self.ids)
            while kept and not self.text.startswith(decode(self.ids[:kept])):
                kept -= 1
            del self.ids[kept:], self.logprobs[kept:]
        elif self.reason is not None:
            self.text = text

    def result(self) -> Result:
        """The finished answer."""
        assert self.reason is not None
        logprobs = self.logprobs if self.request.scored else None
        return Result(self.ids, self.reason, self.made, logprobs, self.text, self.stopped_by)
