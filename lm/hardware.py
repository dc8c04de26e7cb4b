"""What chips can do, as their makers publish it; every figure is of one JAX device.

A TPU7x chip is two devices. One-way bandwidths; of TPUs that of one link to a neighbour. Sources:
Google's pages of each TPU and, for v4's links, Jouppi et al. 2023, table 4; NVIDIA's data sheets;
memory of GPUs as XLA's descriptions of them have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from lm.accounting.flops import PEAK_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Bytes, FLOP/s and bytes/s of a device; None where nothing is published.

    `link`: to a neighbour in the torus, of GPUs to the other GPUs of the host. `scale_out`: to
    other slices or hosts. A dimension of the torus is a ring where `ring` divides it.
    """

    memory: int | None
    peak_flops: float | None = None
    memory_bandwidth: float | None = None
    link: float = inf
    scale_out: float | None = None
    ring: int = 0
    dimensions: int = 0
    longest_side: int = 0


def _tpu(kind: str, memory: float, *bandwidths: float | None, **shape: int) -> Chip:
    return Chip(int(memory), PEAK_FLOPS[kind], *bandwidths, **shape)  # type: ignore[arg-type]


_3D = {"ring": 4, "dimensions": 3, "longest_side": 64}
_2D = {"ring": 16, "dimensions": 2, "longest_side": 16}

CHIPS: dict[str, Chip] = {
    "v4": _tpu("TPU v4", 32 * GIB, 1.2e12, 50e9, None, **_3D),
    "v5e": _tpu("TPU v5e", 16 * GIB, 819e9, 50e9, 3.125e9, **_2D),
    "v5p": _tpu("TPU v5p", 95 * GIB, 2.765e12, 100e9, 6.25e9, **_3D),
    "v6e": _tpu("TPU v6e", 32 * GIB, 1.638e12, 100e9, 12.5e9, **_2D),
    "7x": _tpu("TPU7x", 96 * GIB, 3.69e12, 50e9, 6.25e9, **_3D),
    "a100": Chip(85_100_068_864, PEAK_FLOPS["NVIDIA A100"], 2.039e12, 300e9, 25e9),
    "h100": Chip(84_942_979_072, PEAK_FLOPS["NVIDIA H100"], 3.35e12, 450e9, 50e9),
    "h200": Chip(151_397_597_184, PEAK_FLOPS["NVIDIA H200"], 4.8e12, 450e9, 50e9),
    "b200": Chip(191_514_411_008, PEAK_FLOPS["NVIDIA B200"], 7.7e12, 900e9, 50e9),
}


@dataclass(frozen=True)
class Wire:
    """The network under a collective: "ici" inside a slice or host, "dcn" between them; bytes/s of
    a device; and over how many devices of a slice what crosses it is spread."""

    network: str
    bandwidth: float | None
    spread: int = 1


def wire(chip: Chip, group: Sequence[Any], sides: Sequence[int]) -> Wire:
    """The network that joins a group of devices; `sides` are those of the slice's torus.

    In a torus a group sends along every dimension that it spans, both ways round a ring.
    """
    places = {place(device) for device in group}
    if len(places) > 1:
        return Wire("dcn", chip.scale_out, len(group) // len(places))
    if not chip.dimensions:
        return Wire("ici", chip.link)
    coordinates = zip(*(device.coords for device in group), strict=True)
    spanned = [side for side, along in zip(sides, coordinates, strict=False) if len({*along}) > 1]
    ways = sum(2 if side > 2 and side % chip.ring == 0 else 1 for side in spanned)
    return Wire("ici", ways * chip.link if ways else inf)


def place(device: Any) -> int:
    """The slice of a TPU; the host of a GPU."""
    if device.platform == "tpu":
        return getattr(device, "slice_index", None) or 0
    return device.process_index
