"""Order of devices in a mesh over several TPU slices or GPU hosts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lm.errors import UserError
from lm.parallel.mesh import AXES, make_mesh


@dataclass(frozen=True)
class Device:
    """Device with the attributes that `make_mesh` reads."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "a device"


@dataclass(frozen=True)
class SliceDevice(Device):
    slice_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def order(devices, **sizes):
    """The ids of the devices by coordinates on the axes that are larger than 1."""
    mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, devices)
    return [[device.id for device in part.flat] for part in mesh.devices]


def hosts(n, of):
    """Devices of hosts in turns, as no cluster lists them."""
    return [Device(id=host * of + i, process_index=host) for i in range(of) for host in range(n)]


def slices(n):
    """Slices of 2×2 chips, the last one first."""
    return [
        SliceDevice(8 * s + 2 * y + x, 2 * s + y, "tpu", "TPU v4", s, (x, y, 0))
        for s in reversed(range(n))
        for y in range(2)
        for x in range(2)
    ]


def test_gpu_hosts_are_the_parts_of_the_slice_axis():
    assert order(hosts(2, 4), slice=2, fsdp=4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # More hosts than parts: whole hosts together.
    assert order(hosts(4, 2), slice=2, fsdp=2, tensor=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Without the axis the outermost axis crosses hosts, the innermost one does not.
    assert order(hosts(2, 4), stage=2, tensor=4) == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_tpu_slices_are_the_parts_of_the_slice_axis():
    found = order(slices(2), slice=2, data=2, tensor=2)
    assert [sorted(part) for part in found] == [[0, 1, 2, 3], [8, 9, 10, 11]]


def test_devices_of_one_host_are_cut_in_order():
    devices = [Device(i, 0, "cpu") for i in range(8)]
    assert order(devices, slice=4, tensor=2) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("devices", "sizes", "message"),
    [
        (slices(2), {"fsdp": 8}, r"slice=1, but the devices are 2 TPU slice\(s\): set it to 2"),
        (slices(1), {"slice": 2, "fsdp": 2}, r"slice=2, but the devices are 1 TPU slice"),
        (hosts(3, 2), {"slice": 2, "fsdp": 3}, r"slice=2 does not divide 3 hosts or slices of 2 d"),
        (
            hosts(2, 3)[:-1] + hosts(1, 1),
            {"slice": 2, "data": 3},
            r"slice=2 does not divide 2 hosts .* of 2 or",
        ),
    ],
)
def test_axis_that_does_not_follow_the_network_is_an_error(devices, sizes, message):
    with pytest.raises(UserError, match=message):
        order(devices, **sizes)
