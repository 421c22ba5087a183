"""The shape of a model of the LLaMA family, in Hugging Face's field names.

LLaMA, Mistral, Qwen2 and Qwen3 are one architecture; they differ in a few fields of this config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transllm_jax.errors import UserError
from transllm_jax.model.rope import RopeScaling

_OPTIONAL = {"num_key_value_heads", "head_dim"}
_SIZES = _OPTIONAL | {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
}
# Options that change the computation, with the only values that are supported (swish is another name for silu).
# Left out on purpose: pretraining_tp, which splits products into sums and so only changes their rounding (transformers
# has dropped it); attention_dropout and initializer_range, which only affect the original training; use_cache; dtype.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "partial_rotary_factor": (1.0, None),
}
# The values that transformers assumes for fields that a family's config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a model. Field names are those of Hugging Face's `config.json` where it has the field.

    `attention_bias`: biases on q, k and v, and on o unless the family is qwen2; `mlp_bias`: on gate, up and down.
    `qk_norm`: an RMSNorm over each head of q and k before they are rotated. `sliding_window`: how many keys a query
    attends to, its own included (None: all).
    """

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
    model_type: str = "llama"
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; correct config.json"
            )
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim {self.head_dim} is odd; rotary embedding needs an even one")

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k is normalised (Qwen3)."""
        return self.model_type == "qwen3"

    @property
    def biases(self) -> frozenset[str]:
        """The linear layers (of q, k, v, o, gate, up and down) that have a bias."""
        names = set()
        if self.attention_bias:
            names |= {"q", "k", "v"} if self.model_type == "qwen2" else {"q", "k", "v", "o"}
        if self.mlp_bias:
            names |= {"gate", "up", "down"}
        return frozenset(names)

    @property
    def context(self) -> int:
        """The longest text, in tokens, that the model reads; dynamic RoPE scaling extends the trained length."""
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic":
            return int(self.max_position_embeddings * self.rope_scaling.factor)
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a Hugging Face `config.json` dictionary.

        Raises UserError, which names the field, for an architecture or option that is not supported.
        """
        kind = config.get("model_type")
        if kind not in _DEFAULTS:
            raise UserError(f"config.json: model_type {kind!r} is not supported; use one of {', '.join(_DEFAULTS)}")
        config = {**_DEFAULTS[kind], **config}
        for name, values in _REQUIRED.items():
            if config.get(name, values[0]) not in values:
                raise UserError(f"config.json: {name}={config[name]!r} is not supported; only {values[0]!r} is")
        # An explicit 0 is an error, not a missing value, so it is not replaced by a default.
        for name in _SIZES & config.keys():
            value = config[name]
            if value is None and name in _OPTIONAL:
                del config[name]
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"config.json: {name} is {value!r}; it must be a whole number above 0")
        try:
            heads = int(config["num_attention_heads"])
            theta, scaling = _rope(config)
            return cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=int(config["hidden_size"]),
                intermediate_size=int(config["intermediate_size"]),
                num_hidden_layers=int(config["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(config.get("num_key_value_heads", heads)),
                head_dim=int(config.get("head_dim", config["hidden_size"] // heads)),
                rms_norm_eps=_positive(config, "rms_norm_eps", 1e-6),
                rope_theta=theta,
                max_position_embeddings=int(config["max_position_embeddings"]),
                tie_word_embeddings=_flag(config, "tie_word_embeddings"),
                model_type=kind,
                rope_scaling=scaling,
                # Not an option of Qwen2, which always has these biases, nor of Mistral, which never has.
                attention_bias=kind == "qwen2" or _flag(config, "attention_bias", only=("llama", "qwen3")),
                mlp_bias=_flag(config, "mlp_bias", only=("llama",)),
                sliding_window=_sliding_window(config),
            )
        except KeyError as missing:
            raise UserError(f"config.json: field {missing} is missing; is this a complete model directory?") from None

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` dictionary, in a form that all versions of transformers and other programs read."""
        raw: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else self.rope_scaling.to_hf(),
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
        }
        if self.model_type in ("llama", "qwen3"):
            raw["attention_bias"] = self.attention_bias
        if self.model_type == "llama":
            raw["mlp_bias"] = self.mlp_bias
        if self.model_type in ("mistral", "qwen2", "qwen3"):
            raw["sliding_window"] = self.sliding_window
        if self.model_type in ("qwen2", "qwen3"):
            raw["use_sliding_window"] = self.sliding_window is not None
            raw["max_window_layers"] = 0 if self.sliding_window is not None else self.num_hidden_layers
        return raw


def _flag(config: Mapping[str, Any], name: str, only: tuple[str, ...] = tuple(_DEFAULTS)) -> bool:
    """A boolean field. Raises UserError if it is true in a family that is not in `only`, as transformers ignores it."""
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"config.json: {name} is {value!r}; it must be true or false")
    if value and config["model_type"] not in only:
        raise UserError(f"config.json: {name}={value!r} is not an option of model_type {config['model_type']!r}")
    return value


def _positive(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"config.json: {name} is {value!r}; it must be a number above 0")
    return float(value)


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling: from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    scaling: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name) or {}
        if not isinstance(value, Mapping):
            raise UserError(f"config.json: {name} is {value!r}; it must be an object or null")
        if scaling and value and dict(value) | {"rope_theta": 0} != scaling | {"rope_theta": 0}:
            raise UserError("config.json: rope_scaling and rope_parameters differ; remove one of them")
        scaling = dict(value) or scaling
    top = _positive(config, "rope_theta", 10000.0)
    theta = _positive(scaling, "rope_theta", top)
    if "rope_theta" in config and theta != top:
        raise UserError(f"config.json: rope_theta is {top} and {theta} in rope_parameters; correct one of them")
    scaling.pop("rope_theta", None)
    return theta, RopeScaling.from_hf(scaling, int(config["max_position_embeddings"]))


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """The window of every layer, or None. Raises UserError if only some layers have one."""
    kind, layers = config["model_type"], int(config["num_hidden_layers"])
    window = config.get("sliding_window")
    if kind == "llama":
        return None  # not an option of the family: transformers ignores the field
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise UserError(f"config.json: sliding_window is {window!r}; it must be a whole number above 0, or null")
    if kind == "mistral":
        # transformers ignores layer_types in this family, so they must agree with what it computes.
        wanted = "full_attention" if window is None else "sliding_attention"
        if config.get("layer_types") not in (None, [], [wanted] * layers):
            raise UserError(
                f"config.json: layer_types does not fit sliding_window {window!r}, which makes all layers of a "
                f"'mistral' {wanted}; correct one of them"
            )
        return window
    if not _flag(config, "use_sliding_window"):
        window = None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        types = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        raise UserError(f"config.json: layer_types must name sliding_attention or full_attention, {layers} times")
    if len(set(types)) > 1:
        raise UserError("config.json: layer_types mixes sliding and full attention, which is not supported")
    if types[0] == "full_attention":
        return None
    if window is None:
        raise UserError("config.json: layer_types has sliding_attention, but there is no sliding_window; add it")
    return window
