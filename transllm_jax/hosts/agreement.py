"""A flag that any process of a run can raise and that all processes see in the same training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transllm_jax.hosts.runtime import Peers

if TYPE_CHECKING:
    import jax


class Agreement:
    """Whether any process has raised its flag, asked in each training step without stalling the devices.

    The answer is that of the previous step: it is computed by then, and the devices are busy with this step.
    """

    def __init__(self, peers: Peers) -> None:
        """Compiles a tiny program over all devices of the run."""
        self._alone = peers.count == 1
        self._last: int | None = None
        self._pending: jax.Array | None = None
        if self._alone:
            return
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
        each = NamedSharding(mesh, PartitionSpec("all"))

        def raised(value: int) -> jax.Array:
            one = jax.numpy.full((1,), value, jax.numpy.int32)
            mine = [jax.device_put(one, device) for device in mesh.devices.flat if device in mesh.local_devices]
            return jax.make_array_from_single_device_arrays((jax.device_count(),), each, mine)

        self._flags = raised(0), raised(1)
        self._any = jax.jit(jax.numpy.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def tell(self, step: int, flag: bool) -> bool:
        """Whether any process passed a true `flag` in the previous step; with one process, its own flag of this step.

        All processes have to call this once in each step, after the step was dispatched.
        """
        if self._last is not None and step <= self._last:
            raise ValueError(f"step {step} is told after step {self._last}")
        self._last = step
        if self._alone:
            return bool(flag)
        before, self._pending = self._pending, self._any(self._flags[bool(flag)])
        return before is not None and bool(before.addressable_data(0))
