"""Model FLOPs: what a training step has to compute, counted from the model's shape, and what devices can compute.

Only matrix products count, with two FLOPs per multiply-add. Rematerialised computation does not count, so that model
FLOPs utilisation is comparable between runs that recompute different parts.
"""

from __future__ import annotations

import jax

from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import TARGETS, LoraConfig

# Dense bfloat16 FLOP/s from the manufacturers' data sheets, by JAX's device kind.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """The peak bfloat16 FLOP/s of a device; None if it is not known (a CPU, or a kind that is not in `PEAK`)."""
    return PEAK.get(device.device_kind)


def train_flops_per_token(
    config: LlamaConfig,
    lora: LoraConfig | None,
    new_rows: int,
    length: int,
    *,
    full: bool = False,
    train_base: bool = False,
    train_new: bool = True,
) -> float:
    """FLOPs per token of a training step on rows of `length` tokens, all of which are trained on.

    They are those of the forward pass, of the gradient of every product's input, and of the gradient of the weights
    that train: all if `full`; otherwise the adapters, the new rows if `train_new`, and the base's output rows if
    `train_base`. Attention counts the causal half, as in MaxText (PaLM's formula counts the whole square), and only
    the keys within a sliding window.
    """
    kernels, adapters = _weights(config, lora)
    d = config.hidden_size
    base, new = config.vocab_size * d, new_rows * d
    # The forward pass and the gradient of the input use all weights; the gradient of weights, only those that train.
    used = kernels + adapters + base + new
    trained = adapters + (kernels if full else 0) + (base if full or train_base else 0) + (new if train_new else 0)
    keys = mean_keys(config, length)
    # Two products forward, the scores and the sums of values, and two backward for each of them.
    attention = config.num_hidden_layers * 2 * 3 * 2 * keys * config.num_attention_heads * config.head_dim
    return 4.0 * used + 2.0 * trained + attention


def mean_keys(config: LlamaConfig, length: int) -> float:
    """The mean number of keys per query of a row: length / 2, or with a window of w keys w * (1 - w / (2 * length))."""
    window = min(config.sliding_window or length, length)
    return window * (1 - window / (2 * length))


def forward_flops_per_token(
    config: LlamaConfig, lora: LoraConfig | None, new_rows: int, keys: float, *, logits: float = 1.0
) -> float:
    """FLOPs per token of a forward pass in which each token attends to `keys` keys.

    logits: the share of tokens for which the output layer is computed.
    """
    output = (config.vocab_size + new_rows) * config.hidden_size
    attention = config.num_hidden_layers * 2 * 2 * keys * config.num_attention_heads * config.head_dim
    return 2.0 * (sum(_weights(config, lora)) + logits * output) + attention


def _weights(config: LlamaConfig, lora: LoraConfig | None) -> tuple[int, int]:
    """The number of values in the layers' kernels, and in their adapters."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layers = config.num_hidden_layers
    sizes = dict(zip(TARGETS, ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)), strict=True))
    kernels = layers * sum(size_in * size_out for size_in, size_out in sizes.values())
    adapters = 0
    if lora is not None:
        adapters = layers * lora.rank * sum(sum(sizes[name]) for name in lora.targets)
    return kernels, adapters
