"""New BPE merges that continue those of a byte-level base.

Training starts from text as the base encodes it, so the parts of every merge exist when it applies:

1. Merges from left to right build every atom (see atoms.py) that is frequent enough.
2. BPE is trained on the runs with each atom as one symbol (see symbols.py). So every new token begins and ends
   between characters, except the parts of an atom that takes more than one merge. Runs that are cut into words are
   split there, and an atom across the end of a word takes no part.
3. Merges whose tokens the corpus does not contain are left out (see prune.py).

A left-to-right part of an atom always continues in the same atom, and no other merge uses that atom's remaining pieces,
as all merges of step 1 begin where an atom begins. So atoms are complete before a merge of step 2 can apply.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.atoms import Atom, AtomCoder, token_bytes
from transllm_jax.tokenizer.growing.encoded import Merge, counts, encode_within_words, whole_runs
from transllm_jax.tokenizer.growing.prune import Choice, Learned, OnProgress, choose
from transllm_jax.tokenizer.growing.symbols import BARRIER, train_merges

SPARE = 1.25  # tokens trained at first, times the wanted size, as some are left out


def merges_of(state: dict[str, Any]) -> list[Merge]:
    """The merges of a parsed tokenizer.json in rank order (older files store a pair as one string)."""
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


def learn_merges(
    state: dict[str, Any],
    runs: Counter[str],
    size: int,
    min_count: int,
    on_progress: OnProgress,
    learnable: Callable[[str], bool] = lambda _: True,
) -> Learned:
    """Exactly `size` new tokens from runs of target-script text with their counts.

    state: the base's parsed tokenizer.json, with every token in its vocabulary. runs: texts that the new pre-tokenizer
    leaves whole, normalised, with WORD_END where no new token may cross. learnable: whether new tokens may hold a
    stretch of text; no token crosses one that it refuses. Every new token occurs at least `min_count` times in the
    encoded runs, except the parts of characters that take several merges. Raises UserError if the runs support fewer
    tokens, or if their characters alone need more.
    """
    texts, weights = whole_runs(runs)
    coder = AtomCoder(state["model"]["vocab"])
    base = MergeCandidates(state, [], 0).backend(Choice([], []))
    parts, parts_weights = encode_within_words(
        base, runs, coder.characters, coder.regroup, lambda share: on_progress("cut", share)
    )
    found = counts(parts, parts_weights, coder.size)
    atoms = [(coder.atom(int(i)), int(i)) for i in np.flatnonzero(found)]
    atoms.sort(key=lambda item: (-int(found[item[1]]), item[0]))
    frequent = [(atom, i) for atom, i in atoms if found[i] >= min_count and learnable(_text(atom))]
    building = [("".join(a[:i]), a[i]) for a, _ in frequent for i in range(1, len(a))]
    characters = len(MergeCandidates(state, building, len(building)).select(len(building), set()).tokens)
    if characters > size:
        raise UserError(
            f"{size} new tokens are too few: the {len(frequent)} characters of the corpus that occur at "
            f"least {min_count} times need {characters} tokens that the base lacks; ask for at least {characters}, or "
            "raise the minimal count"
        )
    symbols = sorted({"".join(a) for a, _ in frequent})
    place = {symbol: i for i, symbol in enumerate(symbols)}
    numbers = np.full(coder.size, BARRIER, np.int64)
    for atom, i in frequent:
        numbers[i] = place["".join(atom)]
    trained_size = int(size * SPARE) + 1
    while True:
        merges = train_merges(
            parts, parts_weights, symbols, numbers, trained_size, min_count, lambda share: on_progress("train", share)
        )
        candidates = MergeCandidates(state, building + merges, len(building))
        more = len({left + right for left, right in merges}) >= trained_size
        if (learned := choose(candidates, texts, weights, size, min_count, on_progress, more)) is not None:
            return learned
        trained_size *= 2


def _text(atom: Atom) -> str:
    return token_bytes("".join(atom)).decode("utf-8", errors="replace")


class MergeCandidates:
    """Merges as `prune.Candidates`, in rank order, for the base's tokenizer.json `state`.

    The first `fixed` ones build characters and are always taken.
    """

    def __init__(self, state: dict[str, Any], merges: list[Merge], fixed: int) -> None:
        self._merges, self._state, self._fixed = merges, state, set(merges[:fixed])
        self._base: dict[str, int] = state["model"]["vocab"]
        self._base_merges = merges_of(state)
        self._base_merge_set = set(self._base_merges)
        self.vocabulary = dict(self._base)
        for left, right in merges:
            self.vocabulary.setdefault(left + right, len(self.vocabulary))
        self.ignore_merges = bool(state["model"].get("ignore_merges"))

    def select(self, size: int, without: set[Any]) -> Choice:
        """The first merges that make `size` tokens which the base lacks; fewer if there are no more.

        Left out are the merges in `without`, and those whose parts cannot be made without them.
        """
        chosen: dict[Merge, None] = {}
        tokens: dict[str, None] = {}
        for left, right in self._merges:
            if (left, right) in without or not all(part in self._base or part in tokens for part in (left, right)):
                continue
            made = left + right
            new = made not in self._base and made not in tokens
            if new and len(tokens) == size:
                break
            if (left, right) not in self._base_merge_set:  # the base's own merge keeps its rank
                chosen[left, right] = None
            if new:
                tokens[made] = None
        return Choice(list(chosen), list(tokens))

    def users(self, choice: Choice) -> Iterable[tuple[str, Merge]]:
        for merge in choice.merges:
            if merge not in self._fixed:
                for part in merge:
                    yield part, merge

    def makers(self, token: str, choice: Choice) -> Iterable[Merge]:
        return [merge for merge in choice.merges if merge not in self._fixed and "".join(merge) == token]

    def spell(self, token: str) -> str:
        return token_bytes(token).decode("utf-8", errors="replace")

    def backend(self, choice: Choice) -> tokenizers.Tokenizer:
        vocabulary = self._base | {token: self.vocabulary[token] for token in choice.tokens}
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=[*self._base_merges, *choice.merges], ignore_merges=self.ignore_merges)
        )
        # The runs are isolated already.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return backend
