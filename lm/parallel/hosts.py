"""Hosts of a run: platform selection, multi-process startup and failure, network topology."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # no public API for its client

from lm.errors import LostPeerError, UserError

_GOOGLE = "0x1ae0"  # PCI vendor id of TPUs
# Substrings of JAX errors raised when a collective's peer, or the coordinator, is gone.
_LOST = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "gloo", "heartbeat"),
    *("Connection closed by peer", "Connection reset", "Connection refused"),
)
COMPILING = "lm-compile"  # name of threads that may still be compiling at exit
_INTACT = "saved checkpoints are intact, and the same command resumes"
_BEATS = "lm/alive/"
_KEPT: list = []  # keeps a C callback from being garbage-collected
_WAIT_SECONDS = 300.0  # wait for the other processes at startup


def use_cpu_without_accelerators() -> None:
    """Select the CPU platform if libtpu is installed but there is no TPU or GPU.

    JAX would fall back to it too, but only after libtpu's slow search and warnings.
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

    Without arguments, join only if the environment announces a cluster: `jax.distributed` detects
    SLURM, TPU pods, GKE and Open MPI.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: number of processes.
        process_id: index of this process.
        heartbeat_seconds: seconds without a heartbeat after which JAX terminates the others.

    Raises:
        UserError: some of the first three are missing, the index is out of range, or the
            coordinator's port is invalid or in use.
        LostPeerError: not all processes joined.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if coordinator is None or num_processes is None or process_id is None:
            raise UserError(
                "--coordinator, --num_processes and --process_id must be given together"
            )
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id {process_id} is not between 0 and {num_processes - 1}")
        port = _port(coordinator)
        if process_id == 0:
            _check_free(port)
        who = f"process {process_id} of {num_processes}"
        where = f"at --coordinator {coordinator}"
    elif _in_cluster():
        who, where = "this process", "of the cluster that the environment announces"
    else:
        return
    line = (
        f"{who} could not reach the others {where}: start all of them, with the address of process"
    )
    # JAX crashes a process that waits too long, so exit before that.
    timer = threading.Timer(_WAIT_SECONDS, _give_up, (f"{line} 0 (waited {_WAIT_SECONDS:g} s)",))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_seconds,
            initialization_timeout=int(_WAIT_SECONDS) + 60,
        )
    except RuntimeError as error:
        raise LostPeerError(f"{line} 0 ({first_line(error)})") from error
    finally:
        timer.cancel()
    _explain_aborts(heartbeat_seconds)


def _give_up(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(1)


def _port(coordinator: str) -> int:
    """Parse the port of HOST:PORT."""
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) < 65536:
        raise UserError(f"--coordinator {coordinator}: expected HOST:PORT, a port from 1 to 65535")
    return int(port)


