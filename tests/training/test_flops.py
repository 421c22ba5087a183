"""Model FLOPs: published and measured numbers, a count of a compiled program's products, and devices' peaks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from conftest import tiny_config

from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import LoraConfig
from transllm_jax.training.flops import PEAK, peak_flops, train_flops_per_token

LLAMA2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
LORA = LoraConfig(rank=64, alpha=128.0)
# Parameters of LLaMA-2-7B: 32 layers of 4 * D * D + 3 * D * F, and of its adapters of rank 1.
KERNELS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
ADAPTERS = 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))


def test_a_training_step_of_llama_2_7b() -> None:
    # Counted once before, from the compiled program of such a model on a pod.
    assert train_flops_per_token(LLAMA2_7B, LORA, 21008, 512) == pytest.approx(28.3e9, rel=0.005)
    assert train_flops_per_token(LLAMA2_7B, None, 21008, 512, full=True) == pytest.approx(40.6e9, rel=0.005)


def test_full_fine_tuning_is_six_a_parameter_and_attention() -> None:
    output = 32000 * 4096
    # PaLM's 6 N + 12 L H Q T, with half of the square, N without the table that is only looked up in.
    wanted = 6 * (KERNELS + output) + 12 * 32 * 4096 * 2048 / 2
    assert train_flops_per_token(LLAMA2_7B, None, 0, 2048, full=True) == pytest.approx(wanted, rel=1e-12)


def test_only_what_trains_costs_its_gradient() -> None:
    def count(lora: LoraConfig | None = LORA, new_rows: int = 0, **options: Any) -> float:
        return train_flops_per_token(LLAMA2_7B, lora, new_rows, 512, **options)

    nothing = count(None)
    assert count(None, full=True) - nothing == 2 * (KERNELS + 32000 * 4096)
    assert count() - nothing == 6 * 64 * ADAPTERS
    assert count(replace(LORA, targets=("q", "v"))) - nothing == 6 * 64 * 32 * 2 * (2 * 4096)
    assert count(new_rows=100) - count() == 6 * 100 * 4096
    assert count(new_rows=100, train_new=False) - count() == 4 * 100 * 4096
    assert count(train_base=True) - count() == 2 * 32000 * 4096
    # Both tables are counted once, tied or not: the other is looked up in.
    tied = replace(LLAMA2_7B, tie_word_embeddings=True)
    assert train_flops_per_token(tied, LORA, 100, 512) == count(new_rows=100)


def test_grouped_keys_and_windows() -> None:
    config = tiny_config(40)
    wide = replace(config, num_key_value_heads=4)
    # k and v of 2 layers, 2 heads of 16 less.
    assert train_flops_per_token(wide, None, 0, 64) - train_flops_per_token(config, None, 0, 64) == 4 * 2 * 2 * 48 * 32

    def keys(length: int, window: int | None) -> float:
        whole = train_flops_per_token(replace(config, sliding_window=window), None, 0, length)
        one = train_flops_per_token(replace(config, sliding_window=1), None, 0, 10**12)  # a key a query
        return 1 + (whole - one) / (12 * 2 * 64)

    assert keys(64, None) == keys(64, 64) == keys(64, 1000) == pytest.approx(32)
    # 16 keys for all queries but the first 16, which see half as many.
    assert keys(64, 16) == pytest.approx((16 * 8 + 48 * 16) / 64)


def test_the_peaks_of_devices() -> None:
    def peak(kind: str) -> float | None:
        return peak_flops(SimpleNamespace(device_kind=kind))  # type: ignore[arg-type]

    assert peak("TPU v5 lite") == 197e12 and peak("TPU v4") == 275e12 and peak("TPU v5p") == 459e12
    assert peak("TPU v6 lite") == 918e12
    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    # A slower card of a like name is not taken for it.
    assert peak("NVIDIA H100 PCIe") is None
    assert peak_flops(jax.devices("cpu")[0]) is None
    assert all(1e14 < flops < 2e15 for flops in PEAK.values())
