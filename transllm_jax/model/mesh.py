"""A mesh of devices from the sizes in a config."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from transllm_jax.choices import Attention
from transllm_jax.errors import UserError
from transllm_jax.model.layout import AXES, Layout


def parse_mesh(text: str) -> dict[str, int]:
    """Parse a mesh such as `fsdp=8,tensor=2`. Raises UserError if the text is not of that form."""
    mesh: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(rf"\s*({'|'.join(AXES)})\s*=\s*([1-9]\d*)\s*", part)
        if not match or match[1] in mesh:
            raise UserError(
                f"the mesh {text!r} is not of the form fsdp=8,tensor=2; correct {part.strip()!r} (write AXIS=NUMBER "
                f"with commas, each axis once; axes: {', '.join(AXES)})"
            )
        mesh[match[1]] = int(match[2])
    return mesh


def mesh_shape(devices: int, data: int | None, fsdp: int | None, tensor: int) -> tuple[int, int, int]:
    """Sizes of the axes data, fsdp and tensor for this number of devices.

    An axis that is None gets the remaining devices, fsdp first. Raises UserError for sizes whose product is not the
    number of devices.
    """
    left, rest = divmod(devices, (data or 1) * (fsdp or 1) * tensor)
    if fsdp is None:
        fsdp, left = left, 1
    elif data is None:
        data, left = left, 1
    if rest or left != 1 or not fsdp or data == 0:
        given = {"data": data, "fsdp": fsdp, "tensor": tensor}
        said = ", ".join(f"{name}={size}" for name, size in given.items() if size)
        raise UserError(f"mesh: {said} does not make {devices} devices; choose sizes whose product is {devices}")
    return data or 1, fsdp, tensor


def make_layout(
    shape: tuple[int, int, int], attention: Attention = "auto", devices: Sequence[jax.Device] | None = None
) -> Layout:
    """The layout for a mesh of this shape, over all devices of the run or the given ones; one device needs no mesh.

    Devices that communicate most are neighbours: the mesh's last axes are assigned to a TPU's torus first.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) == 1:
        only = devices[0]
        # A device that is not attached is a target that a program is compiled for, and only a mesh can name it.
        mesh = None if only in jax.devices() else Mesh(np.array([[[only]]]), AXES)
        return Layout(mesh, attention=attention)
    laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Layout(Mesh(laid, AXES), attention=attention)
