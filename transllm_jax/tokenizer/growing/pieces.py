"""New pieces that continue those of a SentencePiece-BPE base (LLaMA-2, Mistral).

SentencePiece joins any two neighbours that make a known piece, the piece of the best score first. So merges are not
chosen: a set of pieces in rank order determines them, as each split of a piece into two known ones is a merge. New
pieces rank below every piece of the base. Text without the target script contains none of them, and keeps its ids.

1. Characters that the base lacks, and encodes as bytes, become pieces.
2. BPE is trained on runs of the script with each base piece as one symbol (see symbols.py).
3. Pieces that the corpus, encoded with exactly the new tokenizer, does not contain are left out (see prune.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.encoded import Encoded, Ids, Merge, counts, encode_within_words, whole_runs
from transllm_jax.tokenizer.growing.merges import SPARE, merges_of
from transllm_jax.tokenizer.growing.piece_runs import PieceRuns
from transllm_jax.tokenizer.growing.prune import Choice, Learned, OnProgress, choose
from transllm_jax.tokenizer.growing.symbols import BARRIER, train_merges
from transllm_jax.tokenizer.scripts import JOINERS


def split_priority(piece: str, size: int) -> int:
    """Priority of splitting a piece after `size` characters: among splits of one piece the highest is merged first.

    Splits of one piece compete if they share the middle of a text: `er e re` can become `ere re` or `er ere`, and
    SentencePiece takes the left one. There, `x y` with `x y = y z` comes before `y z`: the one with the longer left
    part or, if `y` begins with `x`, the shorter.
    """
    other = len(piece) - size
    can_be_left = piece[size:] == piece[:other]  # this split can be the left one of the two
    can_be_right = piece[other:] == piece[:size]
    if can_be_left == can_be_right:
        return size
    return max(size, other) if can_be_left else min(size, other)


class PieceTable:
    """A base's pieces and merges, and the merges that follow when pieces are added."""

    def __init__(self, state: dict[str, Any]) -> None:
        """`state`: the base's parsed tokenizer.json, with every token in its vocabulary."""
        self.vocabulary: dict[str, int] = state["model"]["vocab"]
        self.merges = merges_of(state)
        self._options = {
            name: state["model"].get(name) for name in ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
        }
        self._place: dict[str, int] = {}  # piece -> index of the last merge that makes it
        for i, (left, right) in enumerate(self.merges):
            self._place[left + right] = i
        # The pieces that text can produce: not the names of special tokens, bytes and unused ids.
        self.known = {piece for piece in self.vocabulary if len(piece) == 1} | self._place.keys()
        self.known -= {token["content"] for token in state["added_tokens"]}
        self._pieces = sorted(self.known, key=self.vocabulary.__getitem__)

    @property
    def ignore_merges(self) -> bool:
        """Whether a text that is a token is never cut."""
        return bool(self._options["ignore_merges"])

    def with_pieces(self, pieces: Sequence[str]) -> tuple[list[Merge], list[Merge]]:
        """(all merges, only the new ones), each in rank order, when new `pieces`, in rank order, are added.

        A new piece can also be part of a base's piece: the merge that makes that piece ranks after the piece's own.
        """
        new = set(pieces)
        known = self.known | new
        inserted = [(place, merge) for piece in self._affected(new) for place, merge in self._splits(piece, known, new)]
        appended = [merge for piece in pieces for _, merge in self._splits(piece, known, None)]
        inserted.sort(key=lambda item: item[0])
        merges: list[Merge] = []
        done = 0
        for place, merge in inserted:
            merges += self.merges[done : place + 1]
            merges.append(merge)
            done = place + 1
        return [*merges, *self.merges[done:], *appended], [*(merge for _, merge in inserted), *appended]

    def _splits(self, piece: str, known: set[str], new: set[str] | None) -> list[tuple[int, Merge]]:
        """The merges that make a piece, each with the index of the base's last merge that makes it.

        new: only merges with a part in it; None for all.
        """
        sizes = sorted(range(1, len(piece)), key=lambda size: -split_priority(piece, size))
        pairs = [(piece[:size], piece[size:]) for size in sizes]
        place = self._place.get(piece, len(self.merges) - 1)
        return [
            (place, (left, right))
            for left, right in pairs
            if left in known and right in known and (new is None or left in new or right in new)
        ]

    def _affected(self, new: set[str]) -> Iterable[str]:
        """The base's pieces that may have a new piece as a part."""
        letters = {letter for piece in new for letter in piece} - {"▁"}
        return [piece for piece in self._pieces if len(piece) > 1 and not letters.isdisjoint(piece)]

    def backend(self, pieces: dict[str, int], merges: list[Merge]) -> tokenizers.Tokenizer:
        """A tokenizer of stretches of normalised text, with pieces added at the given ids; it puts no "▁" in front."""
        options = {name: value for name, value in self._options.items() if value is not None}
        return tokenizers.Tokenizer(models.BPE(vocab=self.vocabulary | pieces, merges=merges, **options))


