"""A target language in the base's own script: words stay as the base cuts them, and English changes are counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from test_expand import ENGLISH, made
from tiny_sentencepiece import build_tiny_sentencepiece

from transllm_jax.tokenizer.growing.expand import expand
from transllm_jax.tokenizer.tokenizer import Tokenizer

TURKISH = [
    "Bugün hava çok güzel, bu yüzden parkta yürüyüşe çıktık.",
    "Annem en lezzetli yemekleri yapar; özellikle mantı ve börek.",
    "Çocuklar okulun önündeki çimenlikte futbol oynuyorlar.",
    "İstanbul'da 12 yıldır çalışıyor, 1999'dan beri.",
    "Türkiye'nin dağları, nehirleri ve denizleri çok güzeldir.",
    "Öğretmen öğrencilere her gün kitap okumalarını söyler.",
] * 2
MARKERS = ["<EN>", "<TR>", "<RESPONSE>"]
TEXTS = [*ENGLISH, "the lazy dog's tail\n", "the child and the other", "12 + 3 = 15", "<TR> and <EN>"]
SIZE = 40


@pytest.fixture(scope="module", params=["smollm2", "llama3", "sentencepiece"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "sentencepiece":
        return Tokenizer.load(build_tiny_sentencepiece(tmp_path_factory.mktemp("spm")))
    return made(str(request.param))[0]


def test_latin(base: Tokenizer) -> None:
    expansion = expand(base, TURKISH, size=SIZE, language="tr", markers=MARKERS, english=TEXTS)
    new, report = expansion.tokenizer, expansion.report
    assert report["cuts"] == ("none" if json.loads(base.backend.to_str())["model"]["byte_fallback"] else "base")
    before, after = (json.loads(t.backend.to_str()) for t in (base, new))
    assert before["pre_tokenizer"] == after["pre_tokenizer"] and before["normalizer"] == after["normalizer"]
    assert [base.token(i) for i in range(base.vocab_size)] == [new.token(i) for i in range(base.vocab_size)]
    assert report["tokens_per_character_after"] < 0.8 * report["tokens_per_character_before"]

    counts = Counter(i for ids in new.encode_batch(TURKISH) for i in ids)
    ids = range(base.vocab_size, base.vocab_size + SIZE)
    assert {i for i in ids if counts[i] < 2} == set()
    rarest = report["least_frequent"][-1]
    assert rarest["count"] == min(counts[i] for i in ids)
    assert all(sum(c.isspace() for c in name) <= name.startswith(" ") for name in expansion.new_tokens)

    for text in [*TURKISH, *TEXTS]:
        assert new.decode(new.encode(text, specials=False)) == text


def test_english_that_changes_is_counted(base: Tokenizer) -> None:
    turkish = [*TURKISH, *ENGLISH, *ENGLISH, "the child then there, other " * 3]
    expansion = expand(base, turkish, size=SIZE, language="tr", markers=MARKERS, english=iter(TEXTS))
    pairs = [(base.encode(t, specials=False), expansion.tokenizer.encode(t, specials=False)) for t in TEXTS]
    assert expansion.report["english_changed"] == {
        "changed": sum(a != b for a, b in pairs),
        "texts": len(TEXTS),
        "more_tokens": sum(len(b) - len(a) for a, b in pairs),
    }
    assert any(a != b for a, b in pairs)
    assert pairs[TEXTS.index("12 + 3 = 15")][0] == pairs[TEXTS.index("12 + 3 = 15")][1]


def test_whole_words_can_be_asked_for_or_not(tmp_path: Path) -> None:
    base = made("smollm2")[0]
    runs = expand(base, TURKISH, size=SIZE, language="tr", markers=MARKERS, cuts="whole")
    assert runs.report["cuts"] == "whole"
    assert runs.report["english_changed"] is None
    russian = ["сегодня хорошая погода", "погода сегодня хорошая, 12 градусов"] * 3
    words = expand(base, russian, size=18, language="ru", markers=["<EN>", "<RU>"], cuts="base", english=TEXTS)
    state = json.loads(words.tokenizer.backend.to_str())
    assert state["pre_tokenizer"] == json.loads(base.backend.to_str())["pre_tokenizer"]
    assert words.report["english_changed"]["changed"] == 0
