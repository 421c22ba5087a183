"""Translation: from a file that another system made, or by the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

from transllm_jax.data.read.sources import read_jsonl
from transllm_jax.errors import UserError
from transllm_jax.generation.engine import Engine, Request
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer

Direction = Literal["to_target", "to_english"]


class Made(NamedTuple):
    """A translation that a model made; None if it said nothing. finished: it ended by itself, not at the limit."""

    text: str | None
    finished: bool


class Translator(Protocol):
    """Translates texts with a model."""

    def make(self, texts: Sequence[str], direction: Direction) -> list[Made]:
        """The translation of each text."""


class FileTranslator:
    """Looks up the translations of English texts in a jsonl file.

    Raises UserError for a broken line, and for a text that has two different translations.
    """

    def __init__(self, path: str, fields: tuple[str, str] = ("source", "target")) -> None:
        english, target = fields
        self._table: dict[str, str] = {}
        rows = read_jsonl(path, required=fields)
        for row, place in zip(rows, rows.places, strict=True):
            known = self._table.setdefault(row[english].strip(), row[target].strip())
            if known != row[target].strip():
                raise UserError(f"{place}: {row[english][:60]!r} has another translation above; remove one of them")

    def translate(self, texts: Sequence[str]) -> list[str | None]:
        """Look up each text, ignoring white space at its ends; None if the file does not have it."""
        return [self._table.get(text.strip()) for text in texts]


def translation_prompt(tokenizer: Tokenizer, markers: Markers, text: str, direction: Direction) -> list[int]:
    """The ids of `<EN>text<TH>` or `<TH>text<EN>`, the format of pairs in stage `translate`."""
    first, second = markers.english, markers.target
    if direction == "to_english":
        first, second = second, first
    return [*tokenizer.bos_ids, *tokenizer.encode(f"{first}{text.strip()}{second}")]


def translation_ends(tokenizer: Tokenizer, markers: Markers) -> list[int]:
    """The tokens that end a translation."""
    marks = {tokenizer.token_id(marker) for marker in markers.in_order()}
    return sorted({tokenizer.document_end_id, *end_ids(tokenizer), *(token for token in marks if token is not None)})


class ModelTranslator:
    """Translates with the model, as stage `translate` trained it: the model continues `<EN>text<TH>`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        markers: Markers,
        *,
        max_new_tokens: int,
        on_tokens: Callable[[int], None] = lambda count: None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._tokenizer, self._markers = engine, tokenizer, markers
        self._max_new_tokens, self._on_tokens, self._between = max_new_tokens, on_tokens, between

    def translate(self, texts: Sequence[str], direction: Direction) -> list[str | None]:
        """Greedy translations; None for a text to which the model answered nothing."""
        return [made.text for made in self.make(texts, direction)]

    def make(self, texts: Sequence[str], direction: Direction) -> list[Made]:
        """Greedy translations, each with whether the model ended it."""
        if not texts:
            return []
        answers = self._engine.generate(
            [self._prompt(text, direction) for text in texts],
            max_new_tokens=self._max_new_tokens,
            stop=translation_ends(self._tokenizer, self._markers),
            on_tokens=self._on_tokens,
            between=self._between,
        )
        return [self._made(ids) for ids in answers]

    def each(
        self, texts: Sequence[str], direction: Direction, first: int = 0, *, at_once: int | None = None
    ) -> Iterator[tuple[int, Made]]:
        """Yield the number and the greedy translation of each text from number `first` on, as the engine is done.

        Whatever `first` is, a text's translation is the same, to the bit: all `texts` together decide on the slots, or
        `at_once`, if these are not all.
        """
        longest = max((len(self._prompt(text, direction)) for text in texts), default=0) + self._max_new_tokens
        stop = translation_ends(self._tokenizer, self._markers)
        answers = self._engine.run(
            (Request(self._prompt(text, direction), self._max_new_tokens, stop) for text in texts[first:]),
            longest=longest,
            stops=len(stop),
            at_once=len(texts) if at_once is None else at_once,
            on_tokens=self._on_tokens,
            between=self._between,
        )
        for number, result in answers:
            yield first + number, self._made(result.ids)

    def _prompt(self, text: str, direction: Direction) -> list[int]:
        return translation_prompt(self._tokenizer, self._markers, text, direction)

    def _made(self, ids: Sequence[int]) -> Made:
        text = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Made(text or None, len(ids) < self._max_new_tokens)
