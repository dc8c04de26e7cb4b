"""Attention in square tiles, of whose scores only one exists at a time; on any platform.

Memory grows with the length, not with its square, and causal attention never visits the tiles
above the diagonal (Dao et al. 2022). Letters as in `partial_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from lm.kernels.partial_attention import (
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

LONGEST_TILE, SHORTEST_TILE = 512, 64


def n_tiles(length: int) -> int:
    """The fewest equal tiles of a length that are short enough; 0 if they would be too short."""
    fewest = -(-length // LONGEST_TILE)
    n = next(n for n in range(fewest, length + 1) if length % n == 0)
    return n if n == 1 or length // n >= SHORTEST_TILE else 0


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise_attention(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BL: jax.Array | None,
    key_segments_BS: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """Attention [B, L, H, K] of scaled queries, within segments if there are any.

    `n_tiles` of both lengths must not be 0; causal attention has as many keys as queries.
    """
    return _forward(q_BLHK, k_BSGK, v_BSGK, segments_BL, key_segments_BS, causal)[0]


def _forward(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BL: jax.Array | None,
    key_segments_BS: jax.Array | None,
    causal: bool,
) -> tuple[jax.Array, tuple]:
    n, m, G = n_tiles(q_BLHK.shape[1]), n_tiles(k_BSGK.shape[1]), k_BSGK.shape[2]
    queries = query_tiles(q_BLHK, segments_BL, G, n)
    keys = key_tiles(k_BSGK, v_BSGK, key_segments_BS, m)

    def step(parts: Any, pair: Any, diagonal: bool) -> Any:
        return visit(parts, queries, keys, pair, diagonal)

    out, log_z = finish(_over_pairs(step, nothing(queries), n, m, causal))
    return joined(out).astype(q_BLHK.dtype), (queries, keys, out, log_z)


def _backward(causal: bool, kept: tuple, g_BLHK: jax.Array) -> tuple:
    queries, keys, out, log_z = kept
    n, _, G = queries.q_BGRTK.shape[:3]
    of = saved(query_tiles(g_BLHK, None, G, n).q_BGRTK, out, log_z)

    def step(grads: Any, pair: Any, diagonal: bool) -> Any:
        return visit_backwards(grads, queries, of, keys, pair, diagonal)

    zeros = zero_gradients(queries, keys)
    dq, (dk, dv, _) = _over_pairs(step, zeros, n, len(keys.k_BGSK), causal)
    # Keys are tiles of heads without the axis of query heads.
    dk, dv = (joined(d[:, :, :, None]) for d in (dk, dv))
    return *(d.astype(g_BLHK.dtype) for d in (joined(dq), dk, dv)), None, None


blockwise_attention.defvjp(_forward, _backward)


def _over_pairs(step: Callable, start: Any, n: int, m: int, causal: bool) -> Any:
    """`step` over every pair of tiles of which one sees the other."""
    for diagonal, pairs in _pairs(n, m, causal):

        def turn(carry: Any, pair: Any, diagonal: bool = diagonal) -> tuple[Any, None]:
            return step(carry, pair, diagonal), None

        start, _ = jax.lax.scan(turn, start, pairs)
    return start


def _pairs(n: int, m: int, causal: bool) -> Iterator[tuple[bool, tuple[np.ndarray, np.ndarray]]]:
    if causal:
        yield True, (np.arange(n), np.arange(n))
        yield False, np.tril_indices(n, -1)
    else:
        rows, columns = np.indices((n, m))
        yield False, (rows.ravel(), columns.ravel())
