"""Filling a sharded array from blocks of it, with no copy of the whole on the host."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import jax
import numpy as np
from jax.sharding import Sharding

from lm.interop.tensor_mapping import Block, Shape

_ALIGNMENT = 64  # bytes: what a CPU's array needs so that JAX takes it as it is


def place(shape: Shape, sharding: Sharding, blocks: Iterable[Block]) -> jax.Array:
    """A float32 array of `blocks`, each with the indices where it starts.

    Every block is read once, and goes to the shards of this host that it lies in.
    """
    of_device = {
        device: tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
        if index is not None
    }
    shards = {bounds: _empty(bounds) for bounds in set(of_device.values())}
    for starts, values in blocks:
        for bounds, shard in shards.items():
            _copy_common(starts, values, bounds, shard)
    arrays = [jax.device_put(shards[bounds], device) for device, bounds in of_device.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _empty(bounds: Iterable[tuple[int, int]]) -> np.ndarray:
    shape = [stop - start for start, stop in bounds]
    n_bytes = 4 * prod(shape)
    room = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    first = -room.ctypes.data % _ALIGNMENT
    return room[first : first + n_bytes].view(np.float32).reshape(shape)


def _copy_common(
    starts: Shape, values: np.ndarray, bounds: tuple[tuple[int, int], ...], shard: np.ndarray
) -> None:
    """Copy what a block and a shard have in common."""
    here, there = [], []
    for begin, size, (low, high) in zip(starts, values.shape, bounds, strict=True):
        first, last = max(begin, low), min(begin + size, high)
        if first >= last:
            return
        here.append(slice(first - low, last - low))
        there.append(slice(first - begin, last - begin))
    shard[tuple(here)] = values[tuple(there)]
