"""GGUF files that we write: read back, tensors and token ids are those of the source."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tokenizer
from conftest import random_weights
from gguf import GGMLQuantizationType as Kind
from tiny_families import FAMILIES
from tiny_gguf import rope_factors as their_factors
from tiny_sentencepiece import build_tiny_sentencepiece

from transllm_jax.conversion.gguf.header import read_header
from transllm_jax.conversion.gguf.tokenizer import HF_JSON, write_tokenizer
from transllm_jax.conversion.gguf.weights import gguf_name, open_gguf
from transllm_jax.conversion.gguf.write import TYPES, kind_of, write_gguf
from transllm_jax.conversion.gguf.write_config import config_notes, rope_factors
from transllm_jax.conversion.gguf.write_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, tokenizer_fields
from transllm_jax.conversion.hf.directory import open_hf, write_model
from transllm_jax.conversion.names import EMBEDDING, tensors
from transllm_jax.errors import UserError
from transllm_jax.model.rope import RopeScaling
from transllm_jax.tokenizer.growing.expand import expand
from transllm_jax.tokenizer.tokenizer import Tokenizer

THAI = [
    "เมืองหลวงของประเทศไทยคือกรุงเทพ",
    "ผึ้งทำน้ำผึ้ง และ น้ำผึ้งหวาน",
    "ประเทศไทยมีน้ำผึ้งที่หวาน ๑๒ ขวด",
    "เมืองหลวงของประเทศลาวคือเวียงจันทน์",
] * 3
MARKERS = ["<EN>", "<RESPONSE>", "<TH>"]
TEXTS = [
    *THAI[:4],
    "the quick  brown fox's tail\n\n    def area(width): 12,345",
    "<EN>the capital of France<RESPONSE>Paris<TH>เมืองหลวง ของฝรั่งเศส",
    "mixed ไทย text, น้ำ\tผึ้ง! ½ 🙂 \u200d",
    "",
]
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
WRITTEN = {
    "llama2": FAMILIES["llama2"],
    "llama3": replace(FAMILIES["llama3-tied"], rope_scaling=LLAMA3, rope_theta=1e6),
    "linear": FAMILIES["llama-linear"],
    "biases": FAMILIES["llama-biases"],
    "heads": FAMILIES["smollm2"],
    "mistral-window": FAMILIES["mistral-window"],
    "qwen2": FAMILIES["qwen2"],
    "qwen3": FAMILIES["qwen3"],
}


def directory_of(place: Path, config: Any, dtype: str) -> Path:
    write_model(place, config, random_weights(config), dtype=dtype, extra_config={"eos_token_id": 2})
    return place


def fields_of(config: Any) -> dict[str, Any]:
    return {"tokenizer.ggml.tokens": [f"t{i}" for i in range(config.vocab_size)], "general.name": "tiny"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", WRITTEN)
def test_every_bit_comes_back(tmp_path: Path, name: str, dtype: str) -> None:
    source = open_hf(directory_of(tmp_path / "hf", WRITTEN[name], dtype))
    write_gguf(tmp_path / "a.gguf", source, fields_of(source.config))
    found = open_gguf(tmp_path / "a.gguf")
    assert found.config == source.config
    for tensor in tensors(source.config):
        given, back = source.read(tensor), found.read(tensor)
        if given.ndim == 1:  # norms and biases are float32, which holds the others exactly
            given = given.astype(np.float32)
        assert back.dtype == given.dtype and back.tobytes() == given.tobytes(), tensor.name
    assert found.fields["general.name"] == "tiny"


def test_rows_are_in_the_order_of_llama_cpp_and_divisors_its_own(tmp_path: Path) -> None:
    config = WRITTEN["llama3"]
    source = open_hf(directory_of(tmp_path / "hf", config, "float32"))
    write_gguf(tmp_path / "a.gguf", source, fields_of(config))
    found = open_gguf(tmp_path / "a.gguf")
    q = next(tensor for tensor in tensors(config) if tensor.name.endswith("q_proj.weight"))
    stored = found.stored[gguf_name(q.name)]
    raw = np.fromfile(found.path, np.float32, int(np.prod(q.shape)), offset=stored.offset).reshape(q.shape)
    ours, half = source.read(q), config.head_dim // 2
    assert np.array_equal(raw[:4], ours[[0, half, 1, half + 1]])
    ours_factors = rope_factors(config)
    assert ours_factors is not None
    np.testing.assert_allclose(ours_factors, their_factors(config), rtol=1e-6)
    assert rope_factors(WRITTEN["llama2"]) is None


@pytest.mark.parametrize("name", [name for name in TYPES if name.startswith("q")])
def test_quantised_types(tmp_path: Path, name: str) -> None:
    config = replace(FAMILIES["llama2"], hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
    source = open_hf(directory_of(tmp_path / "hf", config, "float32"))
    write_gguf(tmp_path / "a.gguf", source, fields_of(config), kind_of(name))
    found = open_gguf(tmp_path / "a.gguf")
    bits = int(name[1])
    for tensor in tensors(config):
        kind = found.stored[gguf_name(tensor.name)].kind
        given, back = source.read(tensor), found.read(tensor)
        if given.ndim == 1:
            assert kind is Kind.F32 and np.array_equal(given, back)
            continue
        table = tensor.name in (EMBEDDING, "lm_head.weight")
        assert kind is (Kind.Q8_0 if table else Kind[name.upper()])
        # A block of 32 is cut into 2**bits steps between its extremes; tables into 256.
        step = np.abs(given).max() * 2 / (2 ** (8 if table else bits) - 2)
        assert 0 < np.abs(given - back).max() <= step * (1.1 if name.endswith("0") else 0.6)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"only llama.cpp quantises to it; .* llama-quantize IN.gguf OUT.gguf Q4_K_M"):
        kind_of("q4_k_m")
    with pytest.raises(UserError, match="there is no type int3; use one of f32, f16"):
        kind_of("int3")
    assert kind_of("F16") is Kind.F16 and kind_of(None) is None
    source = open_hf(directory_of(tmp_path / "hf", FAMILIES["llama2"], "float32"))
    with pytest.raises(UserError, match="needs a multiple of 32; use --type f16"):
        write_gguf(tmp_path / "a.gguf", source, {}, Kind.Q8_0)
    assert not (tmp_path / "a.gguf").exists()
    large = random_weights(FAMILIES["llama2"])
    large["final_norm.scale"][0], large["vocabulary.base"][3, 3] = 1e5, 1e5
    write_model(tmp_path / "large", FAMILIES["llama2"], large, extra_config={"eos_token_id": 2})
    with pytest.raises(UserError, match=r"embed_tokens.weight .* too large for F16; use --type bf16"):
        write_gguf(tmp_path / "b.gguf", open_hf(tmp_path / "large"), fields_of(FAMILIES["llama2"]), Kind.F16)
    with pytest.raises(UserError, match="sliding window of 5 tokens in a model of the family qwen2"):
        config_notes(FAMILIES["qwen2-window"])
    assert config_notes(FAMILIES["llama2"]) == []
    assert "has no dynamic RoPE scaling" in config_notes(FAMILIES["llama-dynamic"])[0]
    assert "ignores the model's sliding window" in config_notes(FAMILIES["mistral-window"])[0]


def grown(place: Path, kind: str, texts: list[str] = THAI, size: int = 40, **options: Any) -> Tokenizer:
    """A tiny base of a kind with new Thai tokens and the markers."""
    if kind == "sentencepiece":
        base = Tokenizer.load(build_tiny_sentencepiece(place))
    else:
        base = Tokenizer.load(tiny_tokenizer.build_tiny_tokenizer(place))
    return expand(base, texts, size=size, markers=MARKERS, **options).tokenizer


def back(fields: dict[str, Any], place: Path, *, json_too: bool) -> Tokenizer:
    """The tokenizer that our reader makes of fields."""
    place.mkdir()
    fields = {"tokenizer.chat_template": "{{ messages }}", "general.architecture": "llama", **fields}
    if not json_too:
        del fields[HF_JSON]
    write_tokenizer(fields, place, "a.gguf")
    return Tokenizer.load(place)


@pytest.mark.parametrize("json_too", [True, False], ids=["json", "fields"])
@pytest.mark.parametrize("kind", ["sentencepiece", "base"])
def test_ids_come_back(tmp_path: Path, kind: str, json_too: bool) -> None:
    """From tokenizer.json in the file, and from the fields alone, which are what llama.cpp reads."""
    tokenizer = grown(tmp_path / "base", kind, **({} if kind == "sentencepiece" else {"cuts": "base"}))
    written = tokenizer_fields(tokenizer, tokenizer.vocab_size + 2, visible=MARKERS)
    assert written.notes == []
    found = back(written.fields, tmp_path / "back", json_too=json_too)
    assert [found.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert found.bos_ids == tokenizer.bos_ids and found.eos_id == tokenizer.eos_id
    tokens, types = (written.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    assert [types[tokenizer.token_id(marker) or 0] for marker in MARKERS] == [USER_DEFINED] * 3
    assert types[tokenizer.eos_id] == CONTROL and types[tokenizer.encode("ผึ้ง")[-1]] == NORMAL
    assert tokens[-2:] == [f"[PAD{len(tokens) - 2}]", f"[PAD{len(tokens) - 1}]"] and types[-2:] == [UNUSED] * 2
    # What the markers are to us is in the file too: special, so that text never becomes one.
    if json_too:
        assert found.special_tokens == tokenizer.special_tokens
        assert found.encode("<TH>", specials=False) == tokenizer.encode("<TH>", specials=False)


def by_length(text: str, tokens: list[str], types: list[int]) -> list[int | str]:
    """llama.cpp's first step: user-defined tokens and the texts between them. Longest first, anywhere in the text."""
    parts: list[int | str] = [text]
    order = sorted((i for i, kind in enumerate(types) if kind == USER_DEFINED), key=lambda i: -len(tokens[i].encode()))
    for number in order:
        parts = [
            piece
            for part in parts
            for piece in (
                [part]
                if isinstance(part, int)
                else [
                    number if piece == tokens[number] else piece
                    for piece in re.split(f"({re.escape(tokens[number])})", part)
                ]
            )
            if piece != ""
        ]
    return parts


