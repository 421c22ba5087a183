"""The shape of a LLaMA-family model, in Hugging Face's field names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transllm_jax.errors import UserError

_OPTIONAL = {"num_key_value_heads", "head_dim"}
_SIZES = _OPTIONAL | {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
}
# Options of Hugging Face's LlamaConfig that change the computation, with the only value that this model computes.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "pretraining_tp": 1,
}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a LLaMA model. Field names are those of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; correct config.json"
            )
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim {self.head_dim} is odd; rotary embedding needs an even one")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a Hugging Face `config.json` dictionary.

        Raises UserError that names the field, for an architecture or option that would be computed wrongly.
        """
        kind = config.get("model_type")
        if kind != "llama":
            raise UserError(f"config.json: model_type {kind!r} is not supported; use a model of type 'llama'")
        config = dict(config)
        # transformers 5 writes `rope_parameters`, earlier releases `rope_theta` and `rope_scaling`.
        rope = dict(config.pop("rope_parameters", None) or {})
        theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
        if rope.pop("rope_type", "default") != "default" or rope:
            raise UserError("config.json: rope_parameters other than 'default' are not supported yet")
        for name, value in _REQUIRED.items():
            if config.get(name, value) != value:
                raise UserError(f"config.json: {name}={config[name]!r} is not supported; only {value!r} is")
        # Not `or`: an explicit 0 is wrong, and not a missing value.
        for name in _SIZES & config.keys():
            value = config[name]
            if value is None and name in _OPTIONAL:
                del config[name]
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"config.json: {name} is {value!r}; it must be a whole number above 0")
        try:
            heads = int(config["num_attention_heads"])
            return cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=int(config["hidden_size"]),
                intermediate_size=int(config["intermediate_size"]),
                num_hidden_layers=int(config["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(config.get("num_key_value_heads", heads)),
                head_dim=int(config.get("head_dim", config["hidden_size"] // heads)),
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                rope_theta=float(theta),
                max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as missing:
            raise UserError(f"config.json: field {missing} is missing; is this a complete model directory?") from None

    def to_hf(self) -> dict[str, Any]:
        """The dictionary that Hugging Face's `LlamaConfig` reads (and older readers: `rope_theta` at the top)."""
        fields = asdict(self)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **fields,
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }
