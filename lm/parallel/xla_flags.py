"""Options of XLA's compiler: one table of flag, value, chips, reason, and when it is set.

Those in `compiled_in` are part of every training step for these chips, run or planned; the others
`--xla_flags CHIP` sets for a process before JAX starts. The compilers abort on a flag that they do
not know, and a test asks those installed. Sources: the JAX documentation's GPU performance tips
and MaxText's library of XLA flags.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from lm.hardware import GPUS, TORI, TPUS, chip_name

if TYPE_CHECKING:  # the flags have to be set before JAX is there
    import jax


class Flag(NamedTuple):
    """A flag of XLA, its value, the chips it is for, why, and those where it is never left out."""

    name: str
    value: bool | int
    chips: tuple[str, ...]
    reason: str
    compiled_in: tuple[str, ...] = ()


FLAGS = (
    Flag(
        "xla_tpu_enable_latency_hiding_scheduler",
        True,
        TPUS,
        "orders instructions so that transfers run behind computation",
    ),
    Flag(
        "xla_enable_async_all_gather",
        True,
        TPUS,
        "FSDP's all-gathers of parameters start early and end late",
        compiled_in=TORI,
    ),
    Flag(
        "xla_tpu_prefer_async_allgather_to_allreduce",
        True,
        TORI,
        "a torus would gather by all-reduces, which keep every parameter for the backward pass",
        compiled_in=TORI,
    ),
    Flag(
        "xla_enable_async_collective_permute",
        True,
        TPUS,
        "ring attention and pipelines send to the neighbour while they compute",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion",
        True,
        TPUS,
        "a collective is fused with the computation that hides it",
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
        "the tensor core computes while it moves data",
        compiled_in=TORI,
    ),
    Flag(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        True,
        TPUS,
        "gradients are reduced across slices behind the backward pass",
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
        "its 128 MiB of VMEM hold larger tiles than the default leaves room for",
    ),
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        True,
        GPUS,
        "orders instructions so that NCCL runs behind computation",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_gather",
        True,
        GPUS,
        "the next layer's parameters are gathered during this one's work",
    ),
    Flag(
        "xla_gpu_enable_pipelined_reduce_scatter",
        True,
        GPUS,
        "a layer's gradients are reduced during the next one's work",
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
        "the scan over layers must not copy what the pipelined collectives write",
    ),
    Flag(
        "xla_gpu_triton_gemm_any",
        True,
        GPUS,
        "fused matrix products of any shape may use Triton, chosen by timing",
    ),
)


def compiler_options(device: jax.Device) -> dict[str, bool | int] | None:
    """What `jax.jit` passes to the compiler of a training step for a device of this kind."""
    chip = chip_name(device.device_kind)
    return {flag.name: flag.value for flag in FLAGS if chip in flag.compiled_in} or None


def variable(chip: str) -> str:
    """The environment variable that the compiler of a chip reads."""
    return "LIBTPU_INIT_ARGS" if chip in TPUS else "XLA_FLAGS"


def flags(chip: str) -> list[str]:
    """The flags of a chip as its compiler reads them."""
    return [f"--{f.name}={str(f.value).lower()}" for f in FLAGS if chip in f.chips]


def apply(chip: str) -> None:
    """Set the flags of a chip for this process; before JAX starts. What is set already wins."""
    name = variable(chip)
    os.environ[name] = " ".join([*flags(chip), os.environ.get(name, "")]).strip()
