"""Agreement between the processes of a run: consistency checks at startup, and shared stops.

Processes that differ (in learning rate, seed, corpus or version) would train together without an
error, and the result would match neither configuration.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # no public API for its key-value store and barriers
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lm.config import flatten
from lm.config.registries import SCHEMA
from lm.errors import UserError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece")
# Keys that may differ between hosts: file locations, and how files are read.
_OF_A_PROCESS = ("data.directory", "data.cache_directory", "data.workers", "data.prefetch")
_STOP = "lm/stop"
_LEAVE_SECONDS = 5  # for all processes to see the stop request
_SHOWN = 5  # differences per process listed in the message


def require_agreement(facts: Mapping[str, Any]) -> None:
    """Compare facts across processes; a collective call.

    Args:
        facts: JSON-serializable values by name.

    Raises:
        UserError: a process differs from process 0; raised by every process.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(facts, sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    if len(np.unique(multihost_utils.process_allgather(digest), axis=0)) == 1:
        return
    lengths = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    found = [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]
    raise UserError("; ".join(disagreements(found)))


def require_same_start(config: ConfigDict) -> None:
    """Compare configuration, code, package versions and plug-ins across processes.

    Raises:
        UserError: see `require_agreement`.
    """
    values = {
        f"--config.{path}": value
        for path, value in flatten(config)
        if path not in _OF_A_PROCESS and not path.startswith("log.")
    }
    files = [Path(plugin["file"]) for plugin in SCHEMA.plugins()]
    plugins = {
        f"plug-in {file.name}": hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files
    }
    require_agreement(values | plugins | software())


def disagreements(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for every process whose facts differ from those of process 0."""
    first, lines = facts[0], []
    for process, other in enumerate(facts):
        names = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
        shown = [
            f"{name} ({other.get(name, 'missing')}, there {first.get(name, 'missing')})"
            for name in names[:_SHOWN]
        ]
        if len(names) > _SHOWN:
            shown.append(f"{len(names) - _SHOWN} more")
        if names:
            lines.append(f"process {process} differs from process 0 in {', '.join(shown)}")
    return lines


@cache
def software() -> dict[str, str]:
    """Return the versions of the packages used for computation, and a digest of lm's code."""
    root = Path(__file__).parents[1]
    code = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        code.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return {name: version(name) for name in _PACKAGES} | {"code of lm": code.hexdigest()[:12]}


# --- stopping before there is anything to save


def stop_is_shared() -> bool:
    """Return whether any process of the run has called `all_leave`."""
    try:
        return bool(_client().key_value_try_get(_STOP))
    except RuntimeError:  # the key does not exist
        return False


def all_leave() -> bool:
    """Return whether all processes call this within a few seconds, so that they may exit at once.

    Process 0 returns last, because it is the coordinator. The result is False if a process has
    unsaved steps; then the training loop agrees on the stop.
    """
    try:
        _client().key_value_set(_STOP, "1", allow_overwrite=True)
        _client().wait_at_barrier(_STOP, 1000 * _LEAVE_SECONDS)
    except RuntimeError:
        return False
    if jax.process_index() == 0:
        time.sleep(1.0)
    return True


def _client() -> Any:
    return distributed.global_state.client


class CrossHostMax:
    """Maximum of an integer over processes, known to all of them one step later.

    `start` dispatches a tiny collective and `result` waits for it; wrapped around the dispatch of a
    step, it adds no pause.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        """Prepare the collective over all devices of the run."""
        mesh = Mesh(np.asarray(devices), ("device",))
        self._sharding = NamedSharding(mesh, PartitionSpec("device"))
        self._shape = (len(devices),)
        self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def start(self, value: int) -> jax.Array:
        """Dispatch the maximum of this process's value; return a handle for `result`."""
        local = np.full((1,), value, np.int32)
        return self._max(jax.make_array_from_callback(self._shape, self._sharding, lambda _: local))

    @staticmethod
    def result(handle: jax.Array) -> int:
        """Return the maximum over all processes for the same call of `start`."""
        return int(jax.device_get(handle))
