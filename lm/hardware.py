"""Hardware tables: published rates of TPU and GPU chips, compiler targets and flags.

All figures are per JAX device; a TPU7x chip is two devices. Bandwidths are one-way. Sources:
Google's page for each TPU and, for v4's links, Jouppi et al. 2023, table 4; NVIDIA's data sheets;
memory sizes and targets of GPUs from XLA's own descriptions of the SXM models
(`xla/backends/gpu/target_config/specs`). XLA's flags: the JAX documentation's GPU performance tips
and MaxText's library. This module does not import JAX: the flags must be set before it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import jax

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published figures of a chip; None for unpublished ones.

    Attributes:
        memory: High-bandwidth memory, bytes.
        device_kinds: Prefixes of `jax.Device.device_kind`.
        peak_flops: Dense bfloat16 FLOP/s.
        memory_bandwidth: Bytes/s of the memory.
        link: Bytes/s to one neighbor in the torus; for GPUs, to the other GPUs of the host.
        scale_out: Bytes/s to other slices or hosts.
        dimensions: Dimensions of the torus; 0 for GPUs.
        ring: A dimension of the torus is a ring if its length is divisible by this.
        longest_side: Longest dimension of a slice, in chips.
        peak_8bit: Dense FLOP/s of 8-bit products, by prefix of the dtype's name in HLO:
            "s8" for int8, "f8" for float8.
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
    peak_8bit: Mapping[str, float] = field(default_factory=dict)


V5E, V5P, V6E = ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e")
CHIPS: dict[str, Chip] = {
    "v4": Chip(32 * GIB, ("TPU v4",), 275e12, 1.2e12, 50e9, None, 3, 4, 64),
    "v5e": Chip(16 * GIB, V5E, 197e12, 819e9, 50e9, 3.125e9, 2, 16, 16, peak_8bit={"s8": 394e12}),
    "v5p": Chip(95 * GIB, V5P, 459e12, 2.765e12, 100e9, 6.25e9, 3, 4, 64, peak_8bit={"s8": 918e12}),
    "v6e": Chip(
        32 * GIB, V6E, 918e12, 1.638e12, 100e9, 12.5e9, 2, 16, 16, peak_8bit={"s8": 1836e12}
    ),
    "7x": Chip(
        96 * GIB, ("TPU7x",), 1153.5e12, 3.69e12, 50e9, 6.25e9, 3, 4, 64, peak_8bit={"f8": 2307e12}
    ),
    "a100": Chip(
        85_100_068_864, ("NVIDIA A100",), 312e12, 2.039e12, 300e9, 25e9, peak_8bit={"s8": 624e12}
    ),
    "h100": Chip(
        84_942_979_072,
        ("NVIDIA H100",),
        989e12,
        3.35e12,
        450e9,
        50e9,
        peak_8bit={"s8": 1979e12, "f8": 1979e12},
    ),
    "h200": Chip(
        151_397_597_184,
        ("NVIDIA H200",),
        989e12,
        4.8e12,
        450e9,
        50e9,
        peak_8bit={"s8": 1979e12, "f8": 1979e12},
    ),
    "b200": Chip(
        191_514_411_008,
        ("NVIDIA B200",),
        2250e12,
        7.7e12,
        900e9,
        50e9,
        peak_8bit={"s8": 4500e12, "f8": 4500e12},
    ),
}
# By prefix of `device_kind`. v3 has no topology description, so it is only used to report MFU.
PEAK_FLOPS = {"TPU v3": 61.5e12} | {
    kind: chip.peak_flops for chip in CHIPS.values() for kind in chip.device_kinds
}


def chip_name(device_kind: str) -> str | None:
    """Return the key in `CHIPS` of a device by its `device_kind`; None for other devices."""
    kinds = {kind: name for name, chip in CHIPS.items() for kind in chip.device_kinds}
    matches = [kind for kind in kinds if device_kind.startswith(kind)]
    return kinds[max(matches, key=len)] if matches else None


# Names of libtpu's topologies and of `--xla_flags` that differ from those above.
LIBTPU_NAMES = {"7x": "tpu7x"}
TPUS = tuple(LIBTPU_NAMES.get(name, name) for name, chip in CHIPS.items() if chip.dimensions)
GPUS = tuple(name for name, chip in CHIPS.items() if not chip.dimensions)
TORI = ("v4", "v5p")  # 3D-torus chips on which the `compiled_in` flags were tested
# Options of libtpu's topology descriptions: both cores of a v4 chip are one device.
TOPOLOGY_OPTIONS: dict[str, dict[str, Any]] = {
    "v4": {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
}

# Fields of XLA's GpuTargetConfigProto: first those that all GPUs share, then one row per GPU.
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


_SMEM = 233472, 232448  # of Hopper and Blackwell, per core and per block
_HOPPER = 132, 128, *_SMEM, 52428800, 1.98
GPU_TARGETS = {
    "a100": GpuTarget(
        "NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 166912, 41943040, 1.41, 2039040000000
    ),
    "h100": GpuTarget("NVIDIA H100 80GB HBM3", 9, *_HOPPER, 3352320000000),
    "h200": GpuTarget("NVIDIA H200 141GB HBM3e", 9, *_HOPPER, 4800000000000),
    "b200": GpuTarget("NVIDIA B200", 10, 148, 128, *_SMEM, 132644864, 1.965, 7672320000000),
}


# --- flags of XLA's compilers


class Flag(NamedTuple):
    """XLA flag.

    Attributes:
        name: name without dashes.
        value: value to set.
        chips: chips that it applies to.
        reason: effect on a training step.
        compiled_in: chips for which training steps always set it as a compiler option.
    """

    name: str
    value: bool | int
    chips: tuple[str, ...]
    reason: str
    compiled_in: tuple[str, ...] = ()


# Flags with `compiled_in` chips are compiler options of every training step for these chips, run or
# planned; the others are set for a process before JAX starts, by `--xla_flags CHIP`. The compilers
# abort on unknown flags, so a test asks those installed.
XLA_FLAGS = (
    Flag(
        "xla_tpu_enable_latency_hiding_scheduler",
        True,
        TPUS,
        "schedules transfers to overlap with computation",
    ),
    Flag(
        "xla_enable_async_all_gather",
        True,
        TPUS,
        "FSDP's all-gathers of parameters overlap with computation",
        compiled_in=TORI,
    ),
    Flag(
        "xla_tpu_prefer_async_allgather_to_allreduce",
        True,
        TORI,
        "a torus would all-gather by all-reduces, which keep every parameter for the backward pass",
        compiled_in=TORI,
    ),
    Flag(
        "xla_enable_async_collective_permute",
        True,
        TPUS,
        "ring attention and pipelines send while they compute",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion",
        True,
        TPUS,
        "fuses a collective with the computation that hides it",
        compiled_in=TORI,
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        True,
        TPUS,
        "… all-gathers too, most of what FSDP sends",
        compiled_in=TORI,
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        True,
        TPUS,
        "… over several computations, where one is too short",
        compiled_in=TORI,
    ),
    Flag(
        "xla_tpu_overlap_compute_collective_tc",
        True,
        TPUS,
        "the tensor core computes while it transfers data",
        compiled_in=TORI,
    ),
    Flag(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        True,
        TPUS,
        "gradients are reduced across slices during the backward pass",
    ),
    Flag(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        True,
        TPUS,
        "… those of any size, not only equal ones",
    ),
    Flag(
        "xla_tpu_scoped_vmem_limit_kib",
        98304,
        ("v6e",),
        "larger tiles fit into its 128 MiB of VMEM than by default",
    ),
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        True,
        GPUS,
        "schedules NCCL calls to overlap with computation",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_gather",
        True,
        GPUS,
        "the next layer's parameters are gathered during this layer's computation",
    ),
    Flag(
        "xla_gpu_enable_pipelined_reduce_scatter",
        True,
        GPUS,
        "a layer's gradients are reduced during the next layer's computation",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_reduce",
        True,
        GPUS,
        "… under plain data parallelism too",
    ),
    Flag(
        "xla_gpu_enable_while_loop_double_buffering",
        True,
        GPUS,
        "the scan over layers need not copy the results of pipelined collectives",
    ),
    Flag(
        "xla_gpu_triton_gemm_any",
        True,
        GPUS,
        "fused matrix products of any shape may use Triton, chosen by timing",
    ),
)


def compiler_options(device: jax.Device) -> dict[str, bool | int] | None:
    """Return `compiler_options` of `jax.jit` for a training step on a device, or None."""
    chip = chip_name(device.device_kind)
    return {flag.name: flag.value for flag in XLA_FLAGS if chip in flag.compiled_in} or None


def flags_variable(chip: str) -> str:
    """Return the environment variable from which a chip's compiler reads flags."""
    return "LIBTPU_INIT_ARGS" if chip in TPUS else "XLA_FLAGS"


def chip_flags(chip: str) -> list[str]:
    """Return the flags for a chip as command-line words."""
    return [f"--{f.name}={str(f.value).lower()}" for f in XLA_FLAGS if chip in f.chips]


def set_xla_flags(chip: str) -> None:
    """Set the flags for a chip in this process, before JAX starts; existing flags win."""
    name = flags_variable(chip)
    os.environ[name] = " ".join([*chip_flags(chip), os.environ.get(name, "")]).strip()


def dump_programs(folder: str) -> None:
    """Make XLA write every program that this process compiles to a folder; call before JAX starts.

    The compilation cache is disabled, so that all programs are compiled.
    """
    os.makedirs(folder, exist_ok=True)
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
