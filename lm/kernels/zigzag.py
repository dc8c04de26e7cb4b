"""The zig-zag order of a sequence's parts, which gives every device the same causal work.

The sequence is cut into 2 C parts for C devices. In its own order device d has the parts 2 d and
2 d + 1, and the last device sees almost all keys, the first almost none; in zig-zag order it has
the parts d and 2 C - 1 - d (Llama 3, §3.3.2). All functions run inside `jax.shard_map`, on a
device's part of arrays [B, L, …].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def owner(part: int, n_devices: int) -> int:
    """The device that has a part in zig-zag order."""
    return min(part, 2 * n_devices - 1 - part)


def places(length: int, n_devices: int) -> np.ndarray:
    """Where in the sequence the tokens in zig-zag order come from, [L]."""
    parts = [(d, 2 * n_devices - 1 - d) for d in range(n_devices)]
    return np.arange(length).reshape(2 * n_devices, -1)[np.ravel(parts)].ravel()


def to_zigzag(x: jax.Array, axis: str) -> jax.Array:
    """A device's tokens in zig-zag order, from those that it has in the sequence's order."""
    first, second = jnp.split(x, 2, axis=1)
    first, second = _send(first, axis, 0), _send(second, axis, 1)
    return jnp.concatenate(_swap(first, second, axis), axis=1)


def from_zigzag(x: jax.Array, axis: str) -> jax.Array:
    """The inverse of `to_zigzag`."""
    early, late = jnp.split(x, 2, axis=1)
    first, second = _swap(early, late, axis)
    parts = _send(first, axis, 0, back=True), _send(second, axis, 1, back=True)
    return jnp.concatenate(parts, axis=1)


def _send(half: jax.Array, axis: str, which: int, back: bool = False) -> jax.Array:
    """Every device's first or second half to the device that has it in zig-zag order."""
    n = jax.lax.axis_size(axis)
    way = [(d, owner(2 * d + which, n)) for d in range(n)]
    return jax.lax.ppermute(half, axis, [pair[::-1] for pair in way] if back else way)


def _swap(one: jax.Array, other: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """What came from a first half is the earlier part on even devices, the later one on odd."""
    even = jax.lax.axis_index(axis) % 2 == 0
    return jnp.where(even, one, other), jnp.where(even, other, one)
