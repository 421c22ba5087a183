"""New tokens within the base's own cuts: what knows only the base's pre-tokenizer, as llama.cpp does, reads them."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from test_expand import BASES, ENGLISH, LLAMA3_PATTERN, MARKERS, THAI, made, mixed, no_thai
from test_expand import _byte_level as byte_level
from tokenizers import Regex, models, pre_tokenizers

from transllm_jax.choices import Cuts
from transllm_jax.conversion.gguf.tokenizer import write_tokenizer
from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.atoms import ends_between_characters
from transllm_jax.tokenizer.growing.expand import Expansion, expand, expansion_of
from transllm_jax.tokenizer.llama_cpp import REBUILT, has_own_cuts, misread_message, readers_of
from transllm_jax.tokenizer.tokenizer import Tokenizer

SIZE = 130
# Signs that touch a word, which the bases write as bytes; and a frequent pair of letters beside Thai.
TOUCHING = [f"“{line}”…{line}… xqไทยxq (“ไทย”)" for line in THAI]


@functools.lru_cache
def cut(kind: str, cuts: Cuts) -> tuple[Tokenizer, Expansion]:
    base = made(kind)[0]
    return base, expand(base, [*THAI, *TOUCHING], size=SIZE, markers=MARKERS, cuts=cuts)


def as_llama_cpp(base: Tokenizer, new: Tokenizer, text: str) -> list[int]:
    """Ids by the new vocabulary and merges, of each word alone that the base's own pre-tokenizer cuts."""
    model = json.loads(new.backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = tokenizers.Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, ignore_merges=model["ignore_merges"]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    places = [place for _, place in base.backend.pre_tokenizer.pre_tokenize_str(text)]
    return [number for first, last in places for number in bpe.encode(text[first:last]).ids]


@pytest.mark.parametrize("kind", BASES)
def test_what_knows_the_base_alone_reads_the_ids(kind: str) -> None:
    base, expansion = cut(kind, "base")
    new = expansion.tokenizer
    before, after = (json.loads(t.backend.to_str()) for t in (base, new))
    assert before["pre_tokenizer"] == after["pre_tokenizer"] and before["normalizer"] == after["normalizer"]
    for text in [*THAI, *TOUCHING, *ENGLISH]:
        assert new.encode(text) == as_llama_cpp(base, new, text)
        assert new.decode(new.encode(text)) == text
    assert expansion.report["tokens_per_character_after"] < 0.8 * expansion.report["tokens_per_character_before"]


@pytest.mark.parametrize("kind", ["smollm2", "gpt2_without_thai", "llama3"])
def test_whole_runs_are_read_otherwise_and_take_fewer_tokens(kind: str) -> None:
    (base, whole), (_, within) = cut(kind, "whole"), cut(kind, "base")
    trained = whole.tokenizer.encode_batch(THAI)
    other = [as_llama_cpp(base, whole.tokenizer, text) for text in THAI]
    assert sum(a != b for a, b in zip(trained, other, strict=True)) >= 0.9 * len(THAI)
    assert sum(map(len, trained)) < sum(map(len, within.tokenizer.encode_batch(THAI))) < sum(map(len, other))


@pytest.mark.parametrize("kind", BASES)
def test_new_tokens_hold_the_script_alone_and_are_used(kind: str) -> None:
    base, expansion = cut(kind, "base")
    for name in expansion.new_tokens[:SIZE]:
        assert all(0xE00 <= ord(c) < 0xE80 or c == "\ufffd" for c in name.removeprefix(" ")), name
    counts = Counter(i for ids in expansion.tokenizer.encode_batch([*THAI, *TOUCHING]) for i in ids)
    ids = range(base.vocab_size, base.vocab_size + SIZE)
    whole = [i for i in ids if ends_between_characters(str(expansion.tokenizer.token(i)))]
    assert len(whole) > 0.8 * SIZE and [i for i in whole if counts[i] < 2] == []


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=100, deadline=None)
@given(text=no_thai)
def test_text_without_the_script_keeps_its_ids(kind: str, text: str) -> None:
    base, expansion = cut(kind, "base")
    for some in (text, f"“{text}”… (“x”)", f"xq{text}xq"):
        if expansion.tokenizer.find_special(some) is None:
            assert expansion.tokenizer.encode(some) == base.encode(some)


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=60, deadline=None)
@given(text=mixed)
def test_any_text_is_read_so(kind: str, text: str) -> None:
    base, expansion = cut(kind, "base")
    new = expansion.tokenizer
    if new.find_special(text) is None:
        assert new.encode(text) == as_llama_cpp(base, new, text) and new.decode(new.encode(text)) == text


def test_the_report_says_who_reads_the_ids() -> None:
    for cuts, reading in (("whole", "other ids"), ("base", "as trained")):
        report = cut("llama3", cuts)[1].report
        assert report["cuts"] == cuts and report["passes_for_base"] is True
        assert report["readers"] == {"transformers": "as trained", "vllm": "as trained", "llama.cpp": reading}
        base, expansion = cut("llama3", cuts)
        again = expansion_of(base, expansion.tokenizer, MARKERS, first_id=base.vocab_size)
        assert again.report["readers"] == report["readers"]
    # The text by which llama.cpp's converter knows a pre-tokenizer has Khmer in it.
    khmer = ["កាន់តែពិសេសអាច ភាសាខ្មែរ", "ភាសាខ្មែរ កាន់តែពិសេស"] * 3
    found = expand(made("llama3")[0], khmer, size=22, language="km", markers=["<EN>", "<KM>"], cuts="base")
    assert found.report["passes_for_base"] is False and found.report["readers"]["llama.cpp"] == "as trained"


QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")


def qwen2_base(directory: Path) -> Path:
    steps = [pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return byte_level(directory, steps, ENGLISH + THAI[:2])


def beside_config(directory: Path, model_type: str) -> Path:
    """The directory, with a config.json of this kind of model in it."""
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return directory


def test_a_stand_in_is_named_where_llama_cpp_has_one(tmp_path: Path) -> None:
    base = Tokenizer.load(qwen2_base(tmp_path))
    whole, within = (expand(base, THAI, size=SIZE, markers=MARKERS, cuts=cuts) for cuts in ("whole", "base"))
    assert (whole.report["llama_cpp_stand_in"], within.report["llama_cpp_stand_in"]) == ("qwen35", None)
    assert cut("llama3", "whole")[1].report["llama_cpp_stand_in"] is None
    # Qwen3.5's pattern, as in its tokenizer.json: marks go with letters.
    state = json.loads(base.backend.to_str())
    pattern = QWEN2_PATTERN.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    other = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), {}, None, "")
    texts = [text for text in THAI if "๒" not in text]  # digits are cut there, and "ฯ" is a letter
    assert [as_llama_cpp(other, whole.tokenizer, text) for text in texts] == whole.tokenizer.encode_batch(texts)
    assert len(texts) == 18


@pytest.mark.parametrize("kind", BASES)
def test_a_tokenizer_json_with_cuts_of_its_own_is_known(kind: str) -> None:
    base = made(kind)[0]
    states = [json.loads(t.backend.to_str()) for t in (base, *(cut(kind, c)[1].tokenizer for c in ("whole", "base")))]
    assert [has_own_cuts(state) for state in states] == [False, True, False]
    bloom = {"type": "Split", "pattern": {"Regex": r" ?[^(\s|[.,!?…。，、।۔،])]+"}}
    assert not has_own_cuts({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [bloom]}})
    assert not has_own_cuts({"pre_tokenizer": None}) and not has_own_cuts({"pre_tokenizer": {"type": "ByteLevel"}})


def as_gguf(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """The fields that llama.cpp's converter writes."""
    state = json.loads(tokenizer.backend.to_str())
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in tokenizer.special_tokens else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "chat_template": "{{ messages }}",
        "add_bos_token": False,
    }
    return {f"tokenizer.{'' if name == 'chat_template' else 'ggml.'}{name}": value for name, value in fields.items()}


@pytest.mark.parametrize(("kind", "pre"), [("smollm2", "smollm"), ("llama3", "llama-bpe")])
def test_a_gguf_file_is_read_only_where_its_pre_tokenizer_made_its_tokens(tmp_path: Path, kind: str, pre: str) -> None:
    for tokenizer in (cut(kind, "base")[1].tokenizer, made(kind)[0]):
        write_tokenizer(as_gguf(tokenizer, pre), tmp_path, "m.gguf")
        texts = [*THAI, *TOUCHING, *ENGLISH]
        assert Tokenizer.load(tmp_path).encode_batch(texts) == tokenizer.encode_batch(texts)
    said = rf"m\.gguf: .* '{pre}' .* never makes \d\d of the last \d+ tokens, such as .* Hugging Face directory"
    whole = expand(made(kind)[0], [*THAI, *TOUCHING], size=180, markers=MARKERS, cuts="whole").tokenizer
    with pytest.raises(UserError, match=said):
        write_tokenizer(as_gguf(whole, pre), tmp_path, "m.gguf")


def test_transformers_makes_some_pre_tokenizers_by_itself(tmp_path: Path) -> None:
    """Beside the config.json of a Qwen2 model, AutoTokenizer reads past tokenizer.json: there the base's cuts stay."""
    transformers = pytest.importorskip("transformers")
    base = Tokenizer.load(beside_config(qwen2_base(tmp_path / "base"), "qwen2"))
    for cuts, same in ((None, True), ("base", True), ("whole", False)):
        found = expand(base, THAI, size=SIZE, markers=["<EN>", "<TH>"], cuts=cuts)  # type: ignore[arg-type]
        directory = tmp_path / str(cuts)
        found.tokenizer.save(directory)
        theirs = transformers.AutoTokenizer.from_pretrained(beside_config(directory, "qwen2"))
        ids = [theirs.encode(text, add_special_tokens=False) for text in THAI]
        assert (ids == found.tokenizer.encode_batch(THAI)) == same
        assert found.report["cuts"] == ("base" if same else "whole")
        wanted = dict.fromkeys(("transformers", "vllm", "llama.cpp"), "as trained" if same else "other ids")
        assert found.report["readers"] == readers_of(directory) == wanted
        assert (misread_message(directory) is None) == same
    assert "of a qwen2 model they take the base's pre-tokenizer" in str(misread_message(directory))


@pytest.mark.reference
def test_the_kinds_of_model_that_transformers_rebuilds_are_known() -> None:
    auto = pytest.importorskip("transformers.models.auto.tokenization_auto")
    ours = {"llama", "mistral", "qwen2", "qwen3"}
    assert {kind for kind in ours if kind in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS} == REBUILT
