"""Where new ids begin, and text that spells a special token."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from test_expand import ENGLISH, MARKERS, SIZE, THAI, made, mixed, no_thai
from tokenizers import normalizers

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.atoms import ends_between_characters
from transllm_jax.tokenizer.growing.expand import Expansion, expand, save_expanded, with_markers
from transllm_jax.tokenizer.tokenizer import Tokenizer

BASES = ["smollm2", "llama3"]


def qwen() -> Tokenizer:
    """As Qwen2: added tokens behind the vocabulary, and NFC."""
    base = made("llama3")[0]
    backend = tokenizers.Tokenizer.from_str(base.backend.to_str())
    backend.normalizer = normalizers.NFC()
    return Tokenizer(backend, base.config, None, "qwen")


def gapped(base: Tokenizer, rows: int = 7) -> tuple[int, Expansion]:
    """Where the new ids begin, and the expansion."""
    first = base.vocab_size + rows
    return first, expand(base, THAI, size=SIZE, markers=MARKERS, first_id=first)


@functools.lru_cache
def made_with_gap(kind: str) -> tuple[int, Expansion]:
    return gapped(made(kind)[0])


@pytest.mark.parametrize("kind", BASES)
def test_new_ids_begin_where_they_are_asked_to(kind: str) -> None:
    base, without = made(kind)
    first, expansion = made_with_gap(kind)
    new = expansion.tokenizer
    assert new.vocab_size == first + SIZE + len(MARKERS)
    assert [base.token(i) for i in range(base.vocab_size)] == [new.token(i) for i in range(base.vocab_size)]
    moved = first - base.vocab_size
    for text in [*THAI, *ENGLISH, "<EN>a<TH>ไทย"]:
        ids = without.tokenizer.encode(text)
        assert new.encode(text) == [i + moved if i >= base.vocab_size else i for i in ids]
    assert expansion.pieces == without.pieces and expansion.new_tokens == without.new_tokens
    assert (expansion.report["first_new_id"], without.report["first_new_id"]) == (first, base.vocab_size)
    assert expansion.at(10).vocab_size == first + 10 + len(MARKERS)


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=100, deadline=None)
@given(text=mixed)
def test_no_text_makes_an_unused_id(kind: str, text: str) -> None:
    base = made(kind)[0]
    first, expansion = made_with_gap(kind)
    gap = range(base.vocab_size, first)
    names = [str(expansion.tokenizer.token(i)) for i in gap]
    for line in (text, text + names[0], " ".join(names)):
        ids = expansion.tokenizer.encode(line, specials=False)
        assert not set(gap).intersection(ids)
        assert expansion.tokenizer.decode(ids) == line


@pytest.mark.parametrize("kind", BASES)
def test_auto_tokenizer_lives_with_the_gap(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = made(kind)[0]
    first, expansion = made_with_gap(kind)
    new = expansion.tokenizer
    assert save_expanded(new, tmp_path, tmp_path / "new") == ["tokenizer.json"]
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert len(auto) == new.vocab_size == max(auto.get_vocab().values()) + 1
    assert auto.convert_ids_to_tokens([base.vocab_size, first - 1]) == [
        f"<unused {base.vocab_size}>",
        f"<unused {first - 1}>",
    ]
    assert auto.convert_tokens_to_ids(MARKERS) == list(range(new.vocab_size - 3, new.vocab_size))
    for text in [*THAI[:5], *ENGLISH, "<EN> a <TH>ไทย", "<unused 400>"]:
        assert auto(text, add_special_tokens=False).input_ids == new.encode(text)
    assert auto.add_tokens(["<more>"]) == 1 and auto.convert_tokens_to_ids("<more>") == new.vocab_size


def test_a_first_id_among_the_base_s_is_refused() -> None:
    base = made("smollm2")[0]
    with pytest.raises(UserError, match=f"cannot begin at {base.vocab_size - 1}.*up to {base.vocab_size - 1}"):
        expand(base, THAI, size=SIZE, markers=MARKERS, first_id=base.vocab_size - 1)
    assert gapped(base, 0)[1].tokenizer.fingerprint == made("smollm2")[1].tokenizer.fingerprint


def test_ids_with_gaps_of_the_base_s_own() -> None:
    state = json.loads(made("llama3")[0].backend.to_str())
    size = len(state["model"]["vocab"])
    state["model"]["vocab"]["zq"] = size + 10
    base = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), {}, None, "gaps")
    with pytest.raises(UserError, match="gaps"):
        expand(base, THAI, size=SIZE, markers=MARKERS)


def test_markers_behind_padding_rows() -> None:
    base = made("smollm2")[0]
    new, _ = with_markers(base, ["<A>", "<B>"], first_id=base.vocab_size + 3)
    assert [new.token_id(m) for m in ("<A>", "<B>")] == [base.vocab_size + 3, base.vocab_size + 4]
    assert new.vocab_size == base.vocab_size + 5


def test_nfc_goes_on() -> None:
    base = qwen()
    new = expand(base, THAI, size=SIZE, markers=MARKERS).tokenizer
    for text in ("cafe\u0301 e\u0301", "the cafe\u0301 ไทย"):
        assert new.encode(text) == new.encode(text.replace("e\u0301", "é"))
    assert new.encode("cafe\u0301") == base.encode("cafe\u0301") == base.encode("café")
    # Nikhahit and sara aa in one: NFC leaves them apart, and so do runs.
    assert new.decode(new.encode("น้ํา นำ้")) == "น้ํา นำ้"


@pytest.mark.parametrize("kind", ["smollm2", "llama3", "cuts_inside_characters"])
@settings(max_examples=100, deadline=None)
@given(text=mixed, more=no_thai)
def test_without_specials_text_is_text(kind: str, text: str, more: str) -> None:
    new = made(kind)[1].tokenizer
    names = [*MARKERS, *new.special_tokens]
    line = f"{text}{names[len(text) % len(names)]}{more}{names[len(more) % len(names)]}"
    ids = new.encode(line, specials=False)
    assert not set(new.special_tokens.values()).intersection(ids)
    assert new.decode(ids) == line
    assert new.encode_batch([line, more], specials=False) == [ids, new.encode(more, specials=False)]
    # The other way round is as before, and asking the one way does not change the other.
    assert set(new.special_tokens.values()).intersection(new.encode(line))
    assert new.encode_batch([line]) == [new.encode(line)]
    if new.find_special(text) is None:
        assert new.encode(text, specials=False) == new.encode(text)


def test_a_marker_that_text_can_spell_is_refused() -> None:
    base = made("llama3")[0]
    state = json.loads(base.backend.to_str())
    state["model"]["ignore_merges"] = True  # as LLaMA-3: a word that is in the vocabulary is never cut
    whole = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), base.config, None, "whole")
    with pytest.raises(UserError, match=r"\['EN'\] are words that text can spell"):
        expand(whole, THAI, size=SIZE, markers=["EN", "<TH>"])
    expansion = expand(whole, THAI, size=120, markers=MARKERS)
    counts = Counter(i for ids in expansion.tokenizer.encode_batch(THAI) for i in ids)
    rare = {i for i in range(base.vocab_size, base.vocab_size + 120) if counts[i] < 2}
    assert all(not ends_between_characters(str(expansion.tokenizer.token(i))) for i in rare)
    assert len(rare) == expansion.report["parts_of_characters"] == expansion.report["never_produced"]
