"""Hardware tables: published rates of TPU and GPU chips, and what compilers need to know of them.

Every figure is of one JAX device; a TPU7x chip is two devices. Bandwidths are one-way. Sources:
Google's page of each TPU and, for v4's links, Jouppi et al. 2023, table 4; NVIDIA's data sheets;
memory sizes and targets of GPUs from XLA's own descriptions of the SXM models
(`xla/backends/gpu/target_config/specs`). Imports no JAX: XLA's flags have to be set before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published figures of a chip; None where nothing is published.

    Attributes:
        memory: High-bandwidth memory, bytes.
        device_kinds: Beginnings of `jax.Device.device_kind`.
        peak_flops: Dense bfloat16 FLOP/s.
        memory_bandwidth: Bytes/s of the memory.
        link: Bytes/s to one neighbor in the torus; of GPUs, to the other GPUs of the host.
        scale_out: Bytes/s to other slices or hosts.
        dimensions: Dimensions of the torus; 0 for GPUs.
        ring: A dimension of the torus is a ring if its length is divisible by this.
        longest_side: Longest dimension of a slice, in chips.
    """

    memory: int | None
    device_kinds: tuple[str, ...] = ()
    peak_flops: float | None = None
    memory_bandwidth: float | None = None
    link: float = inf
    scale_out: float | None = None
    dimensions: int = 0
    ring: int = 0
    longest_side: int = 0


V5E, V5P, V6E = ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e")
CHIPS: dict[str, Chip] = {
    "v4": Chip(32 * GIB, ("TPU v4",), 275e12, 1.2e12, 50e9, None, 3, 4, 64),
    "v5e": Chip(16 * GIB, V5E, 197e12, 819e9, 50e9, 3.125e9, 2, 16, 16),
    "v5p": Chip(95 * GIB, V5P, 459e12, 2.765e12, 100e9, 6.25e9, 3, 4, 64),
    "v6e": Chip(32 * GIB, V6E, 918e12, 1.638e12, 100e9, 12.5e9, 2, 16, 16),
    "7x": Chip(96 * GIB, ("TPU7x",), 1153.5e12, 3.69e12, 50e9, 6.25e9, 3, 4, 64),
    "a100": Chip(85_100_068_864, ("NVIDIA A100",), 312e12, 2.039e12, 300e9, 25e9),
    "h100": Chip(84_942_979_072, ("NVIDIA H100",), 989e12, 3.35e12, 450e9, 50e9),
    "h200": Chip(151_397_597_184, ("NVIDIA H200",), 989e12, 4.8e12, 450e9, 50e9),
    "b200": Chip(191_514_411_008, ("NVIDIA B200",), 2250e12, 7.7e12, 900e9, 50e9),
}
# By the beginning of `device_kind`. The MFU of v3 can be measured, but no slice of it described.
PEAK_FLOPS = {"TPU v3": 61.5e12} | {
    kind: chip.peak_flops for chip in CHIPS.values() for kind in chip.device_kinds
}

# Names of libtpu's topologies and of `--xla_flags` that differ from those above.
LIBTPU_NAMES = {"7x": "tpu7x"}
TPUS = tuple(LIBTPU_NAMES.get(name, name) for name, chip in CHIPS.items() if chip.dimensions)
GPUS = tuple(name for name, chip in CHIPS.items() if not chip.dimensions)
TORI = ("v4", "v5p")  # 3D tori on which the flags compiled into every step have been tried
# Options of libtpu's topology descriptions: both cores of a v4 chip are one device.
TOPOLOGY_OPTIONS: dict[str, dict[str, Any]] = {
    "v4": {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
}

# Fields of XLA's GpuTargetConfigProto: those that all GPUs share, then a row a GPU.
COMMON_TARGET = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}


@dataclass(frozen=True)
class GpuTarget:
    """Description of a GPU for XLA's compiler; fields after `major` as in its proto.

    `major` is the major compute capability.
    """

    description: str
    major: int
    core_count: int
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block_optin: int
    l2_cache_size: int
    clock_rate_ghz: float
    memory_bandwidth: int


_SMEM = 233472, 232448  # of Hopper and Blackwell, a core and a block
_HOPPER = 132, 128, *_SMEM, 52428800, 1.98
GPU_TARGETS = {
    "a100": GpuTarget(
        "NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 166912, 41943040, 1.41, 2039040000000
    ),
    "h100": GpuTarget("NVIDIA H100 80GB HBM3", 9, *_HOPPER, 3352320000000),
    "h200": GpuTarget("NVIDIA H200 141GB HBM3e", 9, *_HOPPER, 4800000000000),
    "b200": GpuTarget("NVIDIA B200", 10, 148, 128, *_SMEM, 132644864, 1.965, 7672320000000),
}
