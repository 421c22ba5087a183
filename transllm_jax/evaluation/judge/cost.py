"""What judging costs: estimated before the first request, counted while replies come, and limited."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transllm_jax.errors import UserError
from transllm_jax.generation.endpoint import Reply
from transllm_jax.tokenizer.chat import Message

# Tokens of a usual verdict with its explanation, for the estimate; the limit of a reply is the judge's `max_tokens`.
USUAL_REPLY = 350
# Tokens around each message: its role, and the marks before and after it.
_AROUND = 8
# Bytes of English text in a token. Other scripts have about a token for each character, with most judges.
_ASCII = 4
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmM]?)")


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency."""

    read: float
    written: float

    def of(self, read: int, written: int) -> float:
        """The price of these numbers of tokens."""
        return (read * self.read + written * self.written) / 1e6


@dataclass
class Spending:
    """What has been spent, in tokens. prices: None if unknown. limit: of money if there are prices, else of tokens."""

    prices: Prices | None = None
    limit: float | None = None
    read: int = 0
    written: int = 0

    def add(self, messages: Sequence[Message], reply: Reply) -> None:
        """Count a reply: as the server counts, or as estimated if it does not."""
        self.read += tokens_of(messages) if reply.prompt_tokens is None else reply.prompt_tokens
        self.written += text_tokens(reply.text) if reply.completion_tokens is None else reply.completion_tokens

    def check_plan(self, prompts: Iterable[Sequence[Message]], max_tokens: int) -> str:
        """The estimate for these prompts, in words. Raises UserError if it exceeds the limit."""
        sizes = [tokens_of(messages) for messages in prompts]
        read, usual, most = sum(sizes), len(sizes) * min(USUAL_REPLY, max_tokens), len(sizes) * max_tokens
        requests = f"{len(sizes)} request{'s' if len(sizes) != 1 else ''}"
        words = (
            f"{requests}, about {_short(read)} tokens to read and {_short(usual)} to write (at most "
            f"{_short(most)}){self._money(read, usual)}"
        )
        planned = self._amount(self.read + read, self.written + usual)
        if self.limit is not None and planned > self.limit:
            raise UserError(
                f"judge: {words}: more than --max-cost {self._said(self.limit)}, of which "
                f"{self._said(self._amount(self.read, self.written))} are spent; raise it, or ask fewer questions (the "
                "answers and verdicts so far are kept)"
            )
        return words

    def check(self) -> None:
        """Raises UserError if more than the limit has been spent."""
        spent = self._amount(self.read, self.written)
        if self.limit is not None and spent > self.limit:
            raise UserError(
                f"judge: {self._said(spent)} are spent, more than --max-cost {self._said(self.limit)}; the verdicts so "
                "far are kept: raise it and start again"
            )

    def recorded(self) -> dict[str, Any]:
        """For the results (JSON)."""
        found: dict[str, Any] = {"tokens_read": self.read, "tokens_written": self.written}
        if self.prices is not None:
            found["price"] = round(self.prices.of(self.read, self.written), 4)
        return found

    def _amount(self, read: int, written: int) -> float:
        return read + written if self.prices is None else self.prices.of(read, written)

    def _said(self, amount: float) -> str:
        return f"{_short(round(amount))} tokens" if self.prices is None else f"{amount:.2f}"

    def _money(self, read: int, written: int) -> str:
        return "" if self.prices is None else f", about {self.prices.of(read, written):.2f} in money"


def tokens_of(messages: Sequence[Message]) -> int:
    """About how many tokens a prompt has: the tokenizer of a judge behind a server is not known."""
    return sum(text_tokens(message["content"]) + _AROUND for message in messages)


def text_tokens(text: str) -> int:
    """About how many tokens a text has: one for four letters of English, and for each other character."""
    ascii = len(text.encode("ascii", "ignore"))
    return -(-ascii // _ASCII) + len(text) - ascii


def parse_prices(text: str) -> Prices:
    """Prices as `2.5/10`: of a million tokens that a judge reads and writes. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*", text)
    if match is None:
        raise UserError(
            f"--judge-prices {text!r}: give two prices of a million tokens, read and written, such as 2.5/10"
        )
    return Prices(float(match[1]), float(match[2]))


def parse_limit(text: str) -> float:
    """A limit such as `200000`, `2M` or `3.50`. Raises UserError."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise UserError(f"--max-cost {text!r}: give tokens, such as 200000 or 2M, or with --judge-prices money: 3.50")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6}[match[2].lower()]


def _short(count: int) -> str:
    """1,234,567 as 1.23M."""
    for size, unit in ((10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
