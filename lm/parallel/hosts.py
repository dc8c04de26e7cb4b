"""Several processes: joining them, and agreeing on what to do next without stopping the step."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.errors import UserError


def initialize(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_seconds: int = 100,
) -> None:
    """Join the processes of a run; with no addresses, only where a cluster announces itself.

    SLURM, TPU pods, GKE and Open MPI are found by `jax.distributed`. Must come before any
    other use of JAX. When a process is silent for `heartbeat_seconds`, JAX ends the others.
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
    elif _cluster_announced():
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)


def _cluster_announced() -> bool:
    """Whether the environment says that this process is one of several."""
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


def is_lead() -> bool:
    """Whether this process writes what is written once (metrics, progress, reports)."""
    return jax.process_index() == 0


def print_on_lead(message: str) -> None:
    """Print a line on stderr, on the lead process only."""
    if is_lead():
        print(message, file=sys.stderr, flush=True)


def leave(code: int) -> None:
    """End a failed process of several at once.

    The orderly end waits for the other processes, and they would wait for this one's step.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class CrossHostMax:
    """The largest number that any process proposes, known to all of them one step later.

    `propose` starts a tiny collective and `decided` waits for it; called around a step's
    dispatch it costs no pause. With one process it is the number itself.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        self._several = jax.process_count() > 1
        if self._several:
            mesh = Mesh(np.asarray(devices), ("device",))
            self._sharding = NamedSharding(mesh, PartitionSpec("device"))
            self._shape = (len(devices),)
            self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def propose(self, value: int) -> int | jax.Array:
        """This process's number; what comes back is for `decided`."""
        if not self._several:
            return value
        local = np.full((1,), value, np.int32)
        return self._max(jax.make_array_from_callback(self._shape, self._sharding, lambda _: local))

    @staticmethod
    def decided(proposal: int | jax.Array) -> int:
        """The largest number that any process proposed in the same call."""
        return int(jax.device_get(proposal)) if isinstance(proposal, jax.Array) else proposal
