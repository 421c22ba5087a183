"""No new token crosses the end of a word, as ICU finds them; the tokenizer that comes out needs no ICU."""

from __future__ import annotations

import functools
import json
import random
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_expand import BASES, ENGLISH, MARKERS, THAI, made, mixed
from test_expand_pieces import KINDS
from test_expand_pieces import made as made_pieces
from tokenizers import models

from transllm_jax.choices import Cuts
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.atoms import ends_between_characters
from transllm_jax.tokenizer.growing.encoded import WORD_END, encode_within_words, whole_runs
from transllm_jax.tokenizer.growing.expand import Expansion, expand, save_expanded
from transllm_jax.tokenizer.growing.icu_words import WordCutter, check_icu
from transllm_jax.tokenizer.tokenizer import Tokenizer

breakers = pytest.importorskip("icu4py.breakers")

SIZE = 500
# After a character of two units of UTF-16, ICU's offsets are not Python's.
TEXTS = (EXAMPLES / "text.train.txt").read_text(encoding="utf-8")[:24000].replace("\n\n", "\n\n🎉").split("\n\n")
EVERY = [*((kind, cuts) for kind in BASES for cuts in ("whole", "base")), *((kind, None) for kind in KINDS)]


def base_of(kind: str) -> Tokenizer:
    return (made if kind in BASES else made_pieces)(kind)[0]


@functools.lru_cache
def within(kind: str, cuts: Cuts | None, within_words: bool = True) -> Expansion:
    return expand(base_of(kind), TEXTS, size=SIZE, markers=MARKERS, cuts=cuts, within_words=within_words)


def icu_words(text: str) -> list[str]:
    """The words of a text by ICU's own offsets."""
    units = text.encode("utf-16-le")
    return [
        units[2 * first : 2 * last].decode("utf-16-le") for first, last in breakers.WordBreaker(text, "").segments()
    ]


def crossing(expansion: Expansion, texts: list[str] = TEXTS) -> list[str]:
    """The new tokens that are no part of any word of the texts."""
    words = {word for text in texts for word in icu_words(text)}
    whole = [name for name in expansion.new_tokens[:SIZE] if "\ufffd" not in name]
    assert len(whole) > SIZE // 2
    # With a space in front, a token is the beginning of a word.
    return [
        name
        for name in whole
        if not any(word.startswith(name[1:]) if name.startswith(" ") else name in word for word in words)
    ]


@pytest.mark.parametrize(("kind", "cuts"), EVERY)
def test_no_new_token_crosses_the_end_of_a_word(kind: str, cuts: Cuts | None) -> None:
    expansion = within(kind, cuts)
    assert crossing(expansion) == []
    assert expansion.report["within_words"] is True and expansion.report["icu"].split(".")[0].isdigit()
    across = within(kind, cuts, within_words=False)
    assert across.report["within_words"] is False and across.report["icu"] is None
    found = crossing(across)
    assert len(found) > 3 if cuts != "base" else found  # `base` cuts at vowel signs, and so within most words


@pytest.mark.parametrize(("kind", "cuts"), EVERY)
def test_every_new_token_is_used(kind: str, cuts: Cuts | None) -> None:
    """As the tokenizer encodes whole texts, not words."""
    base, new = base_of(kind), within(kind, cuts).tokenizer
    assert new.vocab_size == base.vocab_size + SIZE + len(MARKERS)
    counts = Counter(i for ids in new.encode_batch(TEXTS) for i in ids)
    ids = range(base.vocab_size, base.vocab_size + SIZE)
    whole = [i for i in ids if kind in KINDS or ends_between_characters(str(new.token(i)))]
    assert [i for i in whole if counts[i] < 2] == []
    assert [new.encode(text) for text in ENGLISH] == [base.encode(text) for text in ENGLISH]
    assert all(new.decode(new.encode(text, specials=False)) == text for text in TEXTS if kind != "metaspace")


