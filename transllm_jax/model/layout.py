"""Where arrays lie on a mesh of devices: names for the axes of every array, and the one table from names to mesh axes.

Parameters are cut over `fsdp` (and `tensor`) and gathered where they are used, a layer at a time; batches are cut over
`data` and `fsdp`; heads and the feed-forward part are cut over `tensor`, and between the layers so is the length
(sequence parallelism, arXiv 2205.05198). Without a mesh everything here gives back what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transllm_jax.choices import Attention
from transllm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# plain: our own, on any device. splash: the TPU's (transllm_jax.model.splash). auto: splash where it can be.
# A part of an array: a slice for each dimension.
Index = tuple[slice, ...]
# The path of an array, and parts of it -> these parts.
Reader = Callable[[str, Sequence[Index]], list[np.ndarray]]


class _Rule(NamedTuple):
    """The mesh axes that cut an axis of a parameter where it is kept, and where it is used."""

    kept: tuple[str, ...] = ()
    used: tuple[str, ...] = ()


_RULES = {
    "layers": _Rule(),
    "norm": _Rule(),
    "bias": _Rule(),
    "rank": _Rule(),
    "vocabulary": _Rule(),
    "embed": _Rule(("fsdp",)),
    "heads": _Rule(("tensor",), ("tensor",)),
    "kv_heads": _Rule(("tensor",), ("tensor",)),
    "mlp": _Rule(("tensor",), ("tensor",)),
    # An adapter has one long side, so both axes cut it: moments of an adapter are nowhere twice.
    "embed_adapter": _Rule(("fsdp", "tensor")),
    "heads_adapter": _Rule(("tensor", "fsdp"), ("tensor",)),
    "kv_heads_adapter": _Rule(("tensor", "fsdp"), ("tensor",)),
    "mlp_adapter": _Rule(("tensor", "fsdp"), ("tensor",)),
    # Not by rows: their number divides by nothing, and D always does.
    "embed_table": _Rule(("fsdp", "tensor")),
}
_BATCH = ("data", "fsdp")
# Of values that are computed.
_COMPUTED = {
    "batch": _BATCH,
    "batch_data": ("data",),
    "length": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
    "embed_table": ("fsdp", "tensor"),
}
# The axes of a linear layer's input and output, by its name.
LINEAR = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv_heads"),
    "v": ("embed", "kv_heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}


def logical_axes(path: str) -> tuple[str, ...]:
    """The name of each axis of a parameter, by its path. Raises KeyError for a path that no model has."""
    parent, _, kind = path.rpartition(".")
    if parent == "vocabulary":
        return ("vocabulary", "embed_table")
    if kind == "scale":
        return ("norm",) if parent == "final_norm" else ("layers", "norm")
    inner, outer = LINEAR[parent.rpartition(".")[2]]
    return {
        "kernel": ("layers", inner, outer),
        "a": ("layers", f"{inner}_adapter", "rank"),
        "b": ("layers", "rank", f"{outer}_adapter"),
        "bias": ("layers", "bias"),
    }[kind]


def partition(path: str) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that cut each dimension of a parameter where it is kept."""
    return tuple(_RULES[name].kept for name in logical_axes(path))


def _spec(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(one if len(one) > 1 else one[0] if one else None for one in axes))


