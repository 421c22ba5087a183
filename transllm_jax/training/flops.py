"""Model FLOPs: what a training step has to compute, counted from the model's shape, and what devices can compute.

Counted are the products: two FLOPs a multiplication and addition. What is computed again in rematerialisation is not,
so that model FLOPs utilisation compares runs whatever they recompute.
"""

from __future__ import annotations

import jax

from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.lora import TARGETS, LoraConfig

# Dense bfloat16 FLOP/s by the name that JAX gives a device: the makers' data sheets.
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
    """The peak of a device in bfloat16 FLOP/s; None where it is not known (a CPU; a card of another speed)."""
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
    """FLOPs a token of a training step on rows of `length` tokens, each of which is trained on.

    The forward pass, the gradient of every product's input, and that of the weights which train: all with `full`,
    otherwise adapters, new rows (unless not `train_new`) and with `train_base` the base's output rows.
    Attention is counted at its causal half, as MaxText counts it (PaLM's formula takes the whole square), and at the
    keys that a sliding window leaves.
    """
    kernels, adapters = _weights(config, lora)
    d = config.hidden_size
    base, new = config.vocab_size * d, new_rows * d
    # Forward and gradient of the input, by all weights; gradient of the weights, by those that train.
    used = kernels + adapters + base + new
    trained = adapters + (kernels if full else 0) + (base if full or train_base else 0) + (new if train_new else 0)
    keys = mean_keys(config, length)
    # Scores and sums of values, and for each two products backward.
    attention = config.num_hidden_layers * 2 * 3 * 2 * keys * config.num_attention_heads * config.head_dim
    return 4.0 * used + 2.0 * trained + attention


def mean_keys(config: LlamaConfig, length: int) -> float:
    """How many keys a query of a row sees on average: half of them, or a window's, of which the first queries half."""
    window = min(config.sliding_window or length, length)
    return window * (1 - window / (2 * length))


def forward_flops_per_token(
    config: LlamaConfig, lora: LoraConfig | None, new_rows: int, keys: float, *, logits: float = 1.0
) -> float:
    """FLOPs a token of reading or generating, which attends to so many keys; of `logits` of the tokens the output."""
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
