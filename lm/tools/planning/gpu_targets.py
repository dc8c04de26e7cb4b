"""Descriptions of NVIDIA GPUs for XLA's compiler, which takes them where there is no such GPU.

The figures are those of XLA's own descriptions (`xla/backends/gpu/target_config/specs`), the SXM
model of each.
"""

from __future__ import annotations

from typing import Any

_COMMON = {
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
_HOPPER = {
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "core_count": 132,
    "fpus_per_core": 128,
    "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98,
}
# Description, major compute capability, what is its own.
_GPUS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "a100": (
        "NVIDIA A100-SXM4-80GB",
        8,
        {
            "shared_memory_per_core": 167936,
            "shared_memory_per_block_optin": 166912,
            "core_count": 108,
            "fpus_per_core": 64,
            "l2_cache_size": 41943040,
            "clock_rate_ghz": 1.41,
            "memory_bandwidth": 2039040000000,
            "device_memory_size": 85100068864,
        },
    ),
    "h100": (
        "NVIDIA H100 80GB HBM3",
        9,
        _HOPPER | {"memory_bandwidth": 3352320000000, "device_memory_size": 84942979072},
    ),
    "h200": (
        "NVIDIA H200 141GB HBM3e",
        9,
        _HOPPER | {"memory_bandwidth": 4800000000000, "device_memory_size": 151397597184},
    ),
    "b200": (
        "NVIDIA B200",
        10,
        {
            "shared_memory_per_core": 233472,
            "shared_memory_per_block_optin": 232448,
            "core_count": 148,
            "fpus_per_core": 128,
            "l2_cache_size": 132644864,
            "clock_rate_ghz": 1.965,
            "memory_bandwidth": 7672320000000,
            "device_memory_size": 191514411008,
        },
    ),
}


def target_config(kind: str) -> str:
    """A GpuTargetConfigProto in text form."""
    description, major, own = _GPUS[kind]
    device = "\n".join(f"  {name}: {value}" for name, value in (_COMMON | own).items())
    return (
        f"gpu_device_info {{\n{device}\n  cuda_compute_capability {{ major: {major} }}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 }\n"
        f'device_description_str: "{description}"\n'
    )
