"""A training's state and batches on a mesh: the state where its parameters lie, a batch cut by its rows."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from transllm_jax.model.layout import Layout
from transllm_jax.model.parameters import Flat
from transllm_jax.training.step import Metrics, TrainState


class Placement:
    """Where state and batches lie; a batch is computed in `accumulate` parts."""

    def __init__(self, layout: Layout, accumulate: int = 1) -> None:
        self.layout, self.accumulate = layout, accumulate

    def shapes(self, make: Callable[[Flat], TrainState], trainable: Flat) -> TrainState:
        """What `make` gives of the arrays that train, as shapes that say where they lie.

        The optimizer's moments lie as the arrays that they belong to.
        """
        made = jax.eval_shape(make, trainable)

        def placed(path: Any, leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding(path, leaf))

        state: TrainState = jax.tree_util.tree_map_with_path(placed, made)
        return state

    def _sharding(self, path: Any, leaf: Any) -> Sharding | None:
        if self.layout.mesh is None:
            # Said, so that what a mesh has saved can be read to here.
            return SingleDeviceSharding(jax.local_devices()[0])
        # A scalar beside a parameter, such as a count, is no moment of it.
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)] if leaf.ndim else []
        return self.layout.sharding(names[-1]) if names else self.layout.replicated

    def initial(self, make: Callable[[Flat], TrainState], trainable: Flat) -> TrainState:
        """The state that `make` gives, where it is to lie; `trainable` is where it is already."""
        if self.layout.mesh is None:
            return make(trainable)
        state: TrainState = jax.jit(make, out_shardings=self.shardings(self.shapes(make, trainable)))(trainable)
        return state

    def shardings(self, shapes: Any) -> Any:
        """Of the shapes' shardings, a tree; None without a mesh."""
        return None if self.layout.mesh is None else jax.tree.map(lambda leaf: leaf.sharding, shapes)

    @property
    def metrics(self) -> Any:
        """Where a step's metrics lie: every process can read them."""
        everywhere: Any = self.layout.replicated
        return None if self.layout.mesh is None else Metrics(*[everywhere] * len(Metrics._fields))

    def shape(self, *shape: int) -> tuple[int, ...]:
        """The shape of a batch's field [B, ..] as the step takes it: [accumulate, B / accumulate, ..] in parts."""
        return (self.accumulate, shape[0] // self.accumulate, *shape[1:]) if self.accumulate > 1 else shape

    @property
    def batch_sharding(self) -> Sharding | None:
        """Where a field of a batch lies."""
        return self.layout.batch_sharding(parts=self.accumulate > 1)

    def places(self, batch_size: int) -> np.ndarray:
        """The rows of a batch that this process's devices hold, in order."""
        sharding = self.batch_sharding
        numbers = np.arange(batch_size).reshape(self.shape(batch_size))
        if sharding is None:
            return numbers.reshape(-1)
        found = sharding.addressable_devices_indices_map(numbers.shape).values()
        return np.unique(np.concatenate([numbers[index].reshape(-1) for index in found]))

    def cut(self, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """A batch on the devices, of its rows `places(batch_size)`."""
        sharding, places = self.batch_sharding, self.places(batch_size)
        if sharding is None:
            return {field: jax.device_put(values.reshape(self.shape(*values.shape))) for field, values in batch.items()}
        numbers = np.arange(batch_size).reshape(self.shape(batch_size))
        found: dict[str, jax.Array] = {}
        for field, values in batch.items():

            def part(index: Any, values: np.ndarray = values) -> np.ndarray:
                return values[np.searchsorted(places, numbers[index[: numbers.ndim]])]

            shape = self.shape(batch_size, *values.shape[1:])
            found[field] = jax.make_array_from_callback(shape, sharding, part)
        return found

    def free_memory(self) -> int | None:
        """The bytes that the first device, or this machine, has left; None where nobody says."""
        found = jax.local_devices()[0].memory_stats()
        if found and "bytes_limit" in found:
            return int(found["bytes_limit"]) - int(found["bytes_in_use"])
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def used_memory() -> int:
    """The most bytes that were in use at once: of the first device, or of this process where none says."""
    found = jax.local_devices()[0].memory_stats()
    if found and "peak_bytes_in_use" in found:
        return int(found["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
