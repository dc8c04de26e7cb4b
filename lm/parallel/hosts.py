"""Start and end of a process: its platform, joining the others of a run, leaving them."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import jax

from lm.errors import UserError

_GOOGLE = "0x1ae0"  # PCI vendor id of TPUs


def use_cpu_without_accelerators() -> None:
    """Select the CPU platform where libtpu is installed but there is neither TPU nor GPU.

    JAX would select it too, after libtpu's long search and warnings.
    """
    looks_for_tpu = not os.environ.get("JAX_PLATFORMS") and find_spec("libtpu")
    if looks_for_tpu and not has_tpu() and not Path("/dev/nvidiactl").exists():
        jax.config.update("jax_platforms", "cpu")


def has_tpu() -> bool:
    """Return whether a TPU is on this machine's PCI bus."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)


def initialize_distributed(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_seconds: int = 100,
) -> None:
    """Join the processes of a run; must precede any other use of JAX.

    Without arguments it joins only where the environment announces a cluster: SLURM, TPU pods, GKE
    and Open MPI are detected by `jax.distributed`.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: number of processes.
        process_id: index of this process.
        heartbeat_seconds: silence of a process after which JAX ends the others.

    Raises:
        UserError: some of the first three are missing, or the index is out of range.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if coordinator is None or num_processes is None or process_id is None:
            raise UserError("--coordinator, --num_processes and --process_id go together")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id {process_id} is not in 0 … {num_processes - 1}")
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    elif _in_cluster():
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)


def _in_cluster() -> bool:
    """Return whether the environment announces that this process is one of several."""
    environment = os.environ
    several_tasks = any(
        int(environment.get(name) or 1) > 1
        for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    in_slurm_step = "SLURM_PROCID" in environment or "OMPI_COMM_WORLD_SIZE" in environment
    several_workers = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    several_slices = "MEGASCALE_COORDINATOR_ADDRESS" in environment
    tpu_vm = find_spec("libtpu") and any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
    return (
        (several_tasks and in_slurm_step)
        or several_workers
        or several_slices
        or bool(tpu_vm and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"))
    )


def exit_at_once(code: int) -> None:
    """End a failed process of several without JAX's shutdown barrier.

    The barrier waits for the other processes, which wait for a step of this one.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
