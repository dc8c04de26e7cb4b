"""Ragged paged attention: the Pallas kernel for TPUs that ships with JAX.

It reads the pages of a row where they are, in blocks that it fetches while it computes, and no
blocks beyond the end of the row. `paged_attention` gathers the same blocks of all rows.

Shape letters: B rows, L queries, H heads, G key/value heads, K head dim, N pages, P slots of a
page, M pages of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.paged_attention import PagedRows
from lm.kernels.splash_attention import LANES

# A block of keys: the largest that JAX's table of tuned blocks has for most shapes.
_MOST_PAGES, _MOST_SLOTS = 16, 512
# A block of queries, of which a core's vector memory holds the heads.
_MOST_QUERIES, _MOST_VECTORS = 32, 2048
# Numbers of pages that fit into a core's scalar memory of 1 MiB, whose lines are LANES long.
_LARGEST_TABLE = 192 * 1024
DTYPES = ("bfloat16", "float32")


def ragged_attention(
    q_BLHK: jax.Array,
    pages: jax.Array,
    rows: PagedRows,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> jax.Array:
    """Compute causal attention to the pages of each row, on one TPU.

    A row's bits do not depend on the other rows. Queries beyond the length of a row attend to
    slots that hold anything.

    Args:
        q_BLHK: queries.
        pages: keys and values, [N, P, 2G, LANES]: key and value of head 0, of head 1, …; K of the
            lanes hold a head, the others 0.
        rows: pages and lengths of the rows, without prefixes.
        scale: factor of the scores.
        softcap: bound of the scores; 0 for none.
        window: a query attends to the last `window` keys, itself included; 0 for all.

    Returns:
        The output [B, L, H, K]; scores and softmax are in float32.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    assert rows.prefixes_B is None, "the kernel has no prefixes"
    (B, L, H, K), (P, n_heads) = q_BLHK.shape, pages.shape[1:3]
    M = rows.tables_BM.shape[1]
    block_heads, _ = heads_of_block(H, n_heads // 2, q_BLHK.dtype, pages.dtype)
    q_BLHK = jnp.pad(q_BLHK, ((0, 0), (0, 0), (0, 0), (0, LANES - K)))
    # A row that does nothing reads one block: a length of 0 would leave the kernel a fetch behind.
    ends_B = jnp.where(rows.lengths_B > 0, rows.offsets_B, 0) + L

    def of_rows(first: int, end: int) -> jax.Array:
        n = end - first
        out = ragged_paged_attention(
            q_BLHK[first:end].reshape(n * L, H, LANES),
            pages,
            ends_B[first:end],
            rows.tables_BM[first:end],
            jnp.arange(n + 1, dtype=jnp.int32) * L,
            jnp.full(1, n, jnp.int32),
            sm_scale=float(scale),
            soft_cap=softcap or None,
            sliding_window=window or None,
            num_kv_pages_per_block=max(1, min(M, _MOST_PAGES, _MOST_SLOTS // P)),
            num_queries_per_block=max(1, min(n * L, _MOST_QUERIES, _MOST_VECTORS // block_heads)),
        )
        return out.reshape(n, L, H, LANES)[..., :K]

    most = max(1, _LARGEST_TABLE // (ceil(M / LANES) * LANES))  # rows of a call
    return jnp.concatenate([of_rows(i, min(i + most, B)) for i in range(0, B, most)])


def heads_of_block(n_heads: int, n_kv_heads: int, dtype: Any, pages_dtype: Any) -> tuple[int, int]:
    """Return the query heads, and the keys and values, of a block of the kernel.

    Raises:
        ValueError: the kernel has no blocks for such heads.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import get_min_heads_per_blk

    heads, pairs = get_min_heads_per_blk(n_heads, 2 * n_kv_heads, dtype, pages_dtype)
    if heads % 8 and heads != n_heads:
        raise ValueError(f"blocks of {heads} heads")
    return heads, pairs


def ragged_attention_problems(
    n_heads: int, n_kv_heads: int, head_dim: int, dtype: str, pages_dtype: str
) -> Iterator[str]:
    """Yield what keeps the kernel from running, as the end of "cannot be used with".

    Args:
        n_heads: query heads of a device.
        n_kv_heads: key/value heads of a device.
        head_dim: head dim K.
        dtype: dtype of the queries.
        pages_dtype: dtype of the pages.
    """
    if head_dim > LANES:
        yield f"--config.model.head_dim={head_dim} (up to {LANES})"
    if dtype not in DTYPES or dtype != pages_dtype:
        yield f"{dtype} queries and {pages_dtype} keys"
        return
    try:
        heads_of_block(n_heads, n_kv_heads, jnp.dtype(dtype), jnp.dtype(pages_dtype))
    except ValueError:
        yield f"{n_kv_heads} key/value heads of {n_heads} heads a device"