def test_a_unit_across_the_end_of_a_word_is_left_out_and_joins_nothing() -> None:
    vocabulary = {unit: number for number, unit in enumerate(["a", "b", "c", "d", "bc", "ab"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b")]))
    lengths = np.array([len(unit) for unit in vocabulary], np.int64)
    runs = Counter({f"ab{WORD_END}cd": 5, f"a{WORD_END}d{WORD_END}bc": 2, "ad": 3, f"b{WORD_END}c": 1})
    found, times = encode_within_words(backend, runs, lambda: lengths)
    units, starts = list(vocabulary), found.starts.tolist()
    parts = [[units[i] for i in found.ids[first:last]] for first, last in pairwise(starts)]
    # In "ab|cd" the base makes a, bc, d.
    assert sorted((part, int(n)) for part, n in zip(parts, times, strict=True) if part) == [
        *((["a"], 2), (["a"], 5), (["a", "d"], 3), (["bc"], 2), (["d"], 2), (["d"], 5))
    ]
    assert whole_runs(Counter({f"a{WORD_END}b": 2, "ab": 3}))[0] == ["ab"]
    assert whole_runs(Counter({f"a{WORD_END}b": 2, "ab": 3}))[1].tolist() == [5]
    # A base without a token for a character says nothing of it, and all that follows would be cut elsewhere.
    with pytest.raises(UserError, match="no tokens for some characters of the corpus"):
        encode_within_words(backend, Counter({f"xa{WORD_END}b": 2}), lambda: lengths)


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("th", "ที่เบอร์", "ที่ เบอร์"),
        ("lo", "ພາສາລາວ", "ພາສາ ລາວ"),
        ("km", "ភាសាខ្មែរគឺជា", "ភាសាខ្មែរ គឺជា"),
        ("my", "မြန်မာဘာသာစကား", "မြန်မာဘာသာ စကား"),
        ("zh-Hant", "我爱北京", "我 爱 北京"),
        ("ja", "東京に行き", "東京 に 行き"),
        ("ru", "хорошо", "хорошо"),
    ],
)
def test_words_of_scripts_without_spaces(language: str, text: str, words: str) -> None:
    cutter = WordCutter(language)
    assert cutter.cut(text, [(0, len(text))]) == [words.split()]
    # Also after characters of two units, and without what is beside the span.
    assert cutter.cut(f"🎉🎉{text}🎉", [(2, 2 + len(text))]) == [words.split()]


def test_a_space_belongs_to_the_word_after_it() -> None:
    cutter = WordCutter("th")
    for text, words in (
        (" ที่เบอร์", [" ที่", "เบอร์"]),
        ("▁▁ที่เบอร์", ["▁▁ที่", "เบอร์"]),
        ("ที่ เบอร์ ", ["ที่", " เบอร์", " "]),
    ):
        assert cutter.cut(text, [(0, len(text))]) == [words]
    # Where a word ends depends on the text around a span, which is cut all the same.
    text = "เขาอยู่ที่เบอร์นี้"
    assert cutter.cut(text, [(3, 5), (8, 13)]) == [[text[3:5]], [text[8:10], text[10:13]]]
    assert cutter.cut(text, []) == []


@settings(max_examples=150, deadline=None)
@given(text=mixed, places=st.lists(st.integers(0, 60), max_size=8))
def test_spans_are_cut_where_words_end_and_nowhere_else(text: str, places: list[int]) -> None:
    places = sorted(min(place, len(text)) for place in places)
    spans = [(first, last) for first, last in zip(places[::2], places[1::2], strict=False) if first < last]
    found = [word for words in WordCutter("th").cut(text, spans) for word in words]
    ends, done = set(), 0
    for word in icu_words(text):
        done += len(word)
        if text[done - 1] not in " ▁":
            ends.add(done)
    assert found == [
        text[first:last]
        for start, stop in spans
        for cuts in [[start, *sorted(end for end in ends if start < end < stop), stop]]
        for first, last in pairwise(cuts)
    ]


@pytest.mark.parametrize("kind", ["smollm2", "prepend"])
@pytest.mark.parametrize(
    ("language", "size", "text"),
    [
        ("ja", 40, "東京に行きました。京都に行きました。カタカナで書きました。"),
        ("zh", 40, "我爱北京天安门。我们在北京学习中文。他们在学习中文。"),
        ("km", 90, "ភាសាខ្មែរគឺជាភាសាខ្មែរ ខ្ញុំនិយាយភាសាខ្មែរ"),
        ("my", 90, "မြန်မာဘာသာစကား မြန်မာနိုင်ငံ မြန်မာဘာသာစကား"),
        ("lo", 90, "ພາສາລາວແມ່ນພາສາລາວ ຂ້ອຍເວົ້າພາສາລາວ"),
    ],
)
def test_every_script_without_spaces(kind: str, language: str, size: int, text: str) -> None:
    rng = random.Random(0)
    # Characters alone, too, so that they are used beside the tokens that hold them.
    parts = [*icu_words(text) * 3, *text]
    shuffled = ["".join(rng.choices(parts, k=12)) for _ in range(200)]
    words = {word for some in shuffled for word in icu_words(some)}
    across, within = (
        expand(base_of(kind), shuffled, size=size, language=language, markers=[], within_words=choice).new_tokens
        for choice in (False, True)
    )
    crossing = [
        [name for name in names if "\ufffd" not in name and not any(name.strip() in word for word in words)]
        for names in (across, within)
    ]
    assert crossing[1] == [] and sum(len(name) > 1 for name in within) > 5
    assert crossing[0] or size == 40  # so few tokens are words in any case


def test_words_between_spaces_are_found_already() -> None:
    """In a script with spaces, runs of letters are words: the option changes nothing."""
    russian = ["Хорошо, что мы говорим по-русски.", "Мы говорили о том, что хорошо говорить."] * 4
    for kind in ("smollm2", "llama3"):
        states = [
            expand(base_of(kind), russian, size=24, language="ru", markers=[], within_words=choice).tokenizer
            for choice in (True, False)
        ]
        assert states[0].backend.to_str() == states[1].backend.to_str()


@pytest.mark.parametrize(("kind", "cuts"), [("smollm2", "whole"), ("llama3", "base"), ("prepend", None)])
def test_the_tokenizer_needs_no_icu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cuts: Cuts | None
) -> None:
    new = within(kind, cuts).tokenizer
    wanted = new.encode_batch(TEXTS)
    across = within(kind, cuts, within_words=False).tokenizer
    before, after = (json.loads(t.backend.to_str()) for t in (across, new))
    assert before["pre_tokenizer"] == after["pre_tokenizer"] and before["normalizer"] == after["normalizer"]
    monkeypatch.setitem(sys.modules, "icu4py", None)
    with pytest.raises(UserError, match="icu4py"):
        check_icu()
    save_expanded(new, tmp_path, tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out").encode_batch(TEXTS) == wanted


@pytest.mark.parametrize("missing", ["icu4py", "icu4py.breakers"])
def test_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def documents() -> object:
        raise AssertionError("the corpus is not read first")
        yield

    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"^[^\n]*needs icu4py; pip install 'transllm-jax\[icu\]'$"):
        expand(base_of("smollm2"), documents(), size=SIZE, markers=[], within_words=True)  # type: ignore[arg-type]
    assert expand(base_of("smollm2"), THAI, size=90, markers=[]).report["icu"] is None
