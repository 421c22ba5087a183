"""How arrays are sharded over a mesh of devices: every axis of an array has a name, and a table gives its mesh axes.

Parameters are cut over `fsdp` (and `tensor`) and gathered for use, one layer at a time. Batches are cut over `data` and
`fsdp`. Heads and the feed-forward part are cut over `tensor`, and so is the length between the parts of a layer
(sequence parallelism, arXiv 2205.05198). Without a mesh, everything here returns its argument.
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
# A part of an array: one slice for each dimension.
Index = tuple[slice, ...]
# Takes the path of an array and indices of its parts; gives these parts.
Reader = Callable[[str, Sequence[Index]], list[np.ndarray]]


class _Rule(NamedTuple):
    """The mesh axes that cut one axis of a parameter: as it is stored, and as it is used in a product."""

    stored: tuple[str, ...] = ()
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
    # An adapter has one long side, so both mesh axes cut it: no two devices of a group store the same moments.
    "embed_adapter": _Rule(("fsdp", "tensor")),
    "heads_adapter": _Rule(("tensor", "fsdp"), ("tensor",)),
    "kv_heads_adapter": _Rule(("tensor", "fsdp"), ("tensor",)),
    "mlp_adapter": _Rule(("tensor", "fsdp"), ("tensor",)),
    # Cut along D, which the mesh divides, and not by rows, whose number is arbitrary.
    "embed_table": _Rule(("fsdp", "tensor")),
}
_BATCH = ("data", "fsdp")
# The mesh axes that cut one axis of a computed value (an activation).
_ACTIVATION_AXES = {
    "batch": _BATCH,
    "batch_data": ("data",),
    "length": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
    "embed_table": ("fsdp", "tensor"),
}
# The names of the axes of each linear layer's input and output.
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
    """The name of each axis of the parameter at a path. Raises KeyError for a path that no model has."""
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
    """The mesh axes that cut each dimension of the stored parameter."""
    return tuple(_RULES[name].stored for name in logical_axes(path))


def _spec(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(one if len(one) > 1 else one[0] if one else None for one in axes))


@dataclass(frozen=True)
class Layout:
    """How arrays are sharded over `mesh`, a Mesh with the axes `AXES` (None: one device), and the kernel of attention.

    stationary: parameters are used where they are stored, and a batch's rows are cut over `data` alone. This is for
    decoding, where a token's states are much smaller than the weights.
    interpret: the kernel runs as plain JAX, for tests on a CPU.
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
        """The layout for decoding, one token for each row at a time."""
        return replace(self, stationary=True)

    @property
    def platform(self) -> str:
        """The devices' platform: cpu, gpu or tpu."""
        return str(jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform)

    @property
    def device_kind(self) -> str:
        """The name that JAX gives the devices, such as TPU v5 lite."""
        return str((jax.local_devices()[0] if self.mesh is None else self.mesh.devices.flat[0]).device_kind)

    def size(self, *axes: str) -> int:
        """The number of devices along the given mesh axes, or along all of them if none is given."""
        if self.mesh is None:
            return 1
        return int(np.prod([self.mesh.shape[axis] for axis in axes or AXES]))

    @property
    def batch_parts(self) -> int:
        """The number of parts into which a batch's rows are cut."""
        return self.size(*_BATCH)

    # Parameters.

    def sharding(self, path: str) -> NamedSharding | None:
        """The sharding in which a parameter is stored; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, _spec(partition(path)))

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding with a copy on each device; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def batch_sharding(self, *, parts: bool = False) -> NamedSharding | None:
        """The sharding of a batch's fields [B, ..], or with `parts` [parts, B / parts, ..]; None without a mesh."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(None, _BATCH) if parts else PartitionSpec(_BATCH))

    @property
    def cache_sharding(self) -> NamedSharding | None:
        """The sharding of the decoding cache [L, B, K, S, H]; None without a mesh."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(None, _BATCH, "tensor"))

    def require(self, shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> None:
        """Raise UserError, which lists them, if the mesh does not divide a parameter (by path) or a number of heads."""
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
        """Put a parameter on its devices: every process has the whole array and takes its own devices' parts."""
        if self.mesh is None:
            # Always a copy, because training donates these buffers.
            return jnp.array(array, dtype or array.dtype)
        return self.read(path, np.shape(array), dtype or array.dtype, lambda _, parts: [array[part] for part in parts])

    def read(self, path: str, shape: tuple[int, ...], dtype: Any, read: Reader) -> jax.Array:
        """Read a parameter onto its devices: every process reads only its own devices' parts, each part once."""
        sharding = self.sharding(path)
        if sharding is None:
            return jnp.asarray(read(path, [(slice(None),) * len(shape)])[0], dtype)
        # Several devices may hold the same part. Slices have no hash in Python 3.11, so a part's key is its text.
        holders: dict[str, list[jax.Device]] = {}
        wanted: dict[str, Index] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            holders.setdefault(str(index), []).append(device)
            wanted[str(index)] = index
        parts = read(path, list(wanted.values()))
        shards = [
            jax.device_put(np.asarray(part, dtype), device)
            for key, part in zip(wanted, parts, strict=True)
            for device in holders[key]
        ]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    def gathered(self, parameter: jax.Array, *axes: str) -> jax.Array:
        """A parameter (without the axis of layers) as a product uses it; its gradient is cut as the parameter is.

        It is gathered here, inside a layer, so that only the layers being computed are whole.
        """
        if self.mesh is None or self.stationary:
            return parameter
        stored, used = (_spec([getattr(_RULES[name], state) for name in axes]) for state in ("stored", "used"))
        return _resharded(parameter, NamedSharding(self.mesh, used), NamedSharding(self.mesh, stored))

    def stored_spec(self, *axes: str) -> PartitionSpec:
        """How the stored parameter (without the axis of layers) is cut."""
        return _spec([_RULES[name].stored for name in axes])

    @staticmethod
    def tokens_spec(name: str | None) -> PartitionSpec:
        """How values [tokens, axis `name`] are cut: tokens like the rows of a batch, each row whole."""
        return PartitionSpec(_BATCH, _ACTIVATION_AXES.get(name or "") if name != "embed" else None)

    def parts(self, gradient: jax.Array, name: str) -> jax.Array:
        """Inside a shard_map: an adapter's gradient [size, R] as parts [fsdp, n, R], to be summed over devices.

        `name` is the axis of its long side. D is whole on the devices of `tensor`, so each of them takes its own part.
        """
        fsdp, tensor = self.size("fsdp"), self.size("tensor")
        if name != "embed":
            return gradient.reshape(fsdp, -1, gradient.shape[1])
        cut = gradient.reshape(fsdp, tensor, -1, gradient.shape[1])
        return jax.lax.dynamic_index_in_dim(cut, jax.lax.axis_index("tensor"), axis=1, keepdims=False)

    # Activations.

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """Shard an activation by its axes' names (None: whole). An axis that the mesh does not divide stays whole."""
        sharding = self._activation_sharding(x.shape, names)
        return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    def residual(self, x: jax.Array) -> jax.Array:
        """Shard the residual stream [B, T, D]."""
        return self.constrain(x, "batch", "length", None)

    def whole_rows(self, x: jax.Array) -> jax.Array:
        """States [B, T, D] with every position of a row on one device; their gradient is sharded as by `residual`."""
        there, back = (
            self._activation_sharding(x.shape, names) for names in (("batch", None, None), ("batch", "length", None))
        )
        return x if there is None or back is None else _resharded(x, there, back)

    def _activation_sharding(self, shape: Sequence[int], names: Sequence[str | None]) -> NamedSharding | None:
        if self.mesh is None:
            return None
        axes = []
        for size, name in zip(shape, names, strict=True):
            cut = _ACTIVATION_AXES[name] if name else ()
            if self.stationary and name in ("batch", "length"):
                cut = ("data",) if name == "batch" else ()
            axes.append(cut if cut and size % self.size(*cut) == 0 else ())
        return NamedSharding(self.mesh, _spec(axes))


