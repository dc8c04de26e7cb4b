"""Compiler flags by chip, each with its reason: what `lm train --xla_flags CHIP` sets.

The compilers abort on a flag that they do not know, and a test asks those installed. Sources:
the JAX documentation's GPU performance tips and MaxText's library of XLA flags.
"""

from __future__ import annotations

import os
from typing import NamedTuple

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
GPUS = ("a100", "h100", "h200", "b200")
CHIPS = TPUS + GPUS


class Flag(NamedTuple):
    """A flag of XLA, its value, the chips it is for, and why."""

    name: str
    value: str
    chips: tuple[str, ...]
    reason: str


FLAGS = (
    Flag(
        "xla_tpu_enable_latency_hiding_scheduler",
        "true",
        TPUS,
        "orders instructions so that transfers run behind computation",
    ),
    Flag(
        "xla_enable_async_all_gather",
        "true",
        TPUS,
        "FSDP's all-gathers of parameters start early and end late",
    ),
    Flag(
        "xla_enable_async_collective_permute",
        "true",
        TPUS,
        "ring attention and pipelines send to the neighbour while they compute",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion",
        "true",
        TPUS,
        "a collective is fused with the computation that hides it",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "true",
        TPUS,
        "… all-gathers too, most of what FSDP sends",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        TPUS,
        "… over several computations, where one is too short",
    ),
    Flag(
        "xla_tpu_overlap_compute_collective_tc",
        "true",
        TPUS,
        "the tensor core computes while it moves data",
    ),
    Flag(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "true",
        TPUS,
        "gradients are reduced across slices behind the backward pass",
    ),
    Flag(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        "true",
        TPUS,
        "… those of any size, not only equal ones",
    ),
    Flag(
        "xla_tpu_scoped_vmem_limit_kib",
        "98304",
        ("v6e",),
        "its 128 MiB of VMEM hold larger tiles than the default leaves room for",
    ),
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        GPUS,
        "orders instructions so that NCCL runs behind computation",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_gather",
        "true",
        GPUS,
        "the next layer's parameters are gathered during this one's work",
    ),
    Flag(
        "xla_gpu_enable_pipelined_reduce_scatter",
        "true",
        GPUS,
        "a layer's gradients are reduced during the next one's work",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_reduce",
        "true",
        GPUS,
        "… under plain data parallelism too",
    ),
    Flag(
        "xla_gpu_enable_while_loop_double_buffering",
        "true",
        GPUS,
        "the scan over layers must not copy what the pipelined collectives write",
    ),
    Flag(
        "xla_gpu_triton_gemm_any",
        "true",
        GPUS,
        "fused matrix products of any shape may use Triton, chosen by timing",
    ),
)


def variable(chip: str) -> str:
    """The environment variable that the compiler of a chip reads."""
    return "LIBTPU_INIT_ARGS" if chip in TPUS else "XLA_FLAGS"


def flags(chip: str) -> list[str]:
    """The flags of a chip as its compiler reads them."""
    return [f"--{flag.name}={flag.value}" for flag in FLAGS if chip in flag.chips]


def apply(chip: str) -> None:
    """Set the flags of a chip for this process; before JAX starts. What is set already wins."""
    name = variable(chip)
    os.environ[name] = " ".join([*flags(chip), os.environ.get(name, "")]).strip()
