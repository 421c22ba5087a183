"""GGUF files: the tokenizer, byte-level BPE and SentencePiece BPE, from the file's fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import CONTROL, MERGES, TEMPLATE, TEXTS, tokens
from tokenizers import Tokenizer

from transllm_jax.conversion.gguf.tokenizer import write_tokenizer
from transllm_jax.errors import UserError


def _fields(**changes: Any) -> dict[str, Any]:
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens(),
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(tokens()) - len(CONTROL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    return fields | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def _built(directory: Path, **changes: Any) -> Tokenizer:
    write_tokenizer(_fields(**changes), directory, "m.gguf")
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def test_the_tokenizer_merges_and_keeps_special_tokens_whole(tmp_path: Path) -> None:
    tokenizer = _built(tmp_path)
    assert tokenizer.encode("hello hello").tokens == ["hello", "Ġhello"]
    assert tokenizer.encode("<|im_start|>hello<|im_end|>").ids == [1, tokens().index("hello"), 2]
    # Digits stand alone, so the spaces before one stay together (GPT-2's own pattern would part them).
    assert tokenizer.encode("h  12").tokens == ["h", "ĠĠ", "1", "2"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_other_pre_tokenizers(tmp_path: Path) -> None:
    assert _built(tmp_path, pre="gpt-2").encode("h  12").tokens == ["h", "Ġ", "Ġ", "1", "2"]
    extra = [*tokens(), "12", "zz"]
    types = [3] * len(CONTROL) + [1] * (len(extra) - len(CONTROL))
    llama = _built(tmp_path, pre="llama-bpe", tokens=extra, token_type=types)
    # A beginning token unless the file says otherwise; a word of the vocabulary needs no merges.
    assert llama.encode("zz").tokens == ["<|im_start|>", "zz"]
    assert llama.encode("121212").tokens == ["<|im_start|>", *"121212"]
    without = _built(tmp_path, pre="llama-bpe", tokens=extra, token_type=types, add_bos_token=False)
    assert without.encode("zz").tokens == ["zz"]


def test_user_defined_tokens_are_whole_but_not_special(tmp_path: Path) -> None:
    types = [3, 3, 3, *[1] * (len(tokens()) - 3), 4]
    tokenizer = _built(tmp_path, tokens=[*tokens(), "<think>"], token_type=types)
    ids = tokenizer.encode("h<think>h").ids
    assert ids[1] == len(tokens()) and len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "h<think>h"


def test_fields_of_a_tokenizer_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="add_eos_token"):
        _built(tmp_path, add_eos_token=True)
    fields = _fields(add_bos_token=True)
    del fields["tokenizer.ggml.bos_token_id"]
    with pytest.raises(UserError, match=r"no tokenizer\.ggml\.bos_token_id"):
        write_tokenizer(fields, tmp_path, "m.gguf")


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@pytest.mark.parametrize(
    ("pre", "normalizer", "pattern", "ignore_merges"),
    [
        ("qwen2", {"type": "NFC"}, QWEN2, False),
        ("qwen35", {"type": "NFC"}, QWEN35, False),
        ("llama-bpe", None, LLAMA3, True),
    ],
)
def test_the_rule_is_that_of_the_published_tokenizers(
    tmp_path: Path, pre: str, normalizer: Any, pattern: str, ignore_merges: bool
) -> None:
    """As in the tokenizer.json of Qwen2, Qwen2.5 and Qwen3, of Qwen3.5, and of LLaMA 3."""
    _built(tmp_path, pre=pre)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    split, byte_level = raw["pre_tokenizer"]["pretokenizers"]
    assert (split["pattern"], split["behavior"], split["invert"]) == ({"Regex": pattern}, "Isolated", False)
    assert (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]) == ("ByteLevel", False, False)
    assert raw["normalizer"] == normalizer and raw["model"]["ignore_merges"] == ignore_merges


def test_qwen2(tmp_path: Path) -> None:
    extra = [*tokens(), "12", "Ã©", "<think>", "[PAD300]"]
    types = [3] * len(CONTROL) + [1] * (len(extra) - len(CONTROL) - 2) + [4, 5]
    merges = [*MERGES, "1 2", "Ã ©"]
    tokenizer = _built(tmp_path, pre="qwen2", tokens=extra, token_type=types, merges=merges)
    # Digits one by one, no token before the text, a letter and its accent composed.
    assert tokenizer.encode("h12").tokens == ["h", "1", "2"]
    assert tokenizer.encode("he\u0301").tokens == ["h", "Ã©"]
    assert tokenizer.encode("<|im_start|>h<think>").tokens == ["<|im_start|>", "h", "<think>"]
    assert tokenizer.get_vocab_size() == len(extra)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_qwen2_agrees_with_transformers(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    ours = _built(tmp_path, pre="qwen2")
    vocabulary = {token: number for number, token in enumerate(tokens())}
    theirs = Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in MERGES])
    # Qwen2Tokenizer was not told of the special tokens.
    plain = [text for text in TEXTS if "<|" not in text]
    for text in [*plain, "e\u0301 ก\u0e4d\u0e32 \u1100\u1161 DON'T\r\n\r\n  a1b22"]:
        assert ours.encode(text).ids == theirs.encode(text), text


PIECES = [
    ("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3),
    *[(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)],
    ("▁a", -1.0, 1), ("ab", 0.0, 1), ("▁▁", -2.0, 1),
    ("▁", -3.0, 1), ("a", -4.0, 1), ("b", -5.0, 1),
    ("<|im_start|>", -1000.0, 3), ("<think>", -1000.0, 4), ("[PAD268]", -10000.0, 5),
]  # fmt: skip


def _sentencepiece(directory: Path, **changes: Any) -> Tokenizer:
    names, scores, types = (list(column) for column in zip(*PIECES, strict=True))
    given = {"model": "llama", "pre": "default", "tokens": names, "scores": scores, "token_type": types, "merges": None}
    return _built(directory, **given | changes)


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = _sentencepiece(tmp_path)
    # llama.cpp puts BOS before every text of this kind unless the file says otherwise.
    assert tokenizer.encode("ab a").tokens == ["<s>", "▁", "ab", "▁a"]
    assert tokenizer.encode("  ก").tokens == ["<s>", "▁▁", "▁", "<0xE0>", "<0xB8>", "<0x81>"]
    assert tokenizer.encode("<|im_start|>a<think></s>").tokens == ["<s>", "<|im_start|>", "▁a", "<think>", "</s>"]
    assert tokenizer.encode("[PAD268]").tokens[1] == "▁"
    assert tokenizer.get_vocab_size() == len(PIECES)
    for text in ("ab a", " ab\n🙂 ", "a<think>", ""):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["tokenizer_class"]) == (
        "<s>",
        "</s>",
        "PreTrainedTokenizerFast",
    )


def test_sentencepiece_without_what_goes_before_a_text(tmp_path: Path) -> None:
    assert _sentencepiece(tmp_path, add_bos_token=False).encode("ab").tokens == ["▁", "ab"]
    tokenizer = _sentencepiece(tmp_path, add_space_prefix=False)
    assert tokenizer.encode("ab a").tokens == ["<s>", "ab", "▁a"]
    assert tokenizer.decode(tokenizer.encode(" a").ids) == " a"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scores": None}, r"tokenizer\.ggml\.scores is missing"),
        ({"scores": [0.0]}, "different lengths"),
        ({"scores": [-1000.0] * len(PIECES)}, "pieces '▁a', 'ab' have the score of another piece"),
        ({"token_type": [1 if kind == 6 else kind for *_, kind in PIECES]}, "character that is not a piece"),
        ({"token_type": [5 if name == "ab" else kind for name, _, kind in PIECES]}, "'ab' are of type unused"),
        ({"token_type": [6 if name == "ab" else kind for name, _, kind in PIECES]}, "byte pieces"),
        ({"token_type": [9 if name == "ab" else kind for name, _, kind in PIECES]}, "type 9"),
        ({"token_type": [2 if name == "ab" else kind for name, _, kind in PIECES]}, "2 unknown pieces"),
        ({"remove_extra_whitespaces": True, "add_eos_token": True}, "add_eos_token, tokenizer.ggml.remove_extra"),
        ({"model": "t5"}, "type 't5', only 'gpt2'"),
    ],
)
def test_sentencepiece_that_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        _sentencepiece(tmp_path, **changes)
    assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)
    assert not list(tmp_path.iterdir())
