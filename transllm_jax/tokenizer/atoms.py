"""Text as a byte-level base tokenizer cuts it, regrouped at character boundaries.

The base cuts a target-script character into pieces that are parts of characters, or that begin in one
character and end in another. An atom is the shortest stretch of pieces that begins and ends between
characters: mostly one character.
"""

from __future__ import annotations

from collections import Counter

import tokenizers

Atom = tuple[str, ...]  # the base's pieces of it, written as in tokenizer.json

_CHUNK = 10_000  # texts that are encoded at a time


def _byte_characters() -> dict[str, int]:
    """The byte that each character of byte-level token strings stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_characters()


def token_bytes(token: str) -> bytes:
    """The bytes of a token written as in tokenizer.json."""
    return bytes(_BYTES[c] for c in token)


def ends_between_characters(token: str) -> bool:
    """Whether the token's last byte is the last byte of a UTF-8 character that begins in the token."""
    for back, byte in enumerate(reversed(token_bytes(token)), start=1):
        if byte & 0xC0 != 0x80:  # the first byte of the last character, which tells its length
            return back == (1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
    return False


def cut_into_atoms(cutter: tokenizers.Tokenizer, runs: Counter[str]) -> list[tuple[list[Atom], int]]:
    """Each run of text as atoms, with its count, in sorted order of the runs."""
    ends: dict[str, bool] = {}
    words: list[tuple[list[Atom], int]] = []
    texts = sorted(runs)
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        for text, encoding in zip(chunk, cutter.encode_batch(chunk, add_special_tokens=False), strict=True):
            word: list[Atom] = []
            pieces: Atom = ()
            for piece in encoding.tokens:
                pieces = (*pieces, piece)
                joined = "".join(pieces)
                if joined not in ends:
                    ends[joined] = ends_between_characters(joined)
                if ends[joined]:
                    word.append(pieces)
                    pieces = ()
            words.append((word, runs[text]))
    return words


def count_tokens(backend: tokenizers.Tokenizer, runs: Counter[str]) -> Counter[int]:
    """How often each id occurs in the encoded runs."""
    counts: Counter[int] = Counter()
    texts = sorted(runs)
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        encodings = backend.encode_batch_fast(chunk, add_special_tokens=False)
        for text, encoding in zip(chunk, encodings, strict=True):
            weight = runs[text]
            for i in encoding.ids:
                counts[i] += weight
    return counts
