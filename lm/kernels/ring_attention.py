"""Ring attention: attention over a sequence that is sharded over a mesh axis.

Every device keeps its queries and, in C steps, attends to the keys of all C devices; each device
sends the keys it has to the next one while it uses them (Liu et al. 2023). Causal attention runs
in zig-zag order, in which every device has the same work. The sequence is cut into 2 C parts for
C devices. In its own order device d has parts 2 d and 2 d + 1, so that the last device attends to
almost all keys and the first to almost none; in zig-zag order it has parts d and 2 C - 1 - d
(Llama 3, §3.3.2), and computes the same two of four pairs of half parts in every step.

All functions but `zigzag_order` run inside `jax.shard_map`, on a device's part of arrays [B, L, …].

Letters as in `blockwise_attention`; N is 2 half parts in zig-zag order, or 1 whole part.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.blockwise_attention import (
    Keys,
    Queries,
    attend_tile,
    attend_tile_backward,
    empty_partial,
    merge_tiles,
    normalize,
    split_keys,
    split_queries,
    tile_residuals,
    zero_grads,
)


def ring_attention(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segments_BL: jax.Array | None,
    *,
    causal: bool,
    axis: str,
) -> jax.Array:
    """Compute attention over the whole sequence from a device's part of it.

    Args:
        q_BLHK: this device's queries, scaled; L is even if `causal`.
        k_BLGK: this device's keys.
        v_BLGK: this device's values.
        segments_BL: segments that attention stays within, or None.
        causal: mask keys after the query.
        axis: mesh axis that the sequence is sharded over.

    Returns:
        This device's part of the output, [B, L, H, K].
    """
    inputs: Any = (q_BLHK, k_BLGK, v_BLGK, segments_BL)
    n = 2 if causal else 1
    if causal:
        inputs = jax.tree.map(partial(to_zigzag, axis=axis), inputs)
    q_BLHK, k_BLGK, v_BLGK, segments_BL = inputs
    queries = split_queries(q_BLHK, segments_BL, k_BLGK.shape[2], n)
    out_BLHK = merge_tiles(_ring(queries, split_keys(k_BLGK, v_BLGK, segments_BL, n), axis))
    return from_zigzag(out_BLHK, axis) if causal else out_BLHK


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ring(queries: Queries, keys: Keys, axis: str) -> jax.Array:
    return _forward(queries, keys, axis)[0]


def _forward(queries: Queries, keys: Keys, axis: str) -> tuple[jax.Array, tuple]:
    n = len(queries.q_BGRTK)
    partials = empty_partial(queries)
    for pair, diagonal in _local_pairs(n):
        partials = attend_tile(partials, queries, keys, pair, diagonal)

    def step(carry: Any, number: jax.Array) -> tuple[Any, None]:
        partials, here = carry
        incoming = _send_to_next(here, axis)
        for pair in _remote_pairs(n, number, axis):
            partials = attend_tile(partials, queries, here, pair, False)
        return (partials, incoming), None

    (partials, _), _ = jax.lax.scan(step, (partials, _send_to_next(keys, axis)), _steps(axis))
    out, log_z = normalize(partials)
    out = out.astype(queries.q_BGRTK.dtype)
    return out, (queries, keys, out, log_z)


def _backward(axis: str, residuals: tuple, g: jax.Array) -> tuple[Queries, Keys]:
    queries, keys, out, log_z = residuals
    n = len(queries.q_BGRTK)
    of_queries = tile_residuals(g, out, log_z)
    grads = zero_grads(queries, keys)
    for pair, diagonal in _local_pairs(n):
        grads = attend_tile_backward(grads, queries, of_queries, keys, pair, diagonal)

    def step(carry: Any, number: jax.Array) -> tuple[Any, None]:
        (dq, dkeys), here = carry
        incoming = _send_to_next(here, axis)
        # The gradients of keys travel with them.
        grads = dq, _send_to_next(dkeys, axis)
        for pair in _remote_pairs(n, number, axis):
            grads = attend_tile_backward(grads, queries, of_queries, here, pair, False)
        return (grads, incoming), None

    ((dq, dkeys), _), _ = jax.lax.scan(step, (grads, _send_to_next(keys, axis)), _steps(axis))
    dk, dv, _ = _send_to_next(dkeys, axis)  # back to the device that owns the keys
    dtype = g.dtype
    return Queries(dq.astype(dtype), None), Keys(dk.astype(dtype), dv.astype(dtype), None)


_ring.defvjp(_forward, _backward)


def _steps(axis: str) -> jax.Array:
    """Return the numbers of the steps after the first, in which keys of other devices arrive."""
    return jnp.arange(1, jax.lax.axis_size(axis))


def _local_pairs(n: int) -> list[tuple[tuple[int, int], bool]]:
    """Return the pairs of a device's own tiles, and whether each is cut by the causal mask."""
    return [((0, 0), False)] if n == 1 else [((0, 0), True), ((1, 0), False), ((1, 1), True)]


def _remote_pairs(n: int, step: jax.Array, axis: str) -> list[tuple[Any, Any]]:
    """Return the pairs of tiles to compute in a later step, none of which the causal mask cuts.

    The late half always attends to the early keys. To keys from a device earlier in the ring, the
    early half attends to the early keys too; from a later device, the late half to the late keys.
    """
    if n == 1:
        return [(0, 0)]
    from_earlier = step <= jax.lax.axis_index(axis)
    half = jnp.where(from_earlier, 0, 1)
    return [(1, 0), (half, half)]


def _send_to_next(tree: Any, axis: str) -> Any:
    """Send arrays to the next device of the ring; return those of the previous one."""
    n = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(d, (d + 1) % n) for d in range(n)])


def _zigzag_owner(part: int, n_devices: int) -> int:
    """Return the device that has a part in zig-zag order."""
    return min(part, 2 * n_devices - 1 - part)


def zigzag_order(length: int, n_devices: int) -> np.ndarray:
    """Return the sequence positions of the tokens in zig-zag order, [L]."""
    parts = [(d, 2 * n_devices - 1 - d) for d in range(n_devices)]
    return np.arange(length).reshape(2 * n_devices, -1)[np.ravel(parts)].ravel()


def to_zigzag(x: jax.Array, axis: str) -> jax.Array:
    """Exchange a device's part of [B, L, …] in sequence order for its part in zig-zag order."""
    first, second = jnp.split(x, 2, axis=1)
    first, second = _send(first, axis, 0), _send(second, axis, 1)
    return jnp.concatenate(_order_halves(first, second, axis), axis=1)


def from_zigzag(x: jax.Array, axis: str) -> jax.Array:
    """Invert `to_zigzag`."""
    early, late = jnp.split(x, 2, axis=1)
    first, second = _order_halves(early, late, axis)
    parts = _send(first, axis, 0, back=True), _send(second, axis, 1, back=True)
    return jnp.concatenate(parts, axis=1)


def _send(half: jax.Array, axis: str, which: int, back: bool = False) -> jax.Array:
    """Send first (0) or second (1) halves to their devices in zig-zag order, or `back`."""
    n = jax.lax.axis_size(axis)
    route = [(d, _zigzag_owner(2 * d + which, n)) for d in range(n)]
    return jax.lax.ppermute(half, axis, [pair[::-1] for pair in route] if back else route)


def _order_halves(one: jax.Array, other: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Order the halves by position: the first half comes first on even devices, last on odd."""
    even = jax.lax.axis_index(axis) % 2 == 0
    return jnp.where(even, one, other), jnp.where(even, other, one)
