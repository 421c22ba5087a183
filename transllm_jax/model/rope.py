"""Rotary position embedding (RoPE, arXiv 2104.09864) in Hugging Face's layout, with the LLaMA family's scalings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from transllm_jax.errors import UserError

# The fields of each scaling in config.json, besides its type.
_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE is extended to more positions than it was trained on; Hugging Face's field names.

    `linear` divides every frequency by `factor`. `dynamic` (NTK) raises the base for a text longer than
    `max_position_embeddings`, and raises it more the longer the text is. `llama3` (LLaMA 3.1) divides the low
    frequencies by `factor`, keeps the high ones, and blends in between; only it has the last three fields.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], max_position_embeddings: int) -> RopeScaling | None:
        """Read `rope_scaling`, or `rope_parameters` without `rope_theta`; None for RoPE without scaling.

        Raises UserError for an unsupported scaling, and for a field that is missing, unused or out of range.
        """
        raw = dict(raw)
        old, new = raw.pop("type", None), raw.pop("rope_type", None)
        kind = new or old or "default"
        if old and new and old != new:
            raise UserError(f"config.json: rope_scaling has type {old!r} and rope_type {new!r}; correct one of them")
        # transformers writes 1.0 where every feature is rotated, as in this model.
        if raw.pop("partial_rotary_factor", 1.0) != 1.0:
            raise UserError("config.json: partial_rotary_factor other than 1 is not supported")
        if kind == "default":
            if raw:
                raise UserError(f"config.json: rope type 'default' has no field {', '.join(sorted(raw))}; remove it")
            return None
        if kind not in _FIELDS:
            raise UserError(
                f"config.json: rope type {kind!r} is not supported; 'default', {', '.join(map(repr, _FIELDS))} are"
            )
        if kind == "llama3":
            raw.setdefault("original_max_position_embeddings", max_position_embeddings)
        wanted = set(_FIELDS[kind])
        if raw.keys() != wanted:
            raise UserError(
                f"config.json: rope type {kind!r} needs {', '.join(_FIELDS[kind])} and nothing else; "
                f"wrong: {', '.join(sorted(raw.keys() ^ wanted))}"
            )
        for name, value in raw.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"config.json: rope_scaling.{name} is {value!r}; it must be a number above 0")
        if raw["factor"] < 1:
            raise UserError(f"config.json: rope_scaling.factor is {raw['factor']}; it must be at least 1")
        if kind == "llama3" and not raw["low_freq_factor"] < raw["high_freq_factor"]:
            raise UserError("config.json: rope_scaling.low_freq_factor must be below high_freq_factor")
        return cls(kind, **raw)

    def to_hf(self) -> dict[str, Any]:
        """The dictionary under `rope_scaling`."""
        return {"rope_type": self.rope_type} | {name: getattr(self, name) for name in _FIELDS[self.rope_type]}


def frequencies(head_dim: int, theta: jax.Array | float) -> jax.Array:
    """theta ** (-2i / H): [..., H / 2] for theta [..., 1] or a number."""
    return 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def llama3_frequencies(plain: jax.Array, scaling: RopeScaling) -> jax.Array:
    """LLaMA 3.1's frequencies [H / 2] from unscaled ones."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    assert low is not None and high is not None and context is not None
    turns = context * plain / (2 * math.pi)  # of a full circle, within the original context
    blend = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * plain / scaling.factor + blend * plain


def rotary_angles(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None, max_position_embeddings: int
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, 1, T, H / 2] for positions [B, T].

    For dynamic scaling a row's length is its largest position + 1, so that a row's result does not depend on the other
    rows of the batch.
    """
    if scaling is not None and scaling.rope_type == "dynamic":
        length = jnp.max(positions, axis=1, keepdims=True) + 1
        reach = jnp.maximum(length, max_position_embeddings).astype(jnp.float32) / max_position_embeddings
        stretch = (scaling.factor * reach - (scaling.factor - 1)) ** (head_dim / (head_dim - 2))
        omega = frequencies(head_dim, theta * stretch)[:, None, None]  # [B, 1, 1, H / 2]
    else:
        omega = frequencies(head_dim, theta)
        if scaling is not None and scaling.rope_type == "linear":
            omega = omega / scaling.factor
        elif scaling is not None:
            omega = llama3_frequencies(omega, scaling)
    angles = positions[:, None, :, None].astype(jnp.float32) * omega
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate x [B, heads, T, H] by the angles of its positions; the first half of H pairs with the second."""
    cos, sin = angles
    first, second = jnp.split(x, 2, axis=-1)
    # The halves are swapped in x's own dtype, so that the float32 part is one sum and no concatenation.
    swapped = jnp.concatenate([-second, first], axis=-1)
    cos, sin = (jnp.concatenate([half, half], axis=-1) for half in (cos, sin))
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)
