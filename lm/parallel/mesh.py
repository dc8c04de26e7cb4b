"""The device mesh: named axes, outermost (slowest network) first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lm.errors import UserError

AXES = ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")
PRESETS = {"data": {"data": -1}, "fsdp": {"fsdp": -1}}


def axis_sizes(preset: str, sizes: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """Sizes of all axes for `n_devices`, with the one that is -1 filled in.

    `preset` names a mesh of its own; "custom" takes `sizes`.
    """
    asked = dict.fromkeys(AXES, 1) | dict(sizes if preset == "custom" else PRESETS[preset])
    fixed = prod(size for size in asked.values() if size != -1)
    resolved = {
        axis: max(n_devices // fixed, 1) if size == -1 else size for axis, size in asked.items()
    }
    if prod(resolved.values()) != n_devices:
        shown = ", ".join(f"{axis}={size}" for axis, size in asked.items() if size != 1)
        raise UserError(
            f"config.parallel.mesh ({shown or 'one device'}) does not divide {n_devices} devices"
        )
    return resolved


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over `devices` whose axes follow the hardware's network where it is known."""
    shape = tuple(sizes[axis] for axis in AXES)
    if sizes["slice"] > 1 and hasattr(devices[0], "slice_index"):
        within = (1, *shape[1:])
        across = (shape[0], *(1 for _ in shape[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
