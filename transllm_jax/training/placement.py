"""The sharding of a training's state and batches on a mesh: the state like its parameters, a batch by rows."""

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
    """Shardings of the training state and of batches, which are computed in `accumulate` parts."""

    def __init__(self, layout: Layout, accumulate: int = 1) -> None:
        self.layout, self.accumulate = layout, accumulate

    def shapes(self, make: Callable[[Flat], TrainState], trainable: Flat) -> TrainState:
        """The shapes, dtypes and shardings of the state that `make` returns for the arrays that train.

        The optimizer's moments are sharded like the arrays that they belong to.
        """
        made = jax.eval_shape(make, trainable)

        def placed(path: Any, leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding(path, leaf))

        state: TrainState = jax.tree_util.tree_map_with_path(placed, made)
        return state

    def _sharding(self, path: Any, leaf: Any) -> Sharding | None:
        if self.layout.mesh is None:
            # Explicit, so that a checkpoint that was saved on a mesh can be restored to here.
            return SingleDeviceSharding(jax.local_devices()[0])
        # A scalar next to a parameter, such as a count, is not a moment of it.
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)] if leaf.ndim else []
        return self.layout.sharding(names[-1]) if names else self.layout.replicated

    def initial(self, make: Callable[[Flat], TrainState], trainable: Flat) -> TrainState:
        """The state that `make` returns, sharded; `trainable` is sharded already."""
        if self.layout.mesh is None:
            return make(trainable)
        state: TrainState = jax.jit(make, out_shardings=self.shardings(self.shapes(make, trainable)))(trainable)
        return state

    def shardings(self, shapes: Any) -> Any:
        """The tree of the shapes' shardings; None without a mesh."""
        return None if self.layout.mesh is None else jax.tree.map(lambda leaf: leaf.sharding, shapes)

    @property
    def metrics(self) -> Any:
        """The shardings of a step's metrics: replicated, so that every process can read them; None without a mesh."""
        everywhere: Any = self.layout.replicated
        return None if self.layout.mesh is None else Metrics(*[everywhere] * len(Metrics._fields))

    def shape(self, *shape: int) -> tuple[int, ...]:
        """The shape in which the step takes a batch's field [B, ..]: [accumulate, B / accumulate, ..] if in parts."""
        return (self.accumulate, shape[0] // self.accumulate, *shape[1:]) if self.accumulate > 1 else shape

    @property
    def batch_sharding(self) -> Sharding | None:
        """The sharding of a batch's fields; None without a mesh."""
        return self.layout.batch_sharding(parts=self.accumulate > 1)

    def local_rows(self, batch_size: int) -> np.ndarray:
        """The numbers of the rows of a batch that this process's devices hold, in order."""
        sharding = self.batch_sharding
        numbers = np.arange(batch_size).reshape(self.shape(batch_size))
        if sharding is None:
            return numbers.reshape(-1)
        found = sharding.addressable_devices_indices_map(numbers.shape).values()
        return np.unique(np.concatenate([numbers[index].reshape(-1) for index in found]))

    def to_devices(self, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """A batch on the devices. batch: this process's rows of it, `local_rows(batch_size)`."""
        sharding, here = self.batch_sharding, self.local_rows(batch_size)
        if sharding is None:
            return {field: jax.device_put(values.reshape(self.shape(*values.shape))) for field, values in batch.items()}
        numbers = np.arange(batch_size).reshape(self.shape(batch_size))
        found: dict[str, jax.Array] = {}
        for field, values in batch.items():

            def part(index: Any, values: np.ndarray = values) -> np.ndarray:
                return values[np.searchsorted(here, numbers[index[: numbers.ndim]])]

            shape = self.shape(batch_size, *values.shape[1:])
            found[field] = jax.make_array_from_callback(shape, sharding, part)
        return found

    def free_memory(self) -> int | None:
        """The free memory in bytes: of the first device, else of this machine; None if it is not known."""
        found = jax.local_devices()[0].memory_stats()
        if found and "bytes_limit" in found:
            return int(found["bytes_limit"]) - int(found["bytes_in_use"])
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def used_memory() -> int:
    """The peak memory in bytes: of the first device, or of this process if the device does not report it."""
    found = jax.local_devices()[0].memory_stats()
    if found and "peak_bytes_in_use" in found:
        return int(found["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