SINGLE = Layout()


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _resharded(x: jax.Array, there: NamedSharding, back: NamedSharding) -> jax.Array:
    """x in the sharding `there`, with its gradient in the sharding `back`."""
    # The derivative of a sharding constraint is the same constraint, which would gather the gradient, too.
    return jax.lax.with_sharding_constraint(x, there)


def _resharded_forward(x: jax.Array, there: NamedSharding, back: NamedSharding) -> tuple[jax.Array, None]:
    return _resharded(x, there, back), None


def _resharded_backward(there: NamedSharding, back: NamedSharding, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(g, back),)


_resharded.defvjp(_resharded_forward, _resharded_backward)


def sum_scattered(parts: jax.Array, axes: tuple[str, ...], *, unroll: bool = False) -> jax.Array:
    """Inside a shard_map: sum an array in parts [devices, n, ..] over the devices of mesh axes, as by a reduce-scatter.

    Each device gets the sum of its own part, [n, ..], like `jax.lax.psum_scatter`, but from a ring in both directions.
    A TPU's compiler turns psum_scatter into a sum of everything on every device, which takes twice the traffic and
    memory for the whole; or into a loop around the product before it, which reads its operands in every round.
    unroll: the rounds are unrolled, so that the compiler can overlap them with other work; this takes more memory.
    """
    devices, me = parts.shape[0], jax.lax.axis_index(axes)
    middle = parts.shape[1] // 2
    # Half of each part travels in one direction around the ring, and half in the other.
    directions = ((parts[:, :middle], 1), (parts[:, middle:], -1))

    def own(number: jax.Array | int) -> tuple[jax.Array, ...]:
        # A device's part starts at the next device in the direction of travel, and reaches the device itself last.
        return tuple(
            jax.lax.dynamic_index_in_dim(half, (me - step * (number + 1)) % devices, keepdims=False)
            for half, step in directions
        )

    def add(number: jax.Array | int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        passed = (
            jax.lax.ppermute(half, axes, [(device, (device + step) % devices) for device in range(devices)])
            for half, (_, step) in zip(sums, directions, strict=True)
        )
        return tuple(half + mine for half, mine in zip(passed, own(number), strict=True))

    return jnp.concatenate(jax.lax.fori_loop(1, devices, add, own(0), unroll=unroll))
