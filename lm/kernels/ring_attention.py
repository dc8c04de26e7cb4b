"""Attention over a sequence whose parts lie on different devices: keys and values go round.

Every device keeps its queries and, in C turns, sees the keys of all C devices, each sent on to
the next device while it is used (Liu et al. 2023). Causal attention runs in zig-zag order, in
which all devices have the same two of four pairs of half parts to compute in every turn.

Letters as in `partial_attention`; N is 2 half parts in zig-zag order, or 1 whole one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.partial_attention import (
    Keys,
    Queries,
    finish,
    joined,
    key_tiles,
    nothing,
    query_tiles,
    saved,
    visit,
    visit_backwards,
    zero_gradients,
)
from lm.kernels.zigzag import from_zigzag, to_zigzag


def ring_attention(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segments_BL: jax.Array | None,
    *,
    causal: bool,
    axis: str,
) -> jax.Array:
    """Attention [B, L, H, K] of scaled queries, within segments if there are any.

    Runs inside `jax.shard_map`, where arrays are a device's part of the length over the mesh axis
    `axis`; a causal one's part must be even.
    """
    inputs: Any = (q_BLHK, k_BLGK, v_BLGK, segments_BL)
    n = 2 if causal else 1
    if causal:
        inputs = jax.tree.map(partial(to_zigzag, axis=axis), inputs)
    q_BLHK, k_BLGK, v_BLGK, segments_BL = inputs
    queries = query_tiles(q_BLHK, segments_BL, k_BLGK.shape[2], n)
    out_BLHK = joined(_ring(queries, key_tiles(k_BLGK, v_BLGK, segments_BL, n), axis))
    return from_zigzag(out_BLHK, axis) if causal else out_BLHK


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ring(queries: Queries, keys: Keys, axis: str) -> jax.Array:
    return _forward(queries, keys, axis)[0]


def _forward(queries: Queries, keys: Keys, axis: str) -> tuple[jax.Array, tuple]:
    n = len(queries.q_BGRTK)
    parts = nothing(queries)
    for pair, diagonal in _own_pairs(n):
        parts = visit(parts, queries, keys, pair, diagonal)

    def turn(carry: Any, number: jax.Array) -> tuple[Any, None]:
        parts, here = carry
        coming = _pass_on(here, axis)
        for pair in _pairs(n, number, axis):
            parts = visit(parts, queries, here, pair, False)
        return (parts, coming), None

    (parts, _), _ = jax.lax.scan(turn, (parts, _pass_on(keys, axis)), _turns(axis))
    out, log_z = finish(parts)
    out = out.astype(queries.q_BGRTK.dtype)
    return out, (queries, keys, out, log_z)


def _backward(axis: str, kept: tuple, g: jax.Array) -> tuple[Queries, Keys]:
    queries, keys, out, log_z = kept
    n = len(queries.q_BGRTK)
    of = saved(g, out, log_z)
    grads = zero_gradients(queries, keys)
    for pair, diagonal in _own_pairs(n):
        grads = visit_backwards(grads, queries, of, keys, pair, diagonal)

    def turn(carry: Any, number: jax.Array) -> tuple[Any, None]:
        (dq, dkeys), here = carry
        coming = _pass_on(here, axis)
        # The gradients of keys travel with them.
        grads = dq, _pass_on(dkeys, axis)
        for pair in _pairs(n, number, axis):
            grads = visit_backwards(grads, queries, of, here, pair, False)
        return (grads, coming), None

    ((dq, dkeys), _), _ = jax.lax.scan(turn, (grads, _pass_on(keys, axis)), _turns(axis))
    dk, dv, _ = _pass_on(dkeys, axis)  # home again
    dtype = g.dtype
    return Queries(dq.astype(dtype), None), Keys(dk.astype(dtype), dv.astype(dtype), None)


_ring.defvjp(_forward, _backward)


def _turns(axis: str) -> jax.Array:
    return jnp.arange(1, jax.lax.axis_size(axis))


def _own_pairs(n: int) -> list[tuple[tuple[int, int], bool]]:
    """The pairs of a device's own tiles, and whether only the lower triangle is seen."""
    return [((0, 0), False)] if n == 1 else [((0, 0), True), ((1, 0), False), ((1, 1), True)]


def _pairs(n: int, turn: jax.Array, axis: str) -> list[tuple[Any, Any]]:
    """The pairs of tiles that see each other in a later turn, all of them whole.

    The late half always sees the early keys. Of a device further up the ring, the early half sees
    the early keys too; of one further down, the late half the late keys.
    """
    if n == 1:
        return [(0, 0)]
    from_before = turn <= jax.lax.axis_index(axis)
    half = jnp.where(from_before, 0, 1)
    return [(1, 0), (half, half)]


def _pass_on(tree: Any, axis: str) -> Any:
    """What the device before has."""
    n = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(d, (d + 1) % n) for d in range(n)])
