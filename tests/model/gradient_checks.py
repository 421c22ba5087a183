"""Outputs and gradients of a function, and their comparison with those of another function."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@partial(jax.jit, static_argnames="function")
def outputs_and_gradients(function: Any, *arguments: Any) -> tuple[Any, Any]:
    """The outputs, and the gradients of a scalar of them with respect to all arguments."""

    def scalar(*arguments: Any) -> tuple[jax.Array, Any]:
        outputs = function(*arguments)
        return sum(jnp.sum(jnp.sin(output + place)) for place, output in enumerate(jax.tree.leaves(outputs))), outputs

    slopes, outputs = jax.grad(scalar, argnums=tuple(range(len(arguments))), has_aux=True)(*arguments)
    return outputs, slopes


def require_near(ours: Any, wanted: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert np.abs(right).max() > 0.1 and np.abs(left - right).max() < 1e-4 * np.abs(right).max()
