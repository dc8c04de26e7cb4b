"""The device mesh: named axes, outermost (slowest network) first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import jax
import numpy as np
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
            f"--config.parallel.mesh ({shown or 'one device'}) does not divide {n_devices} devices"
        )
    return resolved


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over `devices`: axis "slice" across the slow network, the others inside its islands
    and along their fast links, where these are known."""
    inside = tuple(sizes[axis] for axis in AXES if axis != "slice")
    grids = [
        mesh_utils.create_device_mesh(inside, part, allow_split_physical_axes=True)
        for part in split_by_network(devices, sizes["slice"])
    ]
    return Mesh(np.stack(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def split_by_network(devices: Sequence[jax.Device], n: int) -> list[list[jax.Device]]:
    """The devices in `n` equal parts, cut where the network is slow.

    TPU slices have to be the parts. GPU hosts (and processes of CPUs) go into one part together
    where there are more of them. Within one host there is no slow network: parts in order.
    """
    is_tpu = devices[0].platform == "tpu"
    by_slice, by_host = _groups(devices, "slice_index"), _groups(devices, "process_index")
    islands = by_slice if is_tpu or len(by_slice) > 1 else by_host
    if is_tpu and len(islands) != n:
        raise UserError(
            f"--config.parallel.mesh.slice={n}, but the devices are {len(islands)} TPU slice(s): "
            f"set it to {len(islands)}"
        )
    if len(islands) == 1:
        islands = [[device] for device in devices]
    sizes = {len(island) for island in islands}
    if n > 1 and (len(islands) % n or len(sizes) > 1):
        raise UserError(
            f"--config.parallel.mesh.slice={n} does not divide {len(islands)} hosts or slices of "
            f"{' or '.join(map(str, sorted(sizes)))} devices"
        )
    in_order = [device for island in islands for device in island]
    size = len(devices) // n
    return [in_order[i * size : (i + 1) * size] for i in range(n)]


def _groups(devices: Sequence[jax.Device], attribute: str) -> list[list[jax.Device]]:
    """Devices with the same value of an attribute together, in the order of the values."""
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        groups.setdefault(getattr(device, attribute, 0), []).append(device)
    return [groups[value] for value in sorted(groups)]
