"""XLA compiler flags: one table of flag, value, chips and reason.

Flags with `compiled_in` chips are compiler options of every training step for these chips, run or
planned; the others are set for a process before JAX starts, by `--xla_flags CHIP`. The compilers
abort on unknown flags, so a test asks those installed. Sources: the JAX documentation's GPU
performance tips and MaxText's library of XLA flags.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from lm.hardware import CHIPS, GPUS, TORI, TPUS

if TYPE_CHECKING:  # the flags have to be set before JAX is there
    import jax


class Flag(NamedTuple):
    """XLA flag.

    Attributes:
        name: name without dashes.
        value: value to set.
        chips: chips that it is for.
        reason: effect on a training step.
        compiled_in: chips for which it is always a compiler option of the step.
    """

    name: str
    value: bool | int
    chips: tuple[str, ...]
    reason: str
    compiled_in: tuple[str, ...] = ()


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


def chip_name(device_kind: str) -> str | None:
    """Return the key in `CHIPS` of a device by its `device_kind`; None for other devices."""
    kinds = {kind: name for name, chip in CHIPS.items() for kind in chip.device_kinds}
    matches = [kind for kind in kinds if device_kind.startswith(kind)]
    return kinds[max(matches, key=len)] if matches else None


def compiler_options(device: jax.Device) -> dict[str, bool | int] | None:
    """Return the `compiler_options` of `jax.jit` for a training step on a device; None for none."""
    chip = chip_name(device.device_kind)
    return {flag.name: flag.value for flag in XLA_FLAGS if chip in flag.compiled_in} or None


def flags_variable(chip: str) -> str:
    """Return the environment variable that the compiler of a chip reads flags from."""
    return "LIBTPU_INIT_ARGS" if chip in TPUS else "XLA_FLAGS"


def chip_flags(chip: str) -> list[str]:
    """Return the flags of a chip as command-line words."""
    return [f"--{f.name}={str(f.value).lower()}" for f in XLA_FLAGS if chip in f.chips]


def set_xla_flags(chip: str) -> None:
    """Set the flags of a chip for this process, before JAX starts; flags set already win."""
    name = flags_variable(chip)
    os.environ[name] = " ".join([*chip_flags(chip), os.environ.get(name, "")]).strip()
