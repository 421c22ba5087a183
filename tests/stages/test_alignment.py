"""Which English tokens new tokens are aligned with."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tiny_sentencepiece import build_tiny_sentencepiece
from tiny_tokenizer import build_tiny_tokenizer

from transllm_jax.errors import UserError
from transllm_jax.stages import alignment
from transllm_jax.stages.alignment import ROUNDS, Alignment, align
from transllm_jax.tokenizer.growing.expand import expand
from transllm_jax.tokenizer.tokenizer import Tokenizer

pytest.importorskip("thot")

# Words of a made-up language, and what they mean. Each is one token or, of the names, the two that are given here.
WORDS = {"the": ["ณา"], "dog": ["มะลิ"], "tree": ["นที"], "is": ["เป"], "old": ["ซอย"], "not": ["ไม"], "sleeps": ["ดอก"]}
NAMES = {"Paris": ["ปา", "รีส"], "France": ["ฝรั่ง", "เศส"]}
SENTENCES = [
    *("the {} is old", "the {} is not old", "the {} sleeps", "the old {} sleeps", "{} is not the {}", "{} sleeps"),
    *("the {} is the {}", "{} is old", "the {} is not the {}", "{} sleeps", "the old {} is the {}"),
]


def made_up(number: int = 300) -> list[tuple[str, str]]:
    """Pairs in the order of the English words."""
    rng, things = random.Random(0), ["dog", "tree", *NAMES]
    pairs = []
    for _ in range(number):
        english = rng.choice(SENTENCES)
        while "{}" in english:
            english = english.replace("{}", rng.choice(things), 1)
        target = ["".join((WORDS | NAMES)[word]) for word in english.split()]
        pairs.append((english, " ".join(target)))
    return pairs


def with_words(base: Tokenizer) -> Tokenizer:
    """The base with a token for each word, and for each piece of a name."""
    words = [piece for pieces in (WORDS | NAMES).values() for piece in pieces]
    backend = tokenizers.Tokenizer.from_str(base.backend.to_str())
    backend.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    return base.derived(backend)


BASES: list[Callable[[Path], Path]] = [build_tiny_tokenizer, build_tiny_sentencepiece]


@pytest.fixture(params=BASES, ids=["byte-level", "sentencepiece"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(request.param(tmp_path / "base"))


def meaning(found: Alignment, expanded: Tokenizer, base: Tokenizer, word: str) -> str:
    """The English token that a new token is aligned with most."""
    number = (expanded.token_id(word) or 0) - base.vocab_size
    return base.decode([found.meanings[number].most_common(1)[0][0]]).strip()


def aligned(pairs: list[tuple[str, str]], base: Tokenizer) -> tuple[Alignment, Tokenizer]:
    expanded = with_words(base)
    return align(pairs, expanded, base, base.vocab_size, expanded.vocab_size - base.vocab_size), expanded


def test_a_new_token_means_the_english_token_that_it_is_aligned_with(base: Tokenizer) -> None:
    found, expanded = aligned(made_up(), base)
    for word in ("the", "is", "not"):
        assert len(base.encode("a " + word, continuing=True)) - len(base.encode("a", continuing=True)) == 1
        assert meaning(found, expanded, base, WORDS[word][0]) == word
    # Of the pieces of an English name, each piece of the target's has one.
    for name, pieces in NAMES.items():
        written = [base.decode([token]).strip() for token in base.encode(f"a {name}")]
        for piece in pieces:
            assert meaning(found, expanded, base, piece) in written


def test_the_second_piece_of_a_name_goes_on_with_its_word(base: Tokenizer) -> None:
    found, expanded = aligned(made_up(), base)

    def inside(word: str) -> float:
        return float(found.inside[(expanded.token_id(word) or 0) - base.vocab_size])

    for first, second in NAMES.values():
        assert inside(second) > 0.9 and inside(first) < 0.1
    assert all(inside(pieces[0]) < 0.1 for pieces in WORDS.values())


def test_a_dictionary_is_enough(base: Tokenizer) -> None:
    found, expanded = aligned([(word, "".join(pieces)) for word, pieces in (WORDS | NAMES).items()], base)
    assert all(found.meanings)
    for word in ("the", "is", "not"):
        assert meaning(found, expanded, base, WORDS[word][0]) == word


def test_the_first_word_of_a_pair_is_the_token_that_it_is_within_a_sentence(base: Tokenizer) -> None:
    within = base.encode("a the", continuing=True)[-1]
    found, expanded = aligned([("the", "ณา")] * 3, base)
    assert set(found.meanings[(expanded.token_id("ณา") or 0) - base.vocab_size]) == {within}


def test_the_same_pairs_give_the_same_alignment(base: Tokenizer) -> None:
    (one, _), (other, _) = aligned(made_up(), base), aligned(made_up(), base)
    assert one.meanings == other.meanings
    np.testing.assert_array_equal(one.inside, other.inside)


def test_pairs_without_a_new_token_are_refused(base: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^vocabulary\.initial_rows: aligned: .* no new token; add [^\n]*$"):
        aligned([("the dog", "le chien")] * 3, base)
    # What is too long is left out.
    long = [(" ".join(["the"] * 101), " ".join(["ณา"] * 101))]
    with pytest.raises(UserError, match="at most 100 tokens hold no new token"):
        aligned(long, base)
    assert any(aligned([*long, ("the", "ณา")], base)[0].meanings)


def test_of_many_pairs_some_are_taken_evenly(base: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("the", "ณา")] * 4 + [("is", "เป")] * 4 + [("not", "ไม")] * 4

    def counted() -> list[int]:
        found, _ = aligned(pairs, base)
        return [sum(meanings.values()) for meanings in found.meanings if meanings]

    assert counted() == [4, 4, 4]
    monkeypatch.setattr(alignment, "MAX_PAIRS", 6)
    assert counted() == [2, 2, 2]
    monkeypatch.setattr(alignment, "MAX_COST", 3)  # each costs at least 1
    assert 1 <= sum(counted()) <= 3


def test_rounds_are_told(base: Tokenizer) -> None:
    told: list[int] = []
    expanded = with_words(base)
    align(made_up(20), expanded, base, base.vocab_size, expanded.vocab_size - base.vocab_size, told.append)
    assert told == list(range(1, ROUNDS + 2))


def test_learned_tokens_can_be_aligned(tmp_path: Path) -> None:
    """Those of an expanded tokenizer, whose ids follow the base's."""
    base = Tokenizer.load(build_tiny_tokenizer(tmp_path / "base"))
    pairs = made_up()
    expansion = expand(base, [pair[1] for pair in pairs], size=29, language="th", markers=[])
    found = align(pairs, expansion.tokenizer, base, base.vocab_size, len(expansion.pieces))
    assert len(found.meanings) == len(found.inside) == len(expansion.pieces)
    assert sum(map(bool, found.meanings)) > 10


def test_without_the_aligner(base: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "thot.alignment", None)
    with pytest.raises(UserError, match=r"^[^\n]*aligned needs a word aligner; pip install 'transllm-jax\[align\]'$"):
        aligned(made_up(3), base)