def test_runs_that_are_kept_whole(tmp_path: Path) -> None:
    # Few letters, so that the new tokens are not only letters.
    here = ["ที่นี่มีที่ ที่นี่ มีที่นี่"] * 4
    tokenizer = grown(tmp_path / "base", "byte-level", here, 6, cuts="whole")
    written = tokenizer_fields(tokenizer, tokenizer.vocab_size, visible=MARKERS)
    assert len(written.notes) == 1 and "finds" in written.notes[0] and "cuts: base" in written.notes[0]
    found = back(written.fields, tmp_path / "back", json_too=True)
    assert [found.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    tokens, types = (written.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    across = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    # Text, not bytes in letters. Of the new tokens only this one has a sign after a letter, where llama.cpp cuts.
    assert set(across) == {*MARKERS, "ที"}
    number = next(i for i, token in enumerate(tokens) if token == "ที")
    assert by_length("<TH>มที", tokens, types) == [tokenizer.token_id("<TH>"), "ม", number]
    assert tokenizer.encode("มที")[-1] == number
    assert written.fields["tokenizer.ggml.pre"] == "smollm"
    assert tokenizer_fields(tokenizer, tokenizer.vocab_size, pre="gpt-2").fields["tokenizer.ggml.pre"] == "gpt-2"


def test_tokenizers_that_cannot_be_written(tmp_path: Path) -> None:
    tokenizer = grown(tmp_path / "base", "byte-level", cuts="base")
    with pytest.raises(UserError, match=r"has ids up to .*, the model has 400 rows"):
        tokenizer_fields(tokenizer, 400)
    state = json.loads(tokenizer.backend.to_str())
    state["pre_tokenizer"]["pretokenizers"][0] = {
        "type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    other = tokenizer.derived(type(tokenizer.backend).from_str(json.dumps(state)))
    with pytest.raises(
        UserError, match=r"none that GGUF is written with here; give llama.cpp's name for it with --pre"
    ):
        tokenizer_fields(other, other.vocab_size)
    assert tokenizer_fields(other, other.vocab_size, pre="mine").fields["tokenizer.ggml.pre"] == "mine"
    pieces = grown(tmp_path / "pieces", "sentencepiece")
    with pytest.raises(UserError, match="which has no pre-tokenizer"):
        tokenizer_fields(pieces, pieces.vocab_size, pre="mine")
    state = json.loads(pieces.backend.to_str())
    left, right = state["model"]["merges"].pop(30)
    broken = pieces.derived(type(pieces.backend).from_str(json.dumps(state)))
    with pytest.raises(UserError, match=re.escape(f"leave out {left!r} + {right!r}")):
        tokenizer_fields(broken, broken.vocab_size)


def test_a_tokenizer_json_that_disagrees_is_refused(tmp_path: Path) -> None:
    tokenizer = grown(tmp_path / "base", "byte-level", cuts="base")
    fields = tokenizer_fields(tokenizer, tokenizer.vocab_size).fields
    swapped = list(fields["tokenizer.ggml.tokens"])
    swapped[300], swapped[301] = swapped[301], swapped[300]
    for number, (changes, said) in enumerate(
        [
            ({"tokenizer.ggml.tokens": swapped}, "token 300 is"),
            ({HF_JSON: "{"}, "cannot be read"),
            ({HF_JSON: 3}, "cannot be read"),
            ({name: fields[name][:-1] for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")}, "lacks"),
        ]
    ):
        with pytest.raises(UserError, match=said):
            back({**fields, **changes}, tmp_path / str(number), json_too=True)


def test_special_tokens_of_a_sentencepiece_base(tmp_path: Path) -> None:
    tokenizer = grown(tmp_path / "base", "sentencepiece")
    fields = tokenizer_fields(tokenizer, tokenizer.vocab_size).fields
    names = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")}
    assert names == {"unknown": 0, "bos": 1, "eos": 2}
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_space_prefix"] is True
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6]
    # New pieces score below all of the base.
    scores, first = fields["tokenizer.ggml.scores"], tokenizer.token_id("<EN>") or 0
    made = [score for score in scores[first - 40 : first] if score]
    assert made and max(made) < min(scores[: first - 40])
    metaspace = Tokenizer.load(build_tiny_sentencepiece(tmp_path / "first", metaspace=True))
    written = tokenizer_fields(metaspace, metaspace.vocab_size)
    assert written.fields["tokenizer.ggml.add_space_prefix"] is False
    assert "only at the very beginning" in written.notes[0]


def test_the_header_is_that_of_the_format(tmp_path: Path) -> None:
    source = open_hf(directory_of(tmp_path / "hf", FAMILIES["qwen3"], "bfloat16"))
    write_gguf(tmp_path / "a.gguf", source, fields_of(source.config))
    fields, stored = read_header(tmp_path / "a.gguf")
    assert fields["general.architecture"] == "qwen3" and fields["general.file_type"] == 32
    assert {tensor.offset % 32 for tensor in stored.values()} == {0}
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(data[:-1])
    with pytest.raises(UserError, match="truncated or not a GGUF file"):
        open_gguf(tmp_path / "short.gguf")
