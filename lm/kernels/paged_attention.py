"""Attention over a paged KV cache shared by rows of different lengths.

Shape letters: B rows, L queries, S slots per row, H heads, G key/value heads, R = H/G, K head dim,
N pages, P slots per page, M pages per row, D distances.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from lm.kernels.dot_product_attention import NEG_INF
from lm.kernels.elementwise import softcap as apply_softcap

_PREFILL_SLOTS = 256  # keys per block in prefill


@flax.struct.dataclass
class PagedRows:
    """Rows of a step: their page tables and lengths.

    Attributes:
        tables_BM: page table: page indices of each row, in token order.
        offsets_B: position of the first query of each row.
        lengths_B: number of tokens of each row, including queries; 0 for an idle row.
        prefixes_B: length of each row's prefix, which all its queries attend to; None: none.
        starts_page: the queries of each row start at a page boundary and fill whole pages.
    """

    tables_BM: jax.Array
    offsets_B: jax.Array
    lengths_B: jax.Array
    prefixes_B: jax.Array | None = None
    starts_page: bool = flax.struct.field(pytree_node=False, default=False)


def paged_attention(
    q_BLHK: jax.Array,
    held: tuple[Any, ...],
    rows: PagedRows,
    *,
    scale: float,
    softcap: float = 0.0,
    window: jax.Array | int = 0,
    is_global: jax.Array | None = None,
    bias_HD: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    slot_axis: int = 2,
) -> jax.Array:
    """Compute causal attention over the pages of each row, block by block with online softmax.

    The order of summation over keys does not depend on the lengths of other rows: blocks beyond the
    end of a row do not change its result bitwise.

    Args:
        q_BLHK: queries.
        held: keys and values, [N, G, P, K] each, or one array for both; int8 ones with a scale,
            [N, G, P, 1].
        rows: page tables and lengths of the rows.
        scale: factor of the scores.
        softcap: soft cap of the scores; 0: none.
        window: a query attends to the last `window` keys, including itself; 0: all; [B, L] for
            per-query windows.
        is_global: scalar; if true, the window does not apply.
        bias_HD: bias of the scores by distance (key - query position), starting at 1 - S.
        sinks_H: attention-sink logits.
        slot_axis: axis of P in the pages; 1: [N, P, G, K].

    Returns:
        Output [B, L, H, K]; scores and softmax are in float32.
    """
    (k_pages, k_scales), (v_pages, v_scales) = (
        x if isinstance(x, tuple) else (x, None) for x in (held[0], held[-1])
    )
    B, L, H, K = q_BLHK.shape
    G, P = k_pages.shape[3 - slot_axis], k_pages.shape[slot_axis]
    M = rows.tables_BM.shape[1]
    n_pages = 1 if L < P else max(1, _PREFILL_SLOTS // P)  # pages per block
    tables_BM = jnp.pad(rows.tables_BM, ((0, 0), (0, -M % n_pages)))
    S = n_pages * P
    dtype = jnp.promote_types(q_BLHK.dtype, k_pages.dtype)
    q_BLHK = q_BLHK * jnp.asarray(scale, q_BLHK.dtype)
    q_BGRLK = q_BLHK.reshape(B, L, G, H // G, K).transpose(0, 2, 3, 1, 4)
    q_BGTK = q_BGRLK.reshape(B, G, -1, K).astype(dtype)
    queries_BL1 = rows.offsets_B[:, None, None] + jnp.arange(L)[:, None]
    has_window = not isinstance(window, int) or window > 0
    first_BL1 = queries_BL1 - jnp.asarray(window)[..., None]  # last key that is not visible

    def read(pages: jax.Array, first: jax.Array) -> jax.Array:
        ids = lax.dynamic_slice_in_dim(tables_BM, first, n_pages, axis=1)
        if n_pages == 1:
            return jnp.moveaxis(pages.at[ids[:, 0]].get(mode="clip"), slot_axis, 2)
        found = jnp.moveaxis(pages.at[ids].get(mode="clip"), 4 - slot_axis, 1)
        return found.reshape(B, G, S, -1)  # from [B, G, pages, P, K]

    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def attend(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, out_BGTK = carry
        scores = product("BGTK,BGSK->BGTS", q_BGTK, read(k_pages, block * n_pages).astype(dtype))
        if k_scales is not None:
            scores *= read(k_scales, block * n_pages).swapaxes(2, 3)
        scores_BGRLS = scores.reshape(B, G, -1, L, S)
        if softcap:
            scores_BGRLS = apply_softcap(scores_BGRLS, softcap)
        keys_S = block * S + jnp.arange(S)
        if bias_HD is not None:
            n_before = M * P - 1
            index_BLS = jnp.clip(keys_S - queries_BL1 + n_before, 0, bias_HD.shape[1] - 1)
            bias_BHLS = bias_HD[:, index_BLS].swapaxes(0, 1)
            scores_BGRLS += bias_BHLS.reshape(B, G, -1, L, S)
        visible_BLS = keys_S <= queries_BL1
        if rows.prefixes_B is not None:
            visible_BLS |= keys_S < rows.prefixes_B[:, None, None]
        if has_window:
            near_BLS = keys_S > first_BL1
            visible_BLS &= near_BLS if is_global is None else near_BLS | is_global
        scores_BGRLS = jnp.where(visible_BLS[:, None, None], scores_BGRLS, NEG_INF)
        scores = scores_BGRLS.reshape(B, G, -1, S)
        now_largest = jnp.maximum(largest, scores.max(-1, keepdims=True))
        shrink, weights = jnp.exp(largest - now_largest), jnp.exp(scores - now_largest)
        total = total * shrink + weights.sum(-1, keepdims=True)
        if v_scales is not None:
            weights *= read(v_scales, block * n_pages).swapaxes(2, 3)
        values = read(v_pages, block * n_pages).astype(dtype)
        added = product("BGTS,BGSK->BGTK", weights.astype(dtype), values)
        return now_largest, total, out_BGTK * shrink + added

    zeros = jnp.zeros((B, G, H // G * L, 1), jnp.float32)
    start = zeros + NEG_INF, zeros, jnp.zeros(q_BGTK.shape, jnp.float32)
    n_blocks = -(-rows.lengths_B.max() // S)
    largest, total, out_BGTK = lax.fori_loop(0, n_blocks, attend, start)
    if sinks_H is not None:
        sinks_GR1, largest_BGRL = sinks_H.reshape(G, -1, 1), largest.reshape(B, G, -1, L)
        total += jnp.exp(sinks_GR1 - largest_BGRL).reshape(total.shape)
    out_BGTK /= jnp.where(total == 0, 1, total)  # idle rows
    out_BLGRK = out_BGTK.reshape(B, G, -1, L, K).transpose(0, 3, 1, 2, 4)
    return out_BLGRK.reshape(B, L, H, K).astype(q_BLHK.dtype)
