"""Masks as key ranges per query, by which kernels skip tiles.

Shape letters: B batch, L queries, S keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask


def bounds_by_query(
    mask: AttentionMask, n_queries: int, n_keys: int
) -> tuple[jax.Array, jax.Array]:
    """Return the first key of each query and the key after its last one, [B or 1, n_queries]."""
    queries_1L = mask.offset + jnp.arange(n_queries)[None]
    start, end = jnp.zeros_like(queries_1L), jnp.full_like(queries_1L, n_keys)
    if mask.segments_BL is not None:
        start, end = _segment_bounds(mask.segments_BL, mask.key_segments_BS)
    if mask.causal:
        last = queries_1L + 1
        if mask.prefix_BS is not None:
            n_before = jnp.pad(jnp.cumsum(mask.prefix_BS != 0, 1), ((0, 0), (1, 0)))
            starts = jnp.broadcast_to(start, (len(n_before), n_queries))
            ends = jnp.broadcast_to(end, starts.shape)
            n_prefix = jnp.take_along_axis(n_before, ends, 1)
            n_prefix -= jnp.take_along_axis(n_before, starts, 1)
            last = jnp.maximum(last, starts + n_prefix)
        end = jnp.minimum(end, last)
    if mask.window:
        before = mask.window - 1 if mask.causal else mask.window // 2
        first = jnp.maximum(start, queries_1L - before)
        last = end if mask.causal else jnp.minimum(end, queries_1L + before + 1)
        everywhere = False if mask.is_global is None else mask.is_global
        start, end = jnp.where(everywhere, start, first), jnp.where(everywhere, end, last)
    return start, end


def most_pairs(mask: AttentionMask, n_queries: int, n_keys: int) -> int:
    """Return the maximum number of query–key pairs per row; half of them if causal."""
    window = mask.window if mask.window and mask.is_global is None else n_keys
    if not mask.causal:
        return n_queries * min(2 * (window // 2) + 1, n_keys)
    if mask.prefix_BS is not None:
        return n_queries * n_keys
    window = min(window, n_keys)
    return n_queries * window - window * window // 2


def _segment_bounds(
    segments_BL: jax.Array, key_segments_BS: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the first key of each query's segment and the key after its last one, [B, L]."""
    if key_segments_BS is not None:
        same_BLS = segments_BL[:, :, None] == key_segments_BS[:, None, :]
        start_BL = same_BLS.argmax(2)
        return start_BL, start_BL + same_BLS.sum(2)
    length = segments_BL.shape[1]
    changes = segments_BL[:, 1:] != segments_BL[:, :-1]
    first_BL = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    last_BL = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    at = jnp.arange(length)
    return (
        jax.lax.cummax(jnp.where(first_BL, at, 0), axis=1),
        jax.lax.cummin(jnp.where(last_BL, at + 1, length), axis=1, reverse=True),
    )
