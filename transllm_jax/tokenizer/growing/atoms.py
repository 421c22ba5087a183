"""Text as a byte-level base tokenizer splits it, regrouped at character boundaries.

The base splits a target-script character into pieces that are parts of characters, or that begin in one character and
end in another. An atom is the shortest sequence of pieces that begins and ends between characters: mostly one
character. A joiner (U+200C, U+200D) that the base encodes as several pieces is part of the atom before it: merges that
build a joiner alone would change emoji that contain one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from transllm_jax.tokenizer.growing.encoded import Encoded

Atom = tuple[str, ...]  # its pieces, written as in tokenizer.json


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
        if byte & 0xC0 != 0x80:  # the first byte of the last character, which gives its length
            return back == (1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
    return False


class _JoinerParts:
    """Finds joiners that are encoded as several pieces: their first one or two bytes, and the rest."""

    def __init__(self, vocabulary: dict[str, int], size: int) -> None:
        texts = {number: bytes(_BYTES.get(c, 0) for c in token) for token, number in vocabulary.items()}

        def tokens_where(test: Callable[[bytes], bool]) -> np.ndarray:
            found = np.zeros(size, bool)
            found[[number for number, text in texts.items() if test(text)]] = True
            return found

        # A joiner's bytes are e2 80 8c or e2 80 8d. Tokens that are, or begin with, some of them:
        self._byte_1, self._byte_2 = (
            tokens_where(lambda text: text == b"\xe2"),
            tokens_where(lambda text: text == b"\x80"),
        )
        self._bytes_12 = tokens_where(lambda text: text == b"\xe2\x80")
        self._byte_3 = tokens_where(lambda text: text[:1] in (b"\x8c", b"\x8d"))
        self._bytes_23 = tokens_where(lambda text: text[:2] in (b"\x80\x8c", b"\x80\x8d"))

    def begin(self, ids: np.ndarray) -> np.ndarray:
        """Whether such a joiner begins at each id: bool [len(ids)]."""
        found = np.zeros(len(ids), bool)
        found[:-1] = self._bytes_12[ids[:-1]] & self._byte_3[ids[1:]]
        found[:-1] |= self._byte_1[ids[:-1]] & self._bytes_23[ids[1:]]
        found[:-2] |= self._byte_1[ids[:-2]] & self._byte_2[ids[1:-1]] & self._byte_3[ids[2:]]
        return found


class AtomCoder:
    """Numbers the distinct atoms, with the same number in every batch of runs."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        """`vocabulary`: the base's tokens as in tokenizer.json with their ids."""
        self._size = max(vocabulary.values()) + 1
        self._begun = np.zeros(self._size, np.int64)  # how many characters begin in each token, and in each atom
        self._inside = np.zeros(self._size, bool)  # tokens whose first byte is not the first of a character
        for token, number in vocabulary.items():
            self._inside[number] = bool(token) and _BYTES.get(token[0], 0) & 0xC0 == 0x80
            self._begun[number] = sum(_BYTES.get(c, 0) & 0xC0 != 0x80 for c in token)
        self._parts = _JoinerParts(vocabulary, self._size)
        self._tokens = {number: token for token, number in vocabulary.items()}
        # An atom of one token has the token's id. Key of (atom, token) -> the atom that is longer by this token.
        self._longer: dict[int, int] = {}
        self._made_of: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        """All numbers given so far are below this."""
        return self._size + len(self._made_of)

    def regroup(self, encoded: Encoded) -> Encoded:
        """Runs as the base's ids -> the same runs as numbers of atoms."""
        ids = encoded.ids.astype(np.int64)
        begins = ~self._inside[encoded.ids] & ~self._parts.begin(encoded.ids)
        begins[encoded.starts[:-1][encoded.lengths > 0]] = True
        first = np.flatnonzero(begins)
        lengths = np.diff(np.append(first, len(ids)))
        atoms = ids[first]
        for place in range(1, int(lengths.max(initial=1))):
            longer = np.flatnonzero(lengths > place)
            keys, which = np.unique(atoms[longer] * self._size + ids[first[longer] + place], return_inverse=True)
            atoms[longer] = np.array([self._number(int(key)) for key in keys], np.int64)[which]
        starts = np.concatenate([[0], np.cumsum(begins)])[encoded.starts]
        return Encoded(atoms.astype(np.int32), starts)

    def _number(self, key: int) -> int:
        if key not in self._longer:
            self._longer[key] = self.size
            self._made_of.append((key // self._size, key % self._size))
        return self._longer[key]

    def characters(self) -> np.ndarray:
        """How many characters each atom has: int64 [size]."""
        begun: list[int] = self._begun.tolist()
        for before, last in self._made_of[len(begun) - self._size :]:
            begun.append(begun[before] + begun[last])
        self._begun = np.array(begun, np.int64)
        return self._begun

    def atom(self, number: int) -> Atom:
        """The pieces of an atom."""
        after: list[str] = []
        while number >= self._size:
            number, last = self._made_of[number - self._size]
            after.append(self._tokens[last])
        return (self._tokens[number], *reversed(after))
