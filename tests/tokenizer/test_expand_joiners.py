"""Words that are spelled with U+200C or U+200D inside: new tokens hold it, and ids of other text stay."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import pytest
import sentencepiece as spm
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sentencepiece import TEXT, build_tiny_sentencepiece
from tiny_tokenizer import build_tiny_tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from transllm_jax.tokenizer.growing.expand import Expansion, expand, save_expanded
from transllm_jax.tokenizer.scripts import JOINERS
from transllm_jax.tokenizer.tokenizer import Tokenizer

PERSIAN = [
    "من می\u200cخواهم به خانه بروم و کتاب\u200cها را بخوانم",
    "آن\u200cها نمی\u200cدانند که بچه\u200cها کجا می\u200cروند",
    "ما می\u200cرویم و کتاب\u200cهای خوب می\u200cخوانیم",
    "خانه\u200cهای این شهر زیبا هستند و بچه\u200cها بازی می\u200cکنند",
    "او نمی\u200cخواهد کتاب\u200cها را به آن\u200cها بدهد",
]
SINHALA = [
    "ශ්\u200dරී ලංකාව ලස්සන රටක් වේ",
    "ගුරුවරයා ප්\u200dරශ්නය නැවත ඇසුවේය, ප්\u200dරදේශය විශාලයි",
    "විද්\u200dයාව ඉගෙන ගන්නා ළමයි විද්\u200dයාලයට යති",
    "ශ්\u200dරී ලංකාවේ ප්\u200dරදේශ රැසක විද්\u200dයාල ඇත",
    "ක්\u200dරියාව සහ ප්\u200dරශ්නය ගැන කතා කරමු, ක්\u200dරමය හොඳයි",
]


def _many(syllables: list[str], joints: list[str], seed: int) -> list[str]:
    """Lines of words of two to four syllables, as many different ones as learning needs."""
    rng = random.Random(seed)

    def word() -> str:
        found = rng.choice(syllables)
        for _ in range(rng.randint(1, 3)):
            found += rng.choice(joints) + rng.choice(syllables)
        return found

    return [" ".join(word() for _ in range(8)) for _ in range(100)]


TEXTS = {
    "fa": PERSIAN + _many(["می", "ها", "کن", "رو", "دان", "خوا", "بین", "گوی"], ["\u200c", "\u200c", ""], 0),
    "si": SINHALA + _many(["ශ", "ප", "ක", "ලංකා", "දේ", "රට", "ම", "යි"], ["්\u200dර", "්\u200dය", ""], 1),
}
ENGLISH = [
    "the quick brown fox's tail",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 a family, 12,345",
    "a\u200db\u200cc \u200d\u200c \u200c\n\u200d",
    "naïve — “quotes”…",
]
SIZES = {"fa": 80, "si": 90}


def _with_joiners(path: Path) -> Path:
    """A byte-level base that has a token for each joiner, as LLaMA-3."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([*TEXT, *JOINERS * 50], trainer)
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text("{}")
    return path


@functools.lru_cache
def made(kind: str, language: str) -> tuple[Tokenizer, Expansion]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "base"
        if kind == "bytes":
            build_tiny_tokenizer(path)
        elif kind == "bytes_with_joiners":
            _with_joiners(path)
        else:
            # LLaMA-2 and Mistral have a piece for each joiner.
            build_tiny_sentencepiece(path, text=[*TEXT, "a\u200cb a\u200db"], character_coverage=1.0)
        base = Tokenizer.load(path)
    return base, expand(base, TEXTS[language], size=SIZES[language], language=language, markers=["<EN>"])


KINDS = ["bytes", "bytes_with_joiners", "sentencepiece"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("language", ["fa", "si"])
def test_new_tokens_hold_joiners_and_are_used(kind: str, language: str) -> None:
    base, expansion = made(kind, language)
    assert len(base.encode("\u200d", specials=False, continuing=True)) == (3 if kind == "bytes" else 1)
    new, first = expansion.tokenizer, expansion.report["first_new_id"]
    holding = [name for name in expansion.new_tokens if any(c in name for c in JOINERS) and "\ufffd" not in name]
    assert len(holding) >= 3 and {"fa": "می\u200c", "si": "්\u200dර"}[language] in map(str.strip, holding)
    produced = {i for text in TEXTS[language] for i in new.encode(text)}
    names = dict(enumerate(expansion.new_tokens, first))
    assert sum(names[i] in holding for i in produced if i in names) >= len(holding) - 1
    for text in TEXTS[language]:
        assert new.decode(new.encode(text)) == text
        assert new.encode(text) != base.encode(text)


@pytest.mark.parametrize("language", ["fa", "si"])
def test_text_without_the_script_keeps_its_ids(kind: str, language: str) -> None:
    base, expansion = made(kind, language)
    for text in ENGLISH:
        assert expansion.tokenizer.encode(text) == base.encode(text)
    # Of text between two letters only: a joiner that ends a word, or stands twice, is none of the word.
    for name in expansion.new_tokens:
        assert name == "<EN>" or not set(name) <= set(JOINERS) | {" "}


JOINED = st.lists(
    st.sampled_from(
        ["م", "ی", "می\u200cخواهم", "\u200c", "\u200d", " ", "a", "é", "\U0001f468", "۱۲", "12", "—", "\n"]
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=JOINED)
def test_decoding_gives_the_text_back(kind: str, text: str) -> None:
    base, expansion = made(kind, "fa")
    new = expansion.tokenizer
    assert new.decode(new.encode(text)) == text
    if not any("\u0600" <= c <= "\u06ff" for c in text):
        assert new.encode(text) == base.encode(text)


def test_both_files_of_a_sentencepiece_base_agree(tmp_path: Path) -> None:
    base = build_tiny_sentencepiece(tmp_path / "base", text=[*TEXT, "a\u200cb a\u200db"], character_coverage=1.0)
    new = made("sentencepiece", "fa")[1].tokenizer
    assert save_expanded(new, base, tmp_path / "new") == ["tokenizer.json", "tokenizer.model"]
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "new" / "tokenizer.model"))
    for text in [*PERSIAN, *ENGLISH, "می\u200c", "\u200cمی", "می\u200c\u200cخواهم", "می\u200c خواهم"]:
        assert theirs.encode(text) == new.encode(text, specials=False), text
