"""Each family of models against transformers: whole texts, prefill and cached decoding, in float32 and bfloat16."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_weights
from tiny_families import BASE, FAMILIES, LLAMA3, VOCAB

from transllm_jax.conversion.hf.directory import read_config, read_weights, write_model
from transllm_jax.errors import UserError
from transllm_jax.model.cache import CHUNK, decode, empty_cache, read
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.parameters import Split, assemble, load_frozen, merge

LENGTH, PROMPT = 28, 11
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)


def build(directory: Path, config: LlamaConfig, dtype: jnp.dtype = jnp.float32) -> Split:
    """The model of a Hugging Face directory, as our code reads it."""
    assert read_config(directory) == config
    return assemble(config, load_frozen(config, read_weights(directory, dtype), dtype))


@partial(jax.jit, static_argnames=("structure",))
def _whole(structure: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
    model = merge(structure, {}, frozen)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.vocabulary.logits(model(tokens, positions, jnp.ones_like(tokens)))


@partial(jax.jit, static_argnames=("structure", "piece", "padding"))
def _prefill(structure: Any, frozen: Any, tokens: jax.Array, *, piece: int, padding: int) -> Any:
    model = merge(structure, {}, frozen)
    rows, total = tokens.shape
    cache = empty_cache(model, rows, CHUNK)
    for start in range(0, total, piece):
        part = tokens[:, start : start + piece]
        numbers = (jnp.full(rows, number) for number in (start, part.shape[1], total))
        hidden, cache = read(model, cache, jnp.pad(part, ((0, 0), (0, padding))), *numbers, adapters=False)
    return model.vocabulary.logits(hidden), cache


@partial(jax.jit, static_argnames=("structure",))
def _decode(structure: Any, frozen: Any, tokens: jax.Array, cache: Any, length: jax.Array) -> Any:
    model = merge(structure, {}, frozen)
    active = jnp.ones_like(length, bool)
    hidden, cache = decode(model, (), cache, tokens, length, active, adapters=False)
    return model.vocabulary.logits(hidden), cache


def whole(split: Split, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_whole(split.structure, split.frozen, jnp.asarray(tokens)), np.float32)


def cached(split: Split, tokens: np.ndarray, padding: int, piece: int = PROMPT) -> np.ndarray:
    """The logits from the prompt's last token on, one token at a time; the prompt in pieces, each padded at its end."""
    prompt = jnp.asarray(tokens[:, :PROMPT])
    logits, cache = _prefill(split.structure, split.frozen, prompt, piece=piece, padding=padding)
    found = [logits]
    for place in range(PROMPT, LENGTH):
        length = jnp.full(len(tokens), place)
        logits, cache = _decode(split.structure, split.frozen, jnp.asarray(tokens[:, place]), cache, length)
        found.append(logits)
    return np.asarray(jnp.stack(found, axis=1), np.float32)


