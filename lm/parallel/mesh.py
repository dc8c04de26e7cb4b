"""Device mesh: named axes, outermost (slowest network) first, and the processes that share it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.errors import UserError

AXES = ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")
PRESETS = {"data": {"data": -1}, "fsdp": {"fsdp": -1}}


def axis_sizes(preset: str, sizes: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """Return the sizes of all mesh axes.

    Args:
        preset: a name of `PRESETS`, or "custom" for `sizes`.
        sizes: axis sizes; one of them may be -1 for the rest of the devices.
        n_devices: number of devices.

    Returns:
        Sizes by axis, in the order of `AXES`.

    Raises:
        UserError: the sizes do not multiply to `n_devices`.
    """
    requested = dict.fromkeys(AXES, 1) | dict(sizes if preset == "custom" else PRESETS[preset])
    fixed = prod(size for size in requested.values() if size != -1)
    resolved = {
        axis: max(n_devices // fixed, 1) if size == -1 else size for axis, size in requested.items()
    }
    if prod(resolved.values()) != n_devices:
        shown = ", ".join(f"{axis}={size}" for axis, size in requested.items() if size != 1)
        raise UserError(
            f"--config.parallel.mesh ({shown or 'one device'}) does not divide {n_devices} devices"
        )
    return resolved


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """Build the mesh of all axes over `devices`.

    Axis "slice" crosses the slow network; the others stay within its islands, along their fast
    links where `mesh_utils` knows these.
    """
    inside = tuple(sizes[axis] for axis in AXES if axis != "slice")
    grids = [
        mesh_utils.create_device_mesh(inside, part, allow_split_physical_axes=True)
        for part in split_by_network(devices, sizes["slice"])
    ]
    return Mesh(np.stack(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def split_by_network(devices: Sequence[jax.Device], n: int) -> list[list[jax.Device]]:
    """Split devices into `n` equal parts along the slow network.

    TPU slices must be the parts. GPU hosts, and CPU processes, are grouped where there are more
    than `n`. Within one host there is no slow network: the parts are in device order.

    Raises:
        UserError: the islands of the network do not make `n` equal parts.
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
    """Group devices by the value of an attribute, in the order of the values."""
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        groups.setdefault(getattr(device, attribute, 0), []).append(device)
    return [groups[value] for value in sorted(groups)]


# --- processes


def is_primary_host() -> bool:
    """Return whether this process writes the files of the run (metrics, progress, reports)."""
    return jax.process_index() == 0


def print_on_primary_host(message: str) -> None:
    """Print a line on stderr, on the primary host only."""
    if is_primary_host():
        print(message, file=sys.stderr, flush=True)


class CrossHostMax:
    """Maximum over processes of an integer, known to all of them one step later.

    `start` dispatches a tiny collective and `result` waits for it: around the dispatch of a step
    it costs no pause. With one process the result is the number itself.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        """Prepare the collective over all devices of the run."""
        self._several = jax.process_count() > 1
        if self._several:
            mesh = Mesh(np.asarray(devices), ("device",))
            self._sharding = NamedSharding(mesh, PartitionSpec("device"))
            self._shape = (len(devices),)
            self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def start(self, value: int) -> int | jax.Array:
        """Dispatch the maximum of this process's number; return the handle for `result`."""
        if not self._several:
            return value
        local = np.full((1,), value, np.int32)
        return self._max(jax.make_array_from_callback(self._shape, self._sharding, lambda _: local))

    @staticmethod
    def result(handle: int | jax.Array) -> int:
        """Return the maximum over all processes of the same call of `start`."""
        return int(jax.device_get(handle)) if isinstance(handle, jax.Array) else handle
