"""Topologies to compile for without the hardware: TPU slices, GPU hosts, simulated CPU devices.

`v5p:4x4x4` is a torus of chips (Google Cloud's `v5p-128`), `h100:2x8` two hosts of eight GPUs
(also `16xh100`), `cpu:8` eight CPU devices.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from math import inf, prod
from typing import Any

import jax

from lm.errors import UserError, missing_package, nearest
from lm.hardware import (
    CHIPS,
    COMMON_TARGET,
    GPU_TARGETS,
    GPUS,
    LIBTPU_NAMES,
    TOPOLOGY_OPTIONS,
    Chip,
)

# Without these, libtpu queries the metadata server, and a second process is locked out.
TPU_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
EXAMPLES = "v5p:4x4x4, v5p-128, v5e:16x16, v5litepod-256, h100:1x8, 8xh100, cpu:8"
GPUS_A_HOST, MOST_CPU_DEVICES = 8, 4096
GOOGLE_CLOUD_TYPES = ("v4", "v5p", "v5e", "v6e")
_COUNTED, _SIZES = (*GPUS, "cpu"), r"\d{1,6}(?:x\d{1,6})*"


@dataclass(frozen=True)
class Topology:
    """Devices to compile for; `sides` are the dimensions of a TPU slice in chips."""

    name: str
    chip: Chip
    sides: tuple[int, ...]
    devices: Sequence[Any]


def topology(name: str, n_slices: int = 1) -> Topology:
    """Describe the devices of a topology name, in `n_slices` TPU slices or groups of GPU hosts.

    Names are `KIND:SHAPE` or anything `kind_and_shape` accepts.

    Raises:
        UserError: The name is invalid, or the compiler for the chip is not installed.
    """
    given, name = name, kind_and_shape(name)
    kind, _, shape = name.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(
            f"--topology {given}: write KIND:SHAPE or its usual name, such as {EXAMPLES}"
        )
    sides = tuple(int(side) for side in shape.split("x"))
    if kind == "cpu":
        return _cpu(name, sides, n_slices)
    if kind not in CHIPS:
        known = (*CHIPS, "cpu")
        raise UserError(
            f"--topology {given}: unknown chip {kind!r}{nearest(kind, known)} (known: "
            f"{', '.join(known)}); topologies are written like {EXAMPLES}"
        )
    chip = CHIPS[kind]
    make = _tpu if chip.dimensions else _gpu
    return Topology(name, chip, sides, make(name, kind, chip, sides, n_slices))


def kind_and_shape(name: str) -> str:
    """Normalize the usual spellings of a topology to KIND:SHAPE; others to lower case.

    Supported: Google Cloud's accelerator types (v5litepod-16, v5p-128) and numbers of GPUs or CPU
    devices (8xh100, h100:8, h100-8, 2x8xh100), at most eight per host.

    Raises:
        UserError: There is no slice of that size, nor a whole number of hosts of eight.
    """
    text = re.sub(r"\s", "", re.sub(r"\s+(?=\d)", "-", name.strip().lower()))
    text = text.replace("×", "x").replace("_", "-")
    text = re.sub(r"^(tpu|nvidia)-?(?=.)", "", text)
    text = re.sub(r"^v5lite(pod)?(?=[:-])", "v5e", text)
    before = re.fullmatch(rf"({_SIZES})x({'|'.join(_COUNTED)})", text)
    after = re.fullmatch(rf"([a-z0-9]+?)[:x-]({_SIZES})", text)
    if not before and not after:
        return text
    shape, kind = before.groups() if before else reversed(after.groups())  # type: ignore[union-attr]
    if "x" not in shape and kind in GPUS:
        shape = _hosts(name, kind, int(shape))
    elif "x" not in shape and kind in GOOGLE_CLOUD_TYPES and f"{kind}-" in text:
        shape = _slice_shape(name, kind, int(shape))
    return f"{kind}:{shape}"


def _hosts(name: str, kind: str, n: int) -> str:
    """Return the shape for a number of GPUs: one host, or hosts of eight."""
    if n > GPUS_A_HOST and n % GPUS_A_HOST:
        raise UserError(
            f"--topology {name}: {n} GPUs do not fill hosts of {GPUS_A_HOST}: {kind}:HOSTSxGPUS"
        )
    return f"{-(-n // GPUS_A_HOST)}x{min(n, GPUS_A_HOST)}"


def _slice_shape(name: str, kind: str, number: int) -> str:
    """Return the shape of a Google Cloud slice, from the number in its accelerator type.

    The number counts TensorCores for v4 and v5p (two per chip), and chips for v5e and v6e. The
    shape is as close to a cube as possible; sides are multiples of four from 64 chips on.
    """
    chip = CHIPS[kind]
    n, odd = divmod(number, 2) if chip.dimensions == 3 else (number, 0)
    unit = 4 if chip.dimensions == 3 and n >= 64 else 1
    allowed = [unit * i for i in range(1, chip.longest_side // unit + 1)]
    if unit == 1:
        allowed = [side for side in allowed if side & (side - 1) == 0]
    shapes = [
        sides
        for sides in combinations_with_replacement(allowed, chip.dimensions)
        if prod(sides) == n and (n == 1 or sides[-2] > 1)
    ]
    if odd or not shapes:
        raise UserError(f"--topology {name}: there is no such slice; write KIND:SHAPE ({EXAMPLES})")
    ordered = sorted(min(shapes, key=sum), key=lambda side: (side == 1, side))  # 2x2x1
    return "x".join(map(str, ordered))


def _cpu(name: str, sides: tuple[int, ...], n_slices: int) -> Topology:
    if n_slices > 1 or len(sides) > 1:
        raise UserError(f"--topology {name}: CPU devices are simulated as cpu:8, without --slices")
    if sides[0] > MOST_CPU_DEVICES:
        raise UserError(f"--topology {name}: at most {MOST_CPU_DEVICES} CPU devices are simulated")
    with contextlib.suppress(RuntimeError):  # an initialized backend keeps its number
        jax.config.update("jax_num_cpu_devices", sides[0])
    devices = jax.devices("cpu")
    if len(devices) < sides[0]:
        raise UserError(f"--topology {name}: this process has {len(devices)} CPU devices already")
    return Topology(name, _this_machine(len(devices)), sides, devices[: sides[0]])


def _this_machine(n_devices: int) -> Chip:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Chip(memory // n_devices)


def _tpu(name: str, kind: str, chip: Chip, sides: tuple[int, ...], n_slices: int) -> Sequence[Any]:
    if not importlib.util.find_spec("libtpu"):
        raise missing_package(f"--topology {name}", "libtpu", "tpu")
    if len(sides) != chip.dimensions or max(sides) > chip.longest_side:
        shape = "x".join("N" * chip.dimensions)
        raise UserError(
            f"--topology {name}: a slice of {kind} is {kind}:{shape} with sides up to "
            f"{chip.longest_side}, or an accelerator type ({EXAMPLES}); --slices joins several"
        )
    for variable, value in TPU_VARIABLES.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"num_slices": n_slices, **TOPOLOGY_OPTIONS.get(kind, {})}
    if prod(sides) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    described = f"{LIBTPU_NAMES.get(kind, kind)}:{'x'.join(map(str, sides))}"
    return _described(name, "tpu", described, options)


def _gpu(name: str, kind: str, chip: Chip, sides: tuple[int, ...], n_slices: int) -> Sequence[Any]:
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise missing_package(f"--topology {name}", "jax-cuda12-plugin", "cuda12")
    if len(sides) != 2:
        raise UserError(f"--topology {name}: GPUs are {kind}:HOSTSxGPUS, such as {kind}:1x8")
    shape = "x".join(map(str, (n_slices, *sides)))
    options = {"topology": shape, "target_config": target_config(kind)}
    return _described(name, "cuda", kind, options)


def target_config(kind: str) -> str:
    """Format a GPU as a GpuTargetConfigProto in text form."""
    own = asdict(GPU_TARGETS[kind])
    description, major = own.pop("description"), own.pop("major")
    fields = COMMON_TARGET | own | {"device_memory_size": CHIPS[kind].memory}
    device = "\n".join(f"  {field}: {value}" for field, value in fields.items())
    return (
        f"gpu_device_info {{\n{device}\n  cuda_compute_capability {{ major: {major} }}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 }\n"
        f'device_description_str: "{description}"\n'
    )


def _described(name: str, platform: str, described: str, options: dict[str, Any]) -> Sequence[Any]:
    from jax.experimental.topologies import get_topology_desc

    try:
        return get_topology_desc(platform=platform, topology_name=described, **options).devices
    except (RuntimeError, ValueError) as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"--topology {name}: {reason}") from None


@dataclass(frozen=True)
class Interconnect:
    """Network that a collective crosses.

    Attributes:
        network: "ici" inside a slice or host, "dcn" between them.
        bandwidth: Bytes/s per device.
        spread: Devices of a slice that share the cross-network traffic.
    """

    network: str
    bandwidth: float | None
    spread: int = 1


def interconnect(chip: Chip, group: Sequence[Any], sides: Sequence[int]) -> Interconnect:
    """Return the network that connects a group of devices.

    In a torus, a group sends along every dimension that it spans, in both directions of a ring.

    Args:
        chip: Kind of the devices.
        group: Devices of the collective.
        sides: Torus dimensions of the slice, in chips.
    """
    granules = {granule(device) for device in group}
    if len(granules) > 1:
        return Interconnect("dcn", chip.scale_out, len(group) // len(granules))
    if not chip.dimensions:
        return Interconnect("ici", chip.link)
    coordinates = zip(*(device.coords for device in group), strict=True)
    spanned = [side for side, along in zip(sides, coordinates, strict=False) if len({*along}) > 1]
    links = sum(2 if side > 2 and side % chip.ring == 0 else 1 for side in spanned)
    return Interconnect("ici", links * chip.link if links else inf)


def granule(device: Any) -> int:
    """Return the index of a TPU's slice or a GPU's host (the term of `jax.mesh_utils`)."""
    if device.platform == "tpu":
        return getattr(device, "slice_index", None) or 0
    return device.process_index
