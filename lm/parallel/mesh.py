"""Device mesh: named axes, outermost (slowest network) first, and the schedule of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

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


@dataclass(frozen=True)
class PipelineSchedule:
    """Schedule of a pipeline (circular for repeats > 1): what each stage computes when.

    Attributes:
        stages: size of the mesh axis "stage".
        microbatches: parts of a batch, a multiple of `stages`.
        repeats: times that a microbatch passes through all stages.
    """

    stages: int
    microbatches: int
    repeats: int

    @property
    def iterations(self) -> int:
        """Iterations of the pipeline's loop, the bubble included."""
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def bubble(self) -> float:
        """Fraction of the iterations in which a stage is idle."""
        return (self.stages - 1) / self.iterations

    def work(self, iteration: Any, stage: Any) -> tuple[Any, Any, Any]:
        """Return microbatch and repeat of a stage in an iteration, and whether it is busy."""
        unit = iteration - stage
        is_busy = (unit >= 0) & (unit < self.microbatches * self.repeats)
        return unit % self.microbatches, unit // self.microbatches, is_busy

    @property
    def slots(self) -> int:
        """Microbatches of the stream that each stage holds."""
        return self.microbatches // self.stages

    @property
    def joining_stage(self) -> int:
        """Stage at which an output of the last stage is put back into its slot of the stream.

        Stage 0 takes a microbatch again M iterations after it last did. By then the slot will
        have been shifted S - 1 times, less those before the output exists.
        """
        return self.stages - 1 - (self.stages - 1) // self.slots