def reference_logits(directory: Path, dtype: str = "float32", *, cache: bool = False) -> np.ndarray:
    """transformers' logits of TOKENS: of the whole texts, or from the prompt's end on with its key and value cache."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    tokens = torch.tensor(TOKENS).long()
    with torch.no_grad():
        if not cache:
            return model(tokens).logits.float().numpy()
        out = model(tokens[:, :PROMPT], use_cache=True)
        found = [out.logits[:, -1]]
        for place in range(PROMPT, LENGTH):
            out = model(tokens[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, -1])
    return torch.stack(found, dim=1).float().numpy()


@pytest.mark.reference
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    config = FAMILIES[name]
    write_model(tmp_path / "model", config, random_weights(config))
    split = build(tmp_path / "model", config)

    wanted = reference_logits(tmp_path / "model")
    ours = whole(split, TOKENS)
    assert wanted.std() > 0.3
    assert np.abs(ours - wanted).max() < 1e-4

    wanted = reference_logits(tmp_path / "model", cache=True)
    for padding, piece in ((0, PROMPT), (5, PROMPT), (5, 4)):
        assert np.abs(cached(split, TOKENS, padding, piece) - wanted).max() < 1e-4


# In bfloat16, families that differ in their arithmetic; test-full has all.
DIFFERENT = ("llama2", "llama3-untied", "llama-dynamic", "mistral-window", "qwen2", "qwen3")
IN_BFLOAT16 = [pytest.param(name, marks=[] if name in DIFFERENT else [pytest.mark.full]) for name in FAMILIES]


@pytest.mark.reference
@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_bfloat16_is_as_close_as_transformers_bfloat16(tmp_path: Path, name: str) -> None:
    config = FAMILIES[name]
    # Weights that bfloat16 holds exactly: what is compared is the arithmetic.
    write_model(tmp_path / "model", config, random_weights(config), dtype="bfloat16")
    exact = reference_logits(tmp_path / "model")
    theirs = np.abs(reference_logits(tmp_path / "model", "bfloat16") - exact)
    split = build(tmp_path / "model", config, jnp.bfloat16)
    ours = np.abs(whole(split, TOKENS) - exact)
    stepwise = np.abs(cached(split, TOKENS, 0) - exact[:, PROMPT - 1 :])
    if name == "llama-dynamic":  # its cached keys were rotated by the frequencies of a shorter text
        theirs_cached = reference_logits(tmp_path / "model", "bfloat16", cache=True)
        exact_cached = reference_logits(tmp_path / "model", cache=True)
        stepwise = np.abs(cached(split, TOKENS, 0) - exact_cached)
        assert stepwise.mean() < 1.5 * np.abs(theirs_cached - exact_cached).mean()
    assert 0 < ours.mean() < 1.5 * theirs.mean()
    assert 0 < stepwise.mean() < 1.5 * theirs.mean()
    assert ours.max() < 2 * theirs.max()


@pytest.mark.reference
@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_wrote_is_read(tmp_path: Path, name: str) -> None:
    """The config and the names of tensors as transformers' own save_pretrained writes them."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = FAMILIES[name]
    write_model(tmp_path / "ours", config, random_weights(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    assert read_config(tmp_path / "theirs") == config
    again = read_weights(tmp_path / "theirs")
    for path, values in random_weights(config).items():
        np.testing.assert_array_equal(again[path], values, err_msg=path)


def test_the_families_differ() -> None:
    """Each option counts: without it, the same weights give other logits."""
    for name, plain in {
        "llama3-untied": {"rope_scaling": None},
        "llama-linear": {"rope_scaling": None},
        "llama-dynamic": {"rope_scaling": None},
        "mistral-window": {"sliding_window": None},
        "qwen2-window": {"sliding_window": None},
    }.items():
        config = FAMILIES[name]
        with_it = assemble(config, load_frozen(config, random_weights(config)))
        without = replace(config, **plain)
        other = assemble(without, load_frozen(without, random_weights(without)))
        assert np.abs(whole(with_it, TOKENS) - whole(other, TOKENS)).max() > 0.01, name


def test_dynamic_scaling_of_a_row_does_not_depend_on_its_neighbours() -> None:
    config = FAMILIES["llama-dynamic"]
    split = assemble(config, load_frozen(config, random_weights(config)))
    short = np.where(np.arange(LENGTH) < 10, TOKENS, 0)
    positions = np.where(np.arange(LENGTH) < 10, np.arange(LENGTH), 0)
    segments = (np.arange(LENGTH) < 10).astype(np.int32)

    @jax.jit
    def run(tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        return split.merge()(tokens, positions, segments)

    alone = run(short[:1], positions[None], segments[None])
    beside = run(
        np.stack([short[0], TOKENS[1]]),
        np.stack([positions, np.arange(LENGTH)]),
        np.stack([segments, np.ones(LENGTH, np.int32)]),
    )
    np.testing.assert_allclose(alone[0, :10], beside[0, :10], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("llama2", {"model_type": "gemma2"}, "gemma2"),
        ("llama2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("llama2", {"rope_scaling": {"type": "longrope", "rope_type": "longrope"}}, "longrope"),
        ("llama2", {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "correct one"),
        ("llama2", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ("llama2", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "at least 1"),
        ("llama2", {"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "'two'"),
        ("llama2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
        ("llama2", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama3-tied", {"rope_scaling": LLAMA3.to_hf() | {"low_freq_factor": 4.0}}, "below high_freq_factor"),
        ("llama2", {"rope_scaling": 2.0}, "must be an object"),
        ("llama2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta is 10000.0 and 5.0"),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama2", {"rope_theta": 0}, "rope_theta"),
        ("llama2", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ("llama2", {"attention_bias": "yes"}, "true or false"),
        ("mistral", {"attention_bias": True}, "not an option"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("mistral", {"layer_types": ["full_attention"] * 2, "sliding_window": 8}, "layer_types does not fit"),
        ("mistral", {"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "layer_types does not fit"),
        ("qwen2", {"mlp_bias": True}, "not an option"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "mixes sliding and full",
        ),
        ("qwen3", {"layer_types": ["full_attention"]}, "2 times"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "no sliding_window"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(name: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        LlamaConfig.from_hf(FAMILIES[name].to_hf() | changes)


def test_fields_that_config_json_leaves_out_are_the_familys() -> None:
    raw = FAMILIES["mistral"].to_hf()
    for field in ("sliding_window", "num_key_value_heads", "max_position_embeddings", "head_dim"):
        del raw[field]
    with pytest.raises(UserError, match="num_key_value_heads 8"):
        LlamaConfig.from_hf(raw)
    found = LlamaConfig.from_hf(raw | {"num_attention_heads": 8})
    assert (found.sliding_window, found.max_position_embeddings, found.head_dim) == (4096, 131072, 6)
    raw = FAMILIES["qwen3"].to_hf()
    del raw["head_dim"]
    assert LlamaConfig.from_hf(raw).head_dim == 128


def test_dynamic_scaling_lengthens_the_context() -> None:
    assert FAMILIES["llama-dynamic"].context == 64
    assert FAMILIES["llama-linear"].context == BASE.max_position_embeddings


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        # Rounding alone: products in two parts.
        ("llama2", {"pretraining_tp": 2}),
        ("llama2", {"hidden_act": "swish"}),
        ("llama2", {"partial_rotary_factor": None}),
        ("llama2", {"sliding_window": 0}),
        ("mistral", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}),
        ("mistral", {"layer_types": ["full_attention"] * 2, "sliding_window": None}),
        ("qwen2", {"attention_bias": True, "attention_dropout": 0.1, "layer_types": None}),
    ],
)
def test_fields_that_change_nothing_are_read_over(name: str, harmless: dict[str, Any]) -> None:
    raw = FAMILIES[name].to_hf()
    window = {"sliding_window": harmless["sliding_window"]} if name == "mistral" else {}
    assert LlamaConfig.from_hf(raw | harmless) == LlamaConfig.from_hf(raw | window)