@dataclass(frozen=True)
class Layout:
    """How arrays lie on `mesh`, a Mesh with the axes `AXES` (None: on one device), and the kernel of attention.

    stationary: parameters are used where they lie, and rows of a batch are cut over `data` alone: for decoding, where a
    token's states are small and the weights are not. interpret: the kernel runs as plain JAX, for tests on a CPU.
    """

    mesh: Mesh | None = None
    stationary: bool = False
    attention: Attention = "auto"
    interpret: bool = field(default=False)

    def __post_init__(self) -> None:
        if self.mesh is not None and self.mesh.axis_names != AXES:
            raise ValueError(f"a mesh with axes {self.mesh.axis_names}, wanted {AXES}")

    @property
    def decoding(self) -> Layout:
        """The same for steps of a token each."""
        return replace(self, stationary=True)

    @property
    def platform(self) -> str:
        """What it runs on: cpu, gpu, tpu."""
        return str(jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform)

    @property
    def device_kind(self) -> str:
        """The name that JAX gives the devices, such as TPU v5 lite."""
        return str((jax.local_devices()[0] if self.mesh is None else self.mesh.devices.flat[0]).device_kind)

    def size(self, *axes: str) -> int:
        """The number of devices along mesh axes; along all without any."""
        if self.mesh is None:
            return 1
        return int(np.prod([self.mesh.shape[axis] for axis in axes or AXES]))

    @property
    def batch_parts(self) -> int:
        """The number of parts that a batch's rows are cut into."""
        return self.size(*_BATCH)

    # Parameters.

    def sharding(self, path: str) -> NamedSharding | None:
        """Where a parameter is kept; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, _spec(partition(path)))

    @property
    def everywhere(self) -> NamedSharding | None:
        """A copy on each device; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def rows(self, *, parts: bool = False) -> NamedSharding | None:
        """Of a batch's fields [B, ..], cut by rows; with `parts` of [parts, B / parts, ..]."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(None, _BATCH) if parts else PartitionSpec(_BATCH))

    @property
    def cache(self) -> NamedSharding | None:
        """Of the keys and values [L, B, K, S, H] of generation; None without a mesh."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(None, _BATCH, "tensor"))

    def require(self, shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> None:
        """Raises UserError that lists which parameters, by path, and numbers of heads the mesh does not divide."""
        wrong = [
            f"{name} {count} by tensor={self.size('tensor')}"
            for name, count in heads.items()
            if count % self.size("tensor")
        ]
        for path, shape in shapes.items():
            for size, axes in zip(shape, partition(path), strict=True):
                if axes and size % self.size(*axes):
                    over = ",".join(f"{axis}={self.size(axis)}" for axis in axes)
                    wrong.append(f"{path} {list(shape)}, its {size} by {over}")
        if wrong:
            raise UserError(f"the mesh does not divide the model: {'; '.join(wrong)}; choose other sizes of mesh")

    def place(self, path: str, array: Any, dtype: Any = None) -> jax.Array:
        """A parameter where it is kept; each process has the whole array, and gives its devices their parts of it."""
        if self.mesh is None:
            # A copy, always: training donates these buffers.
            return jnp.array(array, dtype or array.dtype)
        return self.read(path, np.shape(array), dtype or array.dtype, lambda _, parts: [array[part] for part in parts])

    def read(self, path: str, shape: tuple[int, ...], dtype: Any, read: Reader) -> jax.Array:
        """A parameter where it is kept, of which this process reads what its devices hold, each part once."""
        sharding = self.sharding(path)
        if sharding is None:
            return jnp.asarray(read(path, [(slice(None),) * len(shape)])[0], dtype)
        found = sharding.addressable_devices_indices_map(shape)
        places: dict[str, list[jax.Device]] = {}
        wanted: dict[str, Index] = {}
        for device, index in found.items():
            assert index is not None
            places.setdefault(str(index), []).append(device)
            wanted[str(index)] = index
        parts = read(path, list(wanted.values()))
        shards = [
            jax.device_put(np.asarray(part, dtype), device)
            for key, part in zip(wanted, parts, strict=True)
            for device in places[key]
        ]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    def used(self, parameter: jax.Array, *axes: str) -> jax.Array:
        """A parameter (without its axis of layers) as a product takes it; its gradient goes back to where it is kept.

        Gathering is here, inside of a layer, so that at most the layers at work are whole.
        """
        if self.mesh is None or self.stationary:
            return parameter
        kept, used = (_spec([getattr(_RULES[name], of) for name in axes]) for of in ("kept", "used"))
        return _moved(parameter, NamedSharding(self.mesh, used), NamedSharding(self.mesh, kept))

    def kept_spec(self, *axes: str) -> PartitionSpec:
        """How a parameter (without its axis of layers) is cut where it is kept."""
        return _spec([_RULES[name].kept for name in axes])

    @staticmethod
    def tokens_spec(name: str | None) -> PartitionSpec:
        """How values [tokens, ..] with an axis of this name are cut: tokens as the batch, with whole rows."""
        return PartitionSpec(_BATCH, _COMPUTED.get(name or "") if name != "embed" else None)

    def parts(self, gradient: jax.Array, name: str) -> jax.Array:
        """Inside of a shard_map: the gradient of an adapter's long side [size, R] as parts [fsdp, n, R] to be summed.

        `name` is that of the side's axis. D is whole on the devices of `tensor`, of which each keeps its own part.
        """
        fsdp, tensor = self.size("fsdp"), self.size("tensor")
        if name != "embed":
            return gradient.reshape(fsdp, -1, gradient.shape[1])
        cut = gradient.reshape(fsdp, tensor, -1, gradient.shape[1])
        return jax.lax.dynamic_index_in_dim(cut, jax.lax.axis_index("tensor"), axis=1, keepdims=False)

    # What is computed.

    def computed(self, x: jax.Array, *names: str | None) -> jax.Array:
        """A value whose axes have these names (None: whole). What a mesh axis does not divide stays whole."""
        sharding = self._computed(x.shape, names)
        return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    def between(self, x: jax.Array) -> jax.Array:
        """States [B, T, D] between the parts of a layer."""
        return self.computed(x, "batch", "length", None)

    def whole_rows(self, x: jax.Array) -> jax.Array:
        """States [B, T, D] with every position of a row on one device; their gradient goes back to `between`."""
        there, back = (self._computed(x.shape, names) for names in (("batch", None, None), ("batch", "length", None)))
        return x if there is None or back is None else _moved(x, there, back)

    def _computed(self, shape: Sequence[int], names: Sequence[str | None]) -> NamedSharding | None:
        if self.mesh is None:
            return None
        axes = []
        for size, name in zip(shape, names, strict=True):
            cut = _COMPUTED[name] if name else ()
            if self.stationary and name in ("batch", "length"):
                cut = ("data",) if name == "batch" else ()
            axes.append(cut if cut and size % self.size(*cut) == 0 else ())
        return NamedSharding(self.mesh, _spec(axes))


SINGLE = Layout()


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, there: NamedSharding, back: NamedSharding) -> jax.Array:
    # The derivative of a constraint is the same constraint, and would gather the gradient, too.
    return jax.lax.with_sharding_constraint(x, there)


