"""A model as flat dictionaries of arrays: built from weights, and split into trainable and frozen.

A path is the attribute path joined with dots, such as `blocks.attention.q.kernel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from transllm_jax.errors import UserError
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import SINGLE, Index, Layout, Reader
from transllm_jax.model.llama import Llama
from transllm_jax.model.lora import Adapter, LoraConfig, NewRows
from transllm_jax.model.vocabulary import Padding

# A flat tree of arrays: path -> array.
Flat = dict[str, jax.Array]
TRAINABLE = nnx.Any(Adapter, NewRows)
# The trainable copies of the base vocabulary's rows, if there are any.
BASE_ROWS = ("vocabulary.base_trained", "vocabulary.output_base_trained")


class Split(NamedTuple):
    """A model in three parts: its static structure, its trainable and its frozen arrays (both path -> array)."""

    structure: Any
    trainable: Flat
    frozen: Flat

    def merge(self) -> Llama:
        """The whole model."""
        return merge(self.structure, self.trainable, self.frozen)

    @property
    def layout(self) -> Layout:
        """How the arrays are placed on devices."""
        return self.merge().layout

    def freeze(self, paths: Iterable[str]) -> Split:
        """The same split with these trainable arrays frozen at their present values: no gradient, no moments.

        Raises ValueError, which lists the paths, if any is not trainable.
        """
        held = set(paths)
        if unknown := sorted(held - self.trainable.keys()):
            raise ValueError(f"{', '.join(unknown)}: not among what trains")
        trainable = {path: array for path, array in self.trainable.items() if path not in held}
        return Split(self.structure, trainable, {**self.frozen, **{path: self.trainable[path] for path in held}})


def _flatten(state: nnx.State) -> dict[str, Any]:
    flat: Any = nnx.to_flat_state(state)
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def abstract(
    config: LlamaConfig,
    lora: LoraConfig | None,
    new_rows: int,
    dtype: DTypeLike = jnp.float32,
    *,
    train_base: bool = False,
    padding: Padding = (),
    layout: Layout = SINGLE,
) -> Split:
    """The split of a model with shapes in place of arrays, without memory. With a mesh, shapes carry their sharding.

    Raises UserError if the mesh does not divide the model.
    """

    def make() -> Llama:
        options: dict[str, Any] = {"train_base": train_base, "padding": padding, "layout": layout, "dtype": dtype}
        return Llama(config, lora, new_rows, **options, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(make)
    parts: Any = nnx.split(model, TRAINABLE, ...)
    structure, *states = parts
    trainable, frozen = map(_flatten, states)
    heads = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
    }
    layout.require({path: leaf.shape for path, leaf in {**frozen, **trainable}.items()}, heads)

    def placed(flat: dict[str, Any]) -> dict[str, Any]:
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(path))
            for path, leaf in flat.items()
        }

    return Split(structure, placed(trainable), placed(frozen))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """path -> array as a nested state, which `nnx.merge` takes together with the structure from `nnx.split`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def merge(structure: Any, trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> Llama:
    """The model of a static structure and its arrays. Works inside a JAX transform.

    A path that is in both dictionaries is taken from `trainable`.
    """
    model: Llama = nnx.merge(structure, nested({**frozen, **trainable}))
    return model


def initial_adapters(config: LlamaConfig, lora: LoraConfig, seed: int) -> dict[str, np.ndarray]:
    """Adapters with LoRA's initial values (a random, b zero): a pure function of the seed."""
    shapes = {path: leaf for path, leaf in abstract(config, lora, 0).trainable.items()}
    key = jax.random.key(seed)
    adapters = {}
    for number, (path, leaf) in enumerate(sorted(shapes.items())):
        if path.endswith(".a"):
            limit = (3 / leaf.shape[1]) ** 0.5
            drawn = jax.random.uniform(jax.random.fold_in(key, number), leaf.shape, jnp.float32, -limit, limit)
            adapters[path] = np.asarray(drawn)
        else:
            adapters[path] = np.zeros(leaf.shape, np.float32)
    return adapters


def load_frozen(
    config: LlamaConfig, weights: dict[str, np.ndarray], dtype: DTypeLike = jnp.float32, layout: Layout = SINGLE
) -> Flat:
    """Place the frozen weights on the devices. `weights` is emptied meanwhile, so that only one copy is in memory.

    Raises UserError, which lists every array that is missing, extra or of the wrong shape.
    """
    _check(weights, abstract(config, None, 0, dtype).frozen, "weights")

    def parts(path: str, indices: Sequence[Index]) -> list[np.ndarray]:
        whole = weights.pop(path)
        return [whole[index] for index in indices]

    return read_frozen(config, parts, dtype, layout)


def read_frozen(config: LlamaConfig, read: Reader, dtype: DTypeLike = jnp.float32, layout: Layout = SINGLE) -> Flat:
    """Read the frozen weights onto the devices, one at a time; each process reads only the parts of its own devices.

    Raises UserError if the mesh does not divide the model.
    """
    wanted = abstract(config, None, 0, dtype, layout=layout).frozen
    return {path: layout.read(path, leaf.shape, dtype, read) for path, leaf in sorted(wanted.items())}


def assemble(
    config: LlamaConfig,
    frozen: Flat,
    *,
    lora: LoraConfig | None = None,
    trainable: Mapping[str, np.ndarray | jax.Array] | None = None,
    padding: Padding = (),
    layout: Layout = SINGLE,
) -> Split:
    """A model from its frozen weights and its trainable arrays: adapters, new rows and, if any, trained base rows.

    `trainable` decides which of them the model has: new rows by `vocabulary.new`, trained base rows by `BASE_ROWS`.
    For full fine-tuning it holds every path of `frozen` too, there is no `lora`, and nothing in the split is frozen:
    float32 arrays train and are rounded to the dtype of `frozen` where they are used. `frozen` itself is not changed.
    `padding` is the ranges of ids without a token, which are never produced (`vocabulary.padding_of`).
    Raises UserError, which lists every array that is missing, extra or of the wrong shape.
    """
    trainable = dict(trainable or {})
    full = not trainable.keys().isdisjoint(frozen)
    if full and lora is not None:
        raise UserError("both adapters and weights of the base are trained; choose either adapters or full fine-tuning")
    rows = trainable.get("vocabulary.new")
    dtype = frozen["vocabulary.base"].dtype
    # In full fine-tuning the base rows themselves train, so there are no trainable copies of them.
    train_base = not full and any(path in trainable for path in BASE_ROWS)
    new_rows = 0 if rows is None else rows.shape[0]
    split = abstract(config, lora, new_rows, dtype, train_base=train_base, padding=padding, layout=layout)
    wanted = {**split.trainable, **split.frozen} if full else split.trainable
    _check(trainable, wanted, "all weights and new rows" if full else "adapters and new rows")
    # `place` always copies, because training donates these buffers.
    arrays = {path: layout.place(path, trainable[path], np.float32) for path in sorted(wanted)}
    return Split(split.structure, arrays, {} if full else frozen)


def _check(given: Mapping[str, np.ndarray | jax.Array], wanted: Mapping[str, Any], what: str) -> None:
    faults = [f"{path} is missing" for path in sorted(wanted.keys() - given.keys())]
    faults += [f"{path} is not of this model" for path in sorted(given.keys() - wanted.keys())]
    faults += [
        f"{path} has shape {tuple(given[path].shape)}, wanted {tuple(leaf.shape)}"
        for path, leaf in sorted(wanted.items())
        if path in given and tuple(given[path].shape) != tuple(leaf.shape)
    ]
    if faults:
        raise UserError(f"{what}: {'; '.join(faults)}; is this the model that the config describes?")


def count_parameters(tree: Mapping[str, Any]) -> int:
    """The number of parameters in a flat tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in tree.values())
