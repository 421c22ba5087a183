"""New BPE merges that continue a byte-level base's own.

Training starts from text as the base cuts it, so the parts of every merge exist when it applies:

1. Merges from left to right build every atom (see atoms.py) that is frequent enough.
2. Each atom becomes one private-use character, `tokenizers` trains BPE on the runs so written, and the
   merges are translated back. So every new token begins and ends between characters, except the parts of
   an atom that takes more than one merge.
3. A token that the encoded corpus hardly contains is a step on the way to longer ones that use it up. The
   rarest of the merges that do so is left out and a further merge takes its place, until every token is
   used. (Where the corpus has no further merges, the most frequent of those left out come back.)

A left-to-right part of an atom always continues in the same atom, whose other pieces no other merge
touches (all merges of step 1 begin where an atom begins), so atoms are complete before a merge of step 2
can apply.
"""

from __future__ import annotations

import copy
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.atoms import Atom, count_tokens, cut_into_atoms

Merge = tuple[str, str]

_PRIVATE_USE = 0xF0000  # planes 15 and 16: room for 131,000 atoms
_LONGEST = 24  # atoms in a token: longer ones are boilerplate of the corpus, not words
_SPARE = 1.25  # trained in place of the wanted size at first, as step 3 leaves some out


@dataclass(frozen=True)
class Merges:
    """New merges in rank order, the tokens that they make and the base lacks in the order of their ids,
    and how often the training runs, encoded with them, contain each token."""

    merges: list[Merge]
    tokens: list[str]
    counts: list[int]


def merges_of(state: dict[str, Any]) -> list[Merge]:
    """The merges of a parsed tokenizer.json in rank order (older files write a pair as one string)."""
    pairs = (m.split(" ") if isinstance(m, str) else m for m in state["model"]["merges"])
    return [(left, right) for left, right in pairs]


def extended(state: dict[str, Any], merges: list[Merge], tokens: list[str]) -> dict[str, Any]:
    """A copy of a parsed tokenizer.json with `merges` after its own and `tokens` at the next ids."""
    state = copy.deepcopy(state)
    vocabulary = state["model"]["vocab"]
    for token in tokens:
        vocabulary[token] = len(vocabulary)
    state["model"]["merges"] = [list(m) for m in [*merges_of(state), *merges]]
    return state


def learn_merges(state: dict[str, Any], runs: Counter[str], size: int, min_count: int) -> Merges:
    """Exactly `size` new tokens from runs of target-script text with their counts.

    state: the base's tokenizer.json, parsed, with every token in its vocabulary and the pre-tokenizer
    that keeps runs whole. Every new token occurs at least `min_count` times in the encoded runs, except
    the parts of characters that take several merges; where the runs are too few for that, the tokens that
    they do not contain are steps to longer ones. Raises UserError where even so they support fewer tokens,
    or where the characters alone need more.
    """
    words = cut_into_atoms(tokenizers.Tokenizer.from_str(json.dumps(state)), runs)
    atoms: Counter[Atom] = Counter()
    for word, count in words:
        for atom in word:
            atoms[atom] += count
    frequent = [a for a, n in sorted(atoms.items(), key=lambda item: (-item[1], item[0])) if n >= min_count]
    building = [("".join(a[:i]), a[i]) for a in frequent for i in range(1, len(a))]
    options = _Candidates(state, building, len(building))
    characters = len(options.select(len(building), set()).tokens)
    if characters > size:
        raise UserError(
            f"{size} new tokens are too few: the {len(frequent)} characters of the corpus that occur at "
            f"least {min_count} times need {characters}; ask for more or raise min_count"
        )
    texts = sorted({"".join(a) for a in frequent})
    symbols = {text: chr(_PRIVATE_USE + i) for i, text in enumerate(texts)}
    writing = {atom: symbols["".join(atom)] for atom in frequent}
    trained_size = int(size * _SPARE) + 1
    while True:
        trained = _train(words, writing, trained_size, min_count)
        merges = [(_read(left, texts), _read(right, texts)) for left, right in trained]
        options = _Candidates(state, building + merges, len(building))
        useless = _find_useless(options, runs, size, min_count)
        chosen = options.select(size, useless)
        if len(chosen.tokens) < size and len({left + right for left, right in merges}) < trained_size:
            chosen = _keep_enough(options, size, useless)  # there are no further merges
        if len(chosen.tokens) == size:
            return Merges(chosen.merges, chosen.tokens, options.count(chosen, runs))
        trained_size *= 2


