"""Where arrays lie: what trains and what is frozen on every device, a batch cut over them by its rows."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Devices:
    """The devices of this process as one axis, `data`."""

    def __init__(self) -> None:
        self.count = len(jax.devices())
        mesh = Mesh(np.array(jax.devices()), ("data",))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._by_rows = NamedSharding(mesh, PartitionSpec("data"))
        # Of a batch in micro-batches [parts, B / parts, ..]; None on one device, where there is nothing to say.
        self.parts = NamedSharding(mesh, PartitionSpec(None, "data")) if self.count > 1 else None

    def replicate(self, tree: Any) -> Any:
        """The tree's arrays on every device."""
        return jax.device_put(tree, self._everywhere)

    def shapes(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make` would give, on every device, as shapes without memory."""
        made = jax.eval_shape(make, *arguments)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._everywhere), made)

    def cut(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch, each array [B, ..] cut over the devices."""
        return {field: jax.device_put(values, self._by_rows) for field, values in batch.items()}

    def free_memory(self) -> int | None:
        """The bytes that the first device, or this machine, has left; None where nobody says."""
        found = jax.devices()[0].memory_stats()
        if found and "bytes_limit" in found:
            return int(found["bytes_limit"]) - int(found["bytes_in_use"])
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)

    def memory(self) -> int:
        """The most bytes that were in use at once: of the first device, or of this process where none says."""
        found = jax.devices()[0].memory_stats()
        if found and "peak_bytes_in_use" in found:
            return int(found["peak_bytes_in_use"])
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
