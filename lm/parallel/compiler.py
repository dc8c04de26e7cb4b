"""Options of XLA's compiler that training needs on some chips; the planner compiles with the same.

Without them a TPU v4 or v5p gathers and scatters over a whole torus by all-reduces, which takes
more memory (each gathered parameter is kept for the backward pass) and overlaps with nothing.
"""

from __future__ import annotations

import jax

_ASYNCHRONOUS_GATHERS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
OPTIONS = {"TPU v4": _ASYNCHRONOUS_GATHERS, "TPU v5": _ASYNCHRONOUS_GATHERS}


def compiler_options(device: jax.Device) -> dict[str, bool] | None:
    """What `jax.jit` passes to the compiler for a device of this kind."""
    return OPTIONS.get(device.device_kind)