def _read(written: str, texts: list[str]) -> str:
    return "".join(texts[ord(c) - _PRIVATE_USE] for c in written)


class _Candidates:
    """Merges to choose from, in rank order, for the base tokenizer.json `state`.

    The first `fixed` ones build characters and are always taken.
    """

    def __init__(self, state: dict[str, Any], merges: list[Merge], fixed: int) -> None:
        self.merges, self._state, self._fixed = merges, state, set(merges[:fixed])
        self._vocabulary: dict[str, int] = state["model"]["vocab"]
        self._old = set(merges_of(state))

    def select(self, size: int, without: set[Merge]) -> Merges:
        """The first merges that make `size` tokens which the base lacks; fewer where there are no more.

        Left out are the merges in `without`, and so those of tokens that nothing makes then. Without counts.
        """
        chosen: dict[Merge, None] = {}
        tokens: dict[str, None] = {}
        for left, right in self.merges:
            if (left, right) in without or not all(
                part in self._vocabulary or part in tokens for part in (left, right)
            ):
                continue
            made = left + right
            new = made not in self._vocabulary and made not in tokens
            if new and len(tokens) == size:
                break
            if (left, right) not in self._old:  # the base's own merge keeps its rank
                chosen[left, right] = None
            if new:
                tokens[made] = None
        return Merges(list(chosen), list(tokens), [])

    def after_characters(self, chosen: Merges) -> list[Merge]:
        """The chosen merges but those that build characters."""
        return [merge for merge in chosen.merges if merge not in self._fixed]

    def count(self, chosen: Merges, runs: Counter[str]) -> list[int]:
        """How often the runs, encoded with the chosen merges, contain each of their tokens."""
        state = extended(self._state, chosen.merges, chosen.tokens)
        found = count_tokens(tokenizers.Tokenizer.from_str(json.dumps(state)), runs)
        return [found[state["model"]["vocab"][token]] for token in chosen.tokens]


def _find_useless(options: _Candidates, runs: Counter[str], size: int, min_count: int) -> set[Merge]:
    """Merges to leave out, so that each of `size` tokens occurs `min_count` times in the runs.

    A token that occurs less often is used up by the merges that have it as a part. The last of them, the rarest,
    is left out.
    """
    useless: set[Merge] = set()
    while True:
        chosen = options.select(size, useless)
        counts = options.count(chosen, runs)
        rare = {t for t, n in zip(chosen.tokens, counts, strict=True) if n < min_count}
        last = {part: (left, right) for left, right in options.after_characters(chosen) for part in (left, right)}
        found = {last[token] for token in rare if token in last}
        if not found:
            return useless
        useless |= found


def _keep_enough(options: _Candidates, size: int, useless: set[Merge]) -> Merges:
    """`size` tokens although the corpus supports fewer without rare ones: the earliest merges are taken back in.

    Raises UserError where all of them do not suffice.
    """
    steps = [merge for merge in options.merges if merge in useless]

    def keeping(n: int) -> Merges:
        return options.select(size, useless.difference(steps[:n]))

    supported = len(keeping(len(steps)).tokens)
    if supported < size:
        raise UserError(
            f"the corpus supports {supported} new tokens, not {size}: ask for at most that many, or give more text"
        )
    return keeping(bisect_left(range(len(steps) + 1), size, key=lambda n: len(keeping(n).tokens)))


def _train(words: list[tuple[list[Atom], int]], writing: dict[Atom, str], size: int, min_count: int) -> list[Merge]:
    """Merges in rank order, of at most `size` distinct tokens, over atoms as private-use characters."""
    alphabet = sorted(set(writing.values()))

    def lines() -> Iterator[str]:
        for word, count in words:
            # a rare atom stays in pieces; the space in its place keeps merges from crossing it
            line = "".join(writing.get(atom, " ") for atom in word)
            for _ in range(count):
                yield line

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + size,
        min_frequency=min_count,
        initial_alphabet=alphabet,
        max_token_length=_LONGEST,
        show_progress=False,
    )
    backend.train_from_iterator(lines(), trainer)
    return merges_of(json.loads(backend.to_str()))
