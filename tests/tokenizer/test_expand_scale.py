"""The parts that make expansion fast: each gives what the plain way gives."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_expand import BASES, ENGLISH, MARKERS, SIZE, THAI, made
from tokenizers import Tokenizer, models

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.atoms import AtomCoder, ends_between_characters
from transllm_jax.tokenizer.growing.encoded import Encoded, Recount, count, encode
from transllm_jax.tokenizer.growing.expand import expand
from transllm_jax.tokenizer.growing.merges import MergeCandidates
from transllm_jax.tokenizer.growing.piece_runs import PieceRuns
from transllm_jax.tokenizer.growing.pieces import PieceCandidates, PieceTable
from transllm_jax.tokenizer.growing.prune import choose
from transllm_jax.tokenizer.growing.symbols import BARRIER, train_merges
from transllm_jax.tokenizer.scripts import script_of

LETTERS = "abcd"
PAIRS = [(a, b) for a in LETTERS for b in LETTERS]
IDS = {letter: i for i, letter in enumerate(LETTERS)}
TOKENS = [*LETTERS]
MERGES: list[tuple[str, str]] = []
for _left, _right in [*PAIRS, *((a + b, c) for a, b in PAIRS for c in LETTERS)]:
    MERGES.append((_left, _right))
    IDS.setdefault(_left + _right, len(IDS))


def backend(merges: list[tuple[str, str]], *, whole: bool) -> Tokenizer:
    tokens = {*LETTERS, *(a + b for a, b in merges)}
    return Tokenizer(models.BPE(vocab={t: IDS[t] for t in tokens}, merges=merges, ignore_merges=whole))


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text(LETTERS, max_size=9), unique=True, min_size=1, max_size=25),
    order=st.permutations(MERGES[:16]),
    seed=st.integers(0, 2**16),
    whole=st.booleans(),
)
def test_counting_again_what_changed_is_counting_all(
    texts: list[str], order: list[tuple[str, str]], seed: int, whole: bool
) -> None:
    rng = np.random.default_rng(seed)
    rank = [*order, *(MERGES[i] for i in rng.permutation(range(16, len(MERGES))))]
    weights = rng.integers(1, 9, len(texts))
    recount = Recount(texts, weights, IDS, ignore_merges=whole)
    gone: set[tuple[str, str]] = set()
    for last in (8, 12, 20, 40, 60):  # merges go, and further ones come behind all others
        merges: list[tuple[str, str]] = []
        known = set(LETTERS)
        for merge in rank[:last]:
            if merge not in gone and set(merge) <= known:
                merges.append(merge)
                known.add("".join(merge))
        new = backend(merges, whole=whole)
        wanted = count(new, texts, weights, len(IDS))
        assert recount.count(new, merges).tolist() == wanted.tolist()
        gone |= {merge for merge in merges if rng.random() < 0.2}
    assert wanted @ [len(t) for t in IDS] == weights @ [len(t) for t in texts]


def test_only_what_changed_is_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["abab", "cdcd", "acac", "bdbd"]
    recount = Recount(texts, np.ones(4, np.int64), IDS, ignore_merges=False)
    first, second = [("a", "b"), ("c", "d")], [("c", "d"), ("b", "d")]
    recount.count(backend(first, whole=False), first)
    seen: list[str] = []

    def watched(tokenizer: Tokenizer, some: list[str]) -> Encoded:
        seen.extend(some)
        return encode(tokenizer, some)

    monkeypatch.setattr("transllm_jax.tokenizer.growing.encoded.encode", watched)
    recount.count(backend(second, whole=False), second)
    assert seen == ["abab", "bdbd"]


@pytest.mark.parametrize("kind", BASES)
def test_atoms_are_the_shortest_stretches_between_characters(kind: str) -> None:
    base = made(kind)[0]
    texts = sorted({*THAI, *ENGLISH, "", "é🎉ก", "\u200b"})
    coder = AtomCoder(base.backend.get_vocab(with_added_tokens=True))
    encoded = encode(base.backend, texts)
    atoms = coder.regroup(encoded)
    assert coder.regroup(encoded).ids.tolist() == atoms.ids.tolist()
    assert len(atoms.starts) == len(texts) + 1
    for number, text in enumerate(texts):
        wanted: list[tuple[str, ...]] = []
        pieces: tuple[str, ...] = ()
        for piece in base.backend.encode(text, add_special_tokens=False).tokens:
            pieces = (*pieces, piece)
            if ends_between_characters("".join(pieces)):
                wanted.append(pieces)
                pieces = ()
        found = atoms.ids[atoms.starts[number] : atoms.starts[number + 1]]
        assert [coder.atom(int(i)) for i in found] == wanted and not pieces


def test_training_sees_each_run_as_often_as_it_occurs() -> None:
    # "xy" occurs 1 + 2 + 64 times, "yz" 66 times: both outweigh what the runs alone would say.
    runs = Encoded(np.array([0, 1, 0, 1, 2, 1, 2, 0, 1, 0, 3, 1], np.int32), np.array([0, 2, 5, 7, 9, 12]))
    weights = np.array([1, 2, 64, 64, 100])
    numbers = np.array([0, 1, 2, BARRIER])
    merges = train_merges(runs, weights, ["x", "y", "z"], numbers, 5, 2)
    assert merges == [("x", "y"), ("y", "z"), ("xy", "z")]
    assert train_merges(runs, weights, ["x", "y", "z"], numbers, 5, 65) == [("x", "y")]


def test_progress_is_told_in_order() -> None:
    told: list[tuple[str, float]] = []
    base = made("smollm2")[0]
    expansion = expand(base, THAI, size=SIZE, markers=MARKERS, on_progress=lambda *said: told.append(said))
    assert expansion.tokenizer.fingerprint == made("smollm2")[1].tokenizer.fingerprint
    phases = list(dict.fromkeys(name for name, _ in told))
    assert phases == ["read", "cut", "train", "prune", "report"]
    assert all(0 <= share <= 1 for _, share in told)
    last = Counter({name: share for name, share in told})
    assert last["read"] == last["cut"] == last["train"] == last["report"] == 1.0


def _state(*pieces: str) -> dict[str, object]:
    """A tokenizer.json of letters, with everything that options read."""
    vocabulary = {piece: i for i, piece in enumerate([*"▁abcdกข", *pieces])}
    return {"model": {"vocab": vocabulary, "merges": []}, "added_tokens": []}


@pytest.mark.parametrize("kind", [MergeCandidates, PieceCandidates])
def test_a_rare_token_that_nothing_uses_is_left_out(kind: type) -> None:
    """`ab` comes first in "abc", so nothing is left of `bc`."""
    merges = [("a", "b"), ("b", "c"), ("c", "d")]
    options = kind(_state(), merges, 0) if kind is MergeCandidates else kind(PieceTable(_state()), [], merges)
    learned = choose(options, ["abc", "cd"], np.array([5, 3]), 2, 2, lambda _phase, _share: None, False)
    assert learned is not None
    assert (learned.choice.tokens, learned.counts) == (["ab", "cd"], [5, 3])


@pytest.mark.parametrize("kind", [MergeCandidates, PieceCandidates])
def test_a_rare_token_that_another_uses_up_stays_and_the_other_goes(kind: type) -> None:
    merges = [("a", "b"), ("ab", "c"), ("c", "d")]
    options = kind(_state(), merges, 0) if kind is MergeCandidates else kind(PieceTable(_state()), [], merges)
    learned = choose(options, ["abc", "cd"], np.array([5, 3]), 2, 2, lambda _phase, _share: None, True)
    assert learned is not None
    assert (learned.choice.tokens, learned.counts) == (["ab", "cd"], [5, 3])
    assert choose(options, ["abc", "cd"], np.array([5, 3]), 3, 2, lambda _phase, _share: None, True) is None
    with pytest.raises(UserError, match="supports 2 new tokens, not 3"):  # there is no more
        choose(options, ["abc", "cd"], np.array([5, 3]), 3, 2, lambda _phase, _share: None, False)


def test_stretches_of_a_sentencepiece_text() -> None:
    both = [{"type": "Prepend"}, {"type": "Replace"}]
    legacy = {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": both}}
    bare = {"pre_tokenizer": None, "normalizer": {"type": "Replace"}}
    first = {"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}, "normalizer": None}
    never = {"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}, "normalizer": None}
    text = "กข (กข) a  ขก,b"

    def find(runs: PieceRuns, text: str) -> list[str]:
        normalised, spans = runs.find(text)
        return [normalised[first:last] for first, last in spans]

    apart = ["กข", "กข", "▁▁ขก"]
    for state, start, spaced in ((legacy, "▁", "▁▁"), (bare, "", "▁"), (first, "▁", "▁"), (never, "", "▁")):
        runs = PieceRuns(state, script_of("th"), ["▁", "▁▁", "▁a", "กข"], whole_words=False)
        assert find(runs, text) == [start + apart[0], *apart[1:]]
        assert find(runs, " ก") == [f"{spaced}ก"] and find(runs, "") == find(runs, "abc ") == []
    # A base with pieces across: nothing less than what stands between spaces is encoded on its own.
    for piece in ("ข)", "(ก"):
        runs = PieceRuns(legacy, script_of("th"), ["▁", "▁▁", piece], whole_words=False)
        assert find(runs, text) == ["▁กข", "▁(กข)", "▁▁ขก,b"]
    words = PieceRuns(legacy, script_of("tr"), ["▁", "a"], whole_words=True)
    assert find(words, "12 ab, (çığ) กข x3") == ["▁ab,", "▁(çığ)", "▁x3"]
    learnable = [piece for piece in ("▁ab", "ab", "▁", "a▁b", "ab,", "▁▁a", "3") if words.learnable(piece)]
    assert learnable == ["▁ab", "ab"]