def learn_pieces(
    table: PieceTable,
    finder: PieceRuns,
    runs: Counter[str],
    size: int,
    min_count: int,
    taken: set[str],
    on_progress: OnProgress,
) -> Learned:
    """Exactly `size` new pieces from stretches of normalised text, `runs`, with their counts.

    No new piece crosses a WORD_END in them. Every new piece occurs at least `min_count` times in the encoded runs.
    `taken`: texts that may not become a piece. Raises UserError if the runs support fewer pieces, or if the characters
    that the base lacks alone need more.
    """
    texts, weights = whole_runs(runs)
    letters = _letters(texts, weights)
    missing = [
        letter
        for letter, times in sorted(letters.items(), key=lambda item: (-item[1], item[0]))
        if times >= min_count and letter not in table.known and letter not in taken and finder.learnable(letter)
    ]
    if len(missing) > size:
        raise UserError(
            f"{size} new tokens are too few: {len(missing)} characters that occur at least {min_count} times are no "
            f"pieces of the base; ask for at least {len(missing)}, or raise the minimal count"
        )
    first = len(table.vocabulary)
    characters = {letter: first + i for i, letter in enumerate(missing)}
    with_characters = table.backend(characters, table.with_pieces(missing)[0])
    unit = {number: piece for piece, number in (table.vocabulary | characters).items()}
    begun = np.array([_characters(unit[number]) for number in range(len(unit))], np.int64)
    parts, parts_weights = encode_within_words(
        with_characters, runs, lambda: begun, on_progress=lambda share: on_progress("cut", share)
    )
    found = counts(parts, parts_weights, first + len(missing))
    used = [int(i) for i in np.flatnonzero(found >= min_count)]
    symbols = sorted({unit[i] for i in used if finder.learnable(unit[i]) or unit[i] in ("▁", *JOINERS)})
    place = {symbol: i for i, symbol in enumerate(symbols)}
    numbers = np.full(first + len(missing), BARRIER, np.int64)
    for i in used:
        numbers[i] = place.get(unit[i], BARRIER)
    trained_size = int(size * SPARE) + 1
    while True:
        merges = train_merges(
            parts, parts_weights, symbols, numbers, trained_size, min_count, lambda share: on_progress("train", share)
        )
        more = len({left + right for left, right in merges}) >= trained_size
        kept = [(a, b) for a, b in merges if a + b not in taken and finder.learnable(a + b)]
        candidates = PieceCandidates(table, missing, kept)
        if (learned := choose(candidates, texts, weights, size, min_count, on_progress, more)) is not None:
            return learned
        trained_size *= 2


def _characters(piece: str) -> int:
    """How many characters begin in a piece; one such as <0xE0> is a byte of a character that is no piece."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return len(piece) if byte is None else int(int(byte[1], 16) & 0xC0 != 0x80)


def _letters(texts: list[str], weights: Ids) -> dict[str, int]:
    """How often each character occurs in weighted texts."""
    found = np.zeros(0x110000, np.int64)
    for first in range(0, len(texts), 20_000):
        some = texts[first : first + 20_000]
        points = np.frombuffer("".join(some).encode("utf-32-le"), "<u4")
        starts = np.cumsum([0, *map(len, some)])
        found += counts(Encoded(points.astype(np.int32), starts), weights[first : first + 20_000], len(found))
    return {chr(point): int(found[point]) for point in np.flatnonzero(found)}


class PieceCandidates:
    """Pieces as `prune.Candidates`: characters, which are always taken, and trained pieces, in rank order."""

    def __init__(self, table: PieceTable, characters: list[str], merges: list[Merge]) -> None:
        self._table, self._characters = table, characters
        self._trained: dict[str, list[Merge]] = {}
        for left, right in merges:
            if left + right not in table.vocabulary:
                self._trained.setdefault(left + right, []).append((left, right))
        self._keys = list(self._trained)
        self.vocabulary = dict(table.vocabulary)
        for piece in [*characters, *self._keys]:
            self.vocabulary[piece] = len(self.vocabulary)
        self.ignore_merges = table.ignore_merges

    def select(self, size: int, without: set[Any]) -> Choice:
        """The first `size` pieces, each of which two known ones make; fewer if there are no more."""
        tokens: dict[str, None] = dict.fromkeys(self._characters[:size])
        known = self._table.known
        for piece in self._keys:
            if len(tokens) == size:
                break
            parts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
            if piece not in without and any(all(p in known or p in tokens for p in pair) for pair in parts):
                tokens[piece] = None
        return Choice(self._table.with_pieces(list(tokens))[1], list(tokens))

    def users(self, choice: Choice) -> Iterable[tuple[str, str]]:
        for token in choice.tokens:
            for pair in self._trained.get(token, ()):
                for part in pair:
                    yield part, token

    def makers(self, token: str, choice: Choice) -> Iterable[str]:
        return [token] if token in self._trained else []

    def spell(self, token: str) -> str:
        return token

    def backend(self, choice: Choice) -> tokenizers.Tokenizer:
        ids = {piece: self.vocabulary[piece] for piece in choice.tokens}
        return self._table.backend(ids, self._table.with_pieces(choice.tokens)[0])
