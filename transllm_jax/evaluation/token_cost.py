"""How many tokens texts take: per character, per byte and per word, and how words are cut.

A word is the text between white space. Thai, Lao, Khmer, Burmese, Chinese and Japanese write no spaces between words;
there a "word" is a phrase or a sentence.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from transllm_jax.choices import Controls, Separator
from transllm_jax.data.read.files import Collector
from transllm_jax.data.read.shards import iter_texts, text_files
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.scripts import Script
from transllm_jax.tokenizer.tokenizer import Tokenizer

WORDS = "a word is the text between white space"
_BATCH = 256  # texts that are encoded at once
_EXAMPLE_LENGTHS = (4, 24)  # least and most characters of an example word


@dataclass(frozen=True)
class TokenCost:
    """The number of tokens of some texts, and their length in Unicode characters, UTF-8 bytes and words."""

    tokens: int
    characters: int
    bytes: int
    words: int

    @property
    def per_character(self) -> float:
        return self.tokens / max(self.characters, 1)

    @property
    def per_byte(self) -> float:
        return self.tokens / max(self.bytes, 1)

    @property
    def per_word(self) -> float:
        return self.tokens / max(self.words, 1)

    def as_json(self) -> dict[str, float]:
        """The cost as report.json holds it."""
        return {
            "tokens": self.tokens,
            "characters": self.characters,
            "bytes": self.bytes,
            "words": self.words,
            "tokens_per_character": self.per_character,
            "tokens_per_byte": self.per_byte,
            "tokens_per_word": self.per_word,
        }


def costs(tokenizers: Sequence[Tokenizer], texts: Iterable[str]) -> list[TokenCost]:
    """The cost of the texts with each tokenizer, in one pass. A special token that is spelled out counts as text."""
    tokens = [0] * len(tokenizers)
    characters = size = words = 0
    for batch in _batches(texts):
        characters += sum(map(len, batch))
        size += sum(len(text.encode()) for text in batch)
        words += sum(len(text.split()) for text in batch)
        for place, tokenizer in enumerate(tokenizers):
            tokens[place] += sum(map(len, tokenizer.encode_batch(batch, specials=False)))
    return [TokenCost(count, characters, size, words) for count in tokens]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def texts_of(
    path: str | Path,
    controls: Controls = "refuse",
    field: str | None = None,
    separator: Separator = "blank line",
) -> Iterator[str]:
    """Yield the texts of files or a glob, in NFC; in records, those of `field`. Raises UserError."""
    empty = True
    for file, reading in text_files(path, separator=separator, controls=controls, field=field).items():
        for text, _ in iter_texts(file, reading, Collector(controls)):
            assert text is not None  # no maximum length was given
            empty = False
            yield unicodedata.normalize("NFC", text)
    if empty:
        raise UserError(f"{path} has no documents: give a file with text in it")


# --- words ----------------------------------------------------------------------------------------------------------


def example_words(script: Script, texts: Iterable[str], count: int) -> list[str]:
    """The most frequent words of the script that are neither short nor long, the most frequent first."""
    blocks = [range(first, last + 1) for first, last in script.blocks]
    least, most = _EXAMPLE_LENGTHS
    frequency = Counter(word for text in texts for word in text.split() if least <= len(word) <= most)
    examples = []
    for word, _ in sorted(frequency.items(), key=lambda item: (-item[1], item[0])):
        if all(any(ord(c) in block for block in blocks) for c in word):
            examples.append(word)
        if len(examples) == count:
            break
    return examples


def cut(tokenizer: Tokenizer, word: str) -> str:
    """A word as the tokenizer cuts it, with the number of tokens: `ก|รุ|ง (5)`.

    Tokens that are parts of one character are shown as one piece, since a part of a character cannot be written.
    """
    ids = tokenizer.encode(word, specials=False)
    pieces: list[str] = []
    pending: list[int] = []
    for number in ids:
        pending.append(number)
        text = tokenizer.decode(pending)
        if "\ufffd" not in text:
            pieces += [text.strip()] if text.strip() else []
            pending = []
    return f"{'|'.join(pieces)} ({len(ids)})"


# --- tables ---------------------------------------------------------------------------------------------------------


def cost_table(rows: Sequence[tuple[str, str, TokenCost, TokenCost]]) -> Table:
    """A table with a row for each (text, tokenizer, its cost, the base's cost for the same text)."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("text", "tokenizer"):
        table.add_column(heading, overflow="fold")
    for heading in ("tokens", "per character", "per byte", "per word", "of base"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for text, name, cost, base in rows:
        table.add_row(
            text if text != last else "",
            name,
            f"{cost.tokens:,}",
            f"{cost.per_character:.3f}",
            f"{cost.per_byte:.3f}",
            f"{cost.per_word:.2f}",
            f"{cost.tokens / max(base.tokens, 1):.0%}",
        )
        last = text
    return table


def example_table(words: Sequence[str], base: Tokenizer, new: Tokenizer) -> Table:
    """A table of how words are cut before and after."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("a word before", "and after"):
        table.add_column(heading, overflow="fold")
    for word in words:
        table.add_row(cut(base, word), cut(new, word))
    return table
