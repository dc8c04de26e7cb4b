"""Ragged paged attention: the Pallas kernel for TPUs that ships with JAX.

It reads the pages of a row in place, in blocks that it prefetches, and skips blocks after the end
of the row. `paged_attention` gathers the same blocks of all rows instead.

Shape letters: B rows, L queries, H heads, G key/value heads, K head dim, N pages, P slots per page,
M pages per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.paged_attention import PagedRows
from lm.kernels.splash_attention import LANES

# Key block: the largest that JAX's table of tuned block sizes has for most shapes.
_MOST_PAGES, _MOST_SLOTS = 16, 512
# Query block: limited by the heads that a core's vector memory holds.
_MOST_QUERIES, _MOST_VECTORS = 32, 2048
# Page indices that fit into a core's scalar memory of 1 MiB, in lines of LANES.
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
    """Compute causal attention over the pages of each row, on one TPU.

    A row's result does not depend bitwise on other rows. Queries beyond the length of a row give
    undefined values.

    Args:
        q_BLHK: queries.
        pages: keys and values, [N, P, 2G, LANES], interleaved by head: key 0, value 0, key 1, …;
            the first K lanes hold a head, the others 0.
        rows: pages and lengths of the rows, without prefixes.
        scale: factor of the scores.
        softcap: soft cap of the scores; 0: none.
        window: a query attends to the last `window` keys, including itself; 0: all.

    Returns:
        Output [B, L, H, K]; scores and softmax are in float32.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    assert rows.prefixes_B is None, "the kernel has no prefixes"
    (B, L, H, K), (P, n_heads) = q_BLHK.shape, pages.shape[1:3]
    M = rows.tables_BM.shape[1]
    block_heads, _ = heads_of_block(H, n_heads // 2, q_BLHK.dtype, pages.dtype)
    q_BLHK = jnp.pad(q_BLHK, ((0, 0), (0, 0), (0, 0), (0, LANES - K)))
    # An idle row reads one block: a length of 0 would leave a prefetch of the kernel pending.
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

    most = max(1, _LARGEST_TABLE // (ceil(M / LANES) * LANES))  # rows per call
    return jnp.concatenate([of_rows(i, min(i + most, B)) for i in range(0, B, most)])


def heads_of_block(n_heads: int, n_kv_heads: int, dtype: Any, pages_dtype: Any) -> tuple[int, int]:
    """Return the numbers of query heads and of key/value vectors in a block of the kernel.

    Raises:
        ValueError: the kernel does not support these heads.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import get_min_heads_per_blk

    heads, pairs = get_min_heads_per_blk(n_heads, 2 * n_kv_heads, dtype, pages_dtype)
    if heads % 8 and heads != n_heads:
        raise ValueError(f"blocks of {heads} heads")
    return heads, pairs


def ragged_attention_problems(
    n_heads: int, n_kv_heads: int, head_dim: int, dtype: str, pages_dtype: str
) -> Iterator[str]:
    """Yield reasons why the kernel cannot run, as the end of "cannot be used with".

    Args:
        n_heads: query heads per device.
        n_kv_heads: key/value heads per device.
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