def _moved_forward(x: jax.Array, there: NamedSharding, back: NamedSharding) -> tuple[jax.Array, None]:
    return _moved(x, there, back), None


def _moved_backward(there: NamedSharding, back: NamedSharding, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(g, back),)


_moved.defvjp(_moved_forward, _moved_backward)


def sum_scattered(parts: jax.Array, axes: tuple[str, ...], *, unroll: bool = False) -> jax.Array:
    """Inside of a shard_map: of an array in parts [devices, n, ..], the sum over the devices of mesh axes.

    Each device gets the sum of its own part, [n, ..], as from `jax.lax.psum_scatter`, but by a ring in both directions.
    A TPU's compiler makes of that one a sum of everything on every device, which takes twice the traffic, and memory
    for it all; or a loop around the product before it, which reads its operands in every round.
    unroll: the rounds stand one by one, so that a compiler can lay other work beside them, and keep more at once.
    """
    devices, me = parts.shape[0], jax.lax.axis_index(axes)
    half = parts.shape[1] // 2
    ways = ((parts[:, :half], 1), (parts[:, half:], -1))

    def own(number: jax.Array | int) -> tuple[jax.Array, ...]:
        # The part of a device begins at the one after it (or before it, the other way round), and comes to it last.
        return tuple(
            jax.lax.dynamic_index_in_dim(half, (me - step * (number + 1)) % devices, keepdims=False)
            for half, step in ways
        )

    def add(number: jax.Array | int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        passed = (
            jax.lax.ppermute(half, axes, [(device, (device + step) % devices) for device in range(devices)])
            for half, (_, step) in zip(sums, ways, strict=True)
        )
        return tuple(half + mine for half, mine in zip(passed, own(number), strict=True))

    return jnp.concatenate(jax.lax.fori_loop(1, devices, add, own(0), unroll=unroll))