def _check_free(port: int) -> None:
    """Raise UserError if process 0 cannot listen on the port; JAX would crash in some cases."""
    both = socket.has_dualstack_ipv6()
    family, host = (socket.AF_INET6, "::") if both else (socket.AF_INET, "0.0.0.0")
    try:
        socket.create_server((host, port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise UserError(
            f"--coordinator: process 0 cannot listen on port {port} ({error.strerror}): "
            "choose another port"
        ) from None


def first_line(error: BaseException) -> str:
    """Return the start of the first line of an error message."""
    return str(error).strip().partition("\n")[0][:160]


def lost_peer(error: Exception) -> str | None:
    """Describe a JAX error that means another process has ended; None for other errors."""
    if not isinstance(error, RuntimeError | ValueError) or not jax.distributed.is_initialized():
        return None
    text = str(error)
    if not any(sign in text for sign in _LOST):
        return None
    return (
        f"another process of the run has ended or does not respond ({first_line(error)}); see "
        f"its output for the cause; {_INTACT}"
    )


class _Peers:
    """Heartbeats of the run's processes, exchanged through the coordinator by a thread."""

    def __init__(self, heartbeat_seconds: int):
        state: Any = distributed.global_state
        self._client, self._own = state.client, state.process_id
        self._address = state.coordinator_address
        self._silence, self._period = heartbeat_seconds / 2, min(heartbeat_seconds / 8, 10.0)
        self._beats = dict.fromkeys(range(state.num_processes), "")
        self._seen = dict.fromkeys(self._beats, time.monotonic())
        threading.Thread(target=self._exchange, daemon=True).start()

    def _exchange(self) -> None:
        beat = 0
        while True:
            with suppress(RuntimeError):  # the coordinator may be gone
                self._client.key_value_set(f"{_BEATS}{self._own}", str(beat), allow_overwrite=True)
                for key, value in self._client.key_value_dir_get(_BEATS):
                    peer = int(key.rpartition("/")[2])
                    if self._beats[peer] != value:
                        self._beats[peer], self._seen[peer] = value, time.monotonic()
            beat += 1
            time.sleep(self._period)

    def silent(self) -> list[int]:
        """Return the processes without recent heartbeats; [0] if the coordinator is unreachable."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
        except OSError:
            return [0]
        since = time.monotonic() - self._silence
        found = [peer for peer, seen in self._seen.items() if seen < since]
        return [0] if 0 in found else found


def _explain_aborts(heartbeat_seconds: int) -> None:
    """Exit with a message and code 1 if JAX aborts this process because a peer is silent.

    JAX's own callback for this cannot be a Python function. Other aborts are not changed.
    """
    peers, libc = _Peers(heartbeat_seconds), ctypes.CDLL(None)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(number: int) -> None:
        if silent := peers.silent():
            _give_up(
                f"process {', '.join(map(str, silent))} of the run does not respond: it has ended, "
                f"is frozen (--heartbeat_seconds {heartbeat_seconds}) or is unreachable; {_INTACT}"
            )
        libc.signal(number, 0)  # restore the default handler
        os.abort()

    _KEPT.append(on_abort)
    libc.signal(signal.SIGABRT, on_abort)


def _in_cluster() -> bool:
    """Return whether the environment says that this process is one of several."""
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
    """Exit at once if a normal exit would hang or crash.

    JAX's shutdown barrier waits for the other processes, which may wait for a step of a failed
    one. A thread that still compiles may crash while the interpreter shuts down.
    """
    several = jax.distributed.is_initialized()
    failed = code in (1, 2) and several and jax.process_count() > 1
    compiling = any(thread.name == COMPILING for thread in threading.enumerate())
    if several and compiling and not failed:
        jax.distributed.shutdown()
    if failed or compiling:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- the network between hosts


def split_by_network(devices: Sequence[jax.Device], n: int) -> list[list[jax.Device]]:
    """Split devices into `n` equal parts along the slow network.

    On TPUs the parts must be the slices. GPU hosts and CPU processes are grouped if there are more
    than `n`. Within one host there is no slow network: the parts follow device order.

    Raises:
        UserError: the slices or hosts cannot be grouped into `n` equal parts.
    """
    is_tpu = devices[0].platform == "tpu"
    by_slice, by_host = _groups(devices, "slice_index"), _groups(devices, "process_index")
    islands = by_slice if is_tpu or len(by_slice) > 1 else by_host
    if is_tpu and len(islands) != n:
        raise UserError(
            f"--config.parallel.mesh.slice={n}, but the devices are {len(islands)} TPU slice(s): "
            f"set it to {len(islands)}"
        )
    if len(islands) == 1:
        islands = [[device] for device in devices]
    sizes = {len(island) for island in islands}
    if n > 1 and (len(islands) % n or len(sizes) > 1):
        raise UserError(
            f"--config.parallel.mesh.slice={n} does not divide {len(islands)} hosts or slices of "
            f"{' or '.join(map(str, sorted(sizes)))} devices"
        )
    in_order = [device for island in islands for device in island]
    size = len(devices) // n
    return [in_order[i * size : (i + 1) * size] for i in range(n)]


def _groups(devices: Sequence[jax.Device], attribute: str) -> list[list[jax.Device]]:
    """Group devices by an attribute, sorted by its value."""
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        groups.setdefault(getattr(device, attribute, 0), []).append(device)
    return [groups[value] for value in sorted(groups)]
