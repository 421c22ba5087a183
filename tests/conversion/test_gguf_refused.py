"""GGUF files that are not what they should be: each is refused in one line, and nothing is left behind."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tiny_gguf import add, drop, field, hf_weights, put, remove, replace, rope_factors, tiny_config, tokens, write_gguf

from transllm_jax.conversion.gguf.weights import open_gguf
from transllm_jax.conversion.import_base import import_base
from transllm_jax.errors import UserError
from transllm_jax.model.rope import RopeScaling


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("blk.1.attn_q.weight"), "missing: blk.1.attn_q.weight"),
        (drop("token_embd.weight"), "token_embd.weight"),
        (
            add("blk.0.attn_q.bias", (64,)),
            r"missing: blk\.\{0,1\}\.attn_k\.bias, blk\.\{0,1\}\.attn_output\.bias, blk\.1\.attn_q\.bias",
        ),
        (add("blk.0.ffn_gate_inp.weight", (64,)), "not part of the model: blk.0.ffn_gate_inp.weight"),
        (add("rope_freqs.weight", (7,)), r"rope_freqs.weight has shape \[7\], the metadata say \[8\]"),
        (add("rope_freqs.weight", (8,), 2.0), "rope_freqs.weight .* not that of LLaMA 3.1"),
        (add("blk.0.ffn_up.weight", (95, 64)), r"blk.0.ffn_up.weight has shape \[95, 64\]"),
        (add("output_norm.weight", (2, 64)), "output_norm.weight has shape"),
        (field("add_rope_scaling_type", gguf.RopeScalingType.YARN), "llama.rope.scaling.type='yarn' is not"),
        (field("add_rope_scaling_orig_ctx_len", 64), "llama.rope.scaling.original_context_length=64"),
        (field("add_rope_scaling_factor", 0.5), "llama.rope.scaling.factor=0.5 is not supported"),
        (field("add_float32", "llama.rope.freq_base_swa", 1.0), "llama.rope.freq_base_swa=1.0"),
        (field("add_expert_count", 8), "expert_count=8"),
        (field("add_bool", "llama.attention.causal", False), "llama.attention.causal=False"),
        (field("add_float32", "llama.attention.sliding_window", 0.5), "attention.sliding_window is 0.5"),
        (replace("llama.rope.freq_base", float("nan")), "llama.rope.freq_base is nan"),
        (replace("llama.attention.head_count_kv", 3), "m.gguf: .*not a multiple of num_key_value_heads 3"),
        (field("add_key_length", 8), "rope.dimension_count=16 where 8"),
        (replace("llama.vocab_size", 5), "vocab_size=5"),
        (remove("llama.block_count"), "llama.block_count is missing"),
        (replace("tokenizer.ggml.model", "llama"), "tokenizer.ggml.scores is missing"),
        (replace("tokenizer.ggml.pre", "default"), "'default' is not one of smollm"),
        (remove("tokenizer.ggml.pre"), "None is not one of smollm"),
        (remove("tokenizer.chat_template"), "no chat template"),
        (remove("tokenizer.ggml.merges"), "merges is missing"),
        (remove("tokenizer.ggml.eos_token_id"), "eos_token_id"),
        (replace("tokenizer.ggml.eos_token_id", 10**6), "eos_token_id 1000000 is outside"),
        (replace("tokenizer.ggml.merges", ["h e", "x yy"]), "tokens that do not exist"),
        (replace("tokenizer.ggml.token_type", [1, 2]), "different lengths"),
        (replace("tokenizer.ggml.tokens", ["a"] * len(tokens())), "the same token twice"),
        (field("add_uint16", "split.count", 3), "m.gguf is one of the 3 parts of a model"),
    ],
)
def test_refused(tmp_path: Path, change: Any, said: str) -> None:
    def with_vocab_size(writer: gguf.GGUFWriter, stored: dict[str, Any]) -> None:
        writer.add_vocab_size(len(tokens()))
        change(writer, stored)

    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, hf_weights(config), change=with_vocab_size)
    with pytest.raises(UserError, match=said) as caught:
        import_base(str(tmp_path / "m.gguf"), tmp_path / "base")
    assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"], "a failed import leaves something behind"


def test_a_part_of_a_model_is_named(tmp_path: Path) -> None:
    def second(writer: gguf.GGUFWriter, stored: dict[str, Any]) -> None:
        writer.add_uint16("split.no", 1)
        writer.add_uint16("split.count", 2)
        for name in [name for name in stored if not name.startswith("blk.1")]:
            del stored[name]

    write_gguf(tmp_path / "m.gguf", tiny_config(), hf_weights(tiny_config()), change=second)
    with pytest.raises(UserError, match=r"m\.gguf is part 2 of the 2 parts of a model.*llama-gguf-split --merge"):
        open_gguf(tmp_path / "m.gguf")


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    weights = hf_weights(config)
    weights["model.norm.weight"][3] = np.nan
    write_gguf(tmp_path / "m.gguf", config, weights)
    with pytest.raises(UserError, match=r"model\.norm\.weight .* 1 of 64 values NaN"):
        import_base(str(tmp_path / "m.gguf"), tmp_path / "base")


def test_tensor_types_that_are_not_read_are_listed(tmp_path: Path) -> None:
    config = tiny_config()

    def change(writer: gguf.GGUFWriter, stored: dict[str, Any]) -> None:
        stored["output_norm.weight"] = (np.ones(64, np.int32), Kind.I32)
        stored["blk.0.ffn_up.weight"] = (np.ones((96, 80), np.uint8), Kind.Q8_1)
        stored["blk.1.ffn_up.weight"] = stored["blk.0.ffn_up.weight"]

    write_gguf(tmp_path / "m.gguf", config, hf_weights(config), change=change)
    said = r"blk\.\{0,1\}\.ffn_up\.weight has type Q8_1; output_norm\.weight has type I32, which is not read"
    with pytest.raises(UserError, match=said):
        import_base(str(tmp_path / "m.gguf"), tmp_path / "base")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, hf_weights(config), architecture="gemma2")
    with pytest.raises(UserError, match=r"'gemma2'; use a model of architecture 'llama', 'qwen2', 'qwen3'"):
        open_gguf(tmp_path / "m.gguf")
    # A window is an option of `llama` only, and a Qwen2 without biases is none.
    write_gguf(tmp_path / "m.gguf", config, hf_weights(config), architecture="qwen2")
    with pytest.raises(UserError, match=r"missing: blk\.\{0,1\}\.attn_k\.bias"):
        open_gguf(tmp_path / "m.gguf")
    qwen3 = tiny_config(model_type="qwen3", sliding_window=8)
    write_gguf(tmp_path / "m.gguf", qwen3, hf_weights(qwen3))
    with pytest.raises(UserError, match=r"qwen3\.attention\.sliding_window=8 is not supported"):
        open_gguf(tmp_path / "m.gguf")


def test_rope_scaled_otherwise_is_refused(tmp_path: Path) -> None:
    config = tiny_config(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), rope_theta=500000.0)
    for changes in ({"low": 2.0}, {"high": 5.0}, {"context": 4096}):
        other = put("rope_freqs.weight", (rope_factors(config, **changes), Kind.F32))
        write_gguf(tmp_path / "m.gguf", config, hf_weights(config), change=other)
        with pytest.raises(
            UserError, match=r"rope_freqs\.weight .*low_freq_factor 1, high_freq_factor 4, original context 8192"
        ):
            open_gguf(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", config, hf_weights(config), change=field("add_rope_scaling_factor", 2.0))
    with pytest.raises(UserError, match="scale RoPE twice"):
        open_gguf(tmp_path / "m.gguf")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, hf_weights(config))
    data = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 10, 24, 30, 100, 5000, *range(6000, len(data), len(data) // 9), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            open_gguf(cut)
    cut.write_bytes(b"not a model" * 100)
    with pytest.raises(UserError, match="not a GGUF file"):
        open_gguf(cut)
    with pytest.raises(UserError, match="does not exist"):
        open_gguf(tmp_path / "none.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(fields: list[bytes] = (), tensors: list[bytes] = (), version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join([*fields, *tensors])


def tensor(dimensions: list[int], kind: int, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text("a") + shape + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        # What would be a long wait or a full memory if the numbers were believed.
        (header()[:8] + struct.pack("<QQ", 0, 1 << 60), "truncated"),
        (header()[:8] + struct.pack("<QQ", 1 << 60, 0), "truncated"),
        (header([text("a") + struct.pack("<IQ", 8, 1 << 60)]), "1152921504606846976 bytes are stated"),
        (header([text("a") + struct.pack("<IIQ", 9, 5, 1 << 60)]), "bytes are stated"),
        (header([text("a") + struct.pack("<IIQ", 9, 8, 1 << 60)]), "truncated"),
        (header([text("a") + struct.pack("<IIQ", 9, 9, 1 << 60)]), "type number 9"),
        (header(tensors=[tensor([32] * 5, 0)]), "5 dimensions"),
        (header(tensors=[tensor([1 << 40, 1 << 40], 0)]), "tensor a ends at byte"),
        (header(tensors=[tensor([32], 0, 1 << 50)]), "tensor a ends at byte"),
        (header(tensors=[tensor([33], 2)]), "rows of 33, Q4_0 has blocks of 32"),
        (header(tensors=[tensor([32], 999)]), "type number 999, which this version"),
        (header(tensors=[tensor([0], 0)] * 2) + bytes(64), "tensor a is there twice"),
        (header([text("a") + struct.pack("<IB", 7, 1)] * 2), "field a is there twice"),
        (header([text("a") + struct.pack("<IB", 77, 1)]), "type number 77"),
        (header([text("general.alignment") + struct.pack("<II", 4, 0)]), "alignment is 0"),
        (header([struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 7, 1)]), "truncated or not a GGUF"),
        (header(version=1), "version 1; only 2 and 3"),
        (header(version=3 << 24), "big-endian"),
        (header(), "architecture None"),
        (header([text("general.architecture") + struct.pack("<I", 8) + text("llama")]), "token_embd.weight is missing"),
        (header([text("general.architecture") + struct.pack("<IIQ", 9, 4, 0)]), r"architecture \[\]"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError, match=said) as caught:
        open_gguf(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value) and "\n" not in str(caught.value)
