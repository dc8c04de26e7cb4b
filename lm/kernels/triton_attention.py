"""Attention over a key range per query on any GPU: a Pallas kernel for Triton.

Covers masks, soft caps, head dims and GPUs that the libraries in `gpu_attention` do not. Tiles
outside the key ranges are skipped in both passes (FlashAttention-2, Dao 2023).

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, R = H/G, K head dim, T
queries and U keys of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log2
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lm.kernels.dot_product_attention import NEG_INF, AttentionMask, beside_sinks
from lm.kernels.mask_ranges import bounds_by_query, most_pairs

LOG2_E = log2(2.718281828459045)
LENGTH_UNIT = 64  # lengths are padded to a multiple of it, for large tiles
WIDEST_HEAD = 256


OutputAndLogZ = tuple[jax.Array, jax.Array]  # log Z to base 2 [B, H, L]


class Scores(NamedTuple):
    """Settings of the score computation: factor, soft cap (0: none) and interpret mode."""

    scale: float
    softcap: float
    interpret: bool


class TileSizes(NamedTuple):
    """Tile sizes (queries, keys) of a kernel."""

    queries: int
    keys: int


def triton_attention(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    scale: float,
    softcap: float = 0.0,
    sinks_H: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Compute attention over a key range per query.

    Args:
        q_BLHK: queries.
        k_BSGK: keys.
        v_BSGK: values.
        mask: which keys each query attends to; the output of a query without keys is 0.
        scale: factor of the scores.
        softcap: soft cap of the scores; 0: none.
        sinks_H: attention-sink logits.
        interpret: run on any platform, slowly, for tests.

    Returns:
        Output [B, L, H, K]. Scores, softmax and sums are computed in float32.
    """
    B, L, _, K = q_BLHK.shape
    S = k_BSGK.shape[1]
    width = pl.next_power_of_2(K)

    def padded(x: jax.Array, *further: tuple[int, int]) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LENGTH_UNIT), *further))

    q, k, v = (padded(x, (0, 0), (0, width - K)) for x in (q_BLHK, k_BSGK, v_BSGK))
    ranges = (jnp.broadcast_to(x, (B, L)) for x in bounds_by_query(mask, L, S))
    bounds = [padded(x.astype(jnp.int32)) for x in ranges]  # no key for added queries
    with jax.named_scope(f"attention_pairs_{most_pairs(mask, L, S)}"):
        out, log_z_BHL = _attention(q, k, v, *bounds, Scores(scale, softcap, interpret))
    if sinks_H is not None:
        beside_BHL = beside_sinks(log_z_BHL / LOG2_E, sinks_H[:, None])
        out *= beside_BHL.swapaxes(1, 2)[..., None].astype(out.dtype)
    return out[:, :L, :, :K]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q: Any, k: Any, v: Any, start_BL: Any, end_BL: Any, how: Scores) -> OutputAndLogZ:
    return _forward(q, k, v, start_BL, end_BL, how)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start_BL: jax.Array, end_BL: jax.Array, how: Scores
) -> tuple[OutputAndLogZ, tuple]:
    B, L, H, K = q.shape
    tiles = _tiles(L, k.shape[1], 128 if K <= 64 else 64, 64 if K <= 128 else 32)
    of_queries, of_bounds, of_keys, of_rows = _specs(tiles, q, k)
    out, log_z_BHL = _call(
        partial(_forward_kernel, tiles=tiles, how=how),
        (B, H, L // tiles.queries),
        [of_bounds, of_bounds, of_queries, of_keys, of_keys],
        [of_queries, of_rows],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, L), jnp.float32)],
        "attention_forward",
        how,
    )(start_BL, end_BL, q, k, v)
    return (out, log_z_BHL), (q, k, v, start_BL, end_BL, out, log_z_BHL)


def _backward(how: Scores, residuals: tuple, gradients: OutputAndLogZ) -> tuple:
    q, k, v, start_BL, end_BL, out, log_z_BHL = residuals
    g, of_log_z_BHL = gradients
    (B, L, H, K), (_, S, G, _) = q.shape, k.shape
    delta_BHL = jnp.einsum("BLHK,BLHK->BHL", out, g, preferred_element_type=jnp.float32)
    # A score's gradient is its weight times (gradient · (value - output) + gradient of log Z).
    delta_BHL -= of_log_z_BHL * LOG2_E
    tiles = _tiles(L, S, 64, 64 if K <= 128 else 32)
    of_queries, of_bounds, of_keys, of_rows = _specs(tiles, q, k)
    dq = _call(
        partial(_dq_kernel, tiles=tiles, how=how),
        (B, H, L // tiles.queries),
        [of_bounds, of_bounds, of_queries, of_keys, of_keys, of_queries, of_rows, of_rows],
        of_queries,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        "attention_dq",
        how,
    )(start_BL, end_BL, q, k, v, g, log_z_BHL, delta_BHL)
    tiles = _tiles(L, S, 64 if K <= 128 else 32, 64 if K <= 128 else 32)
    first_BU, last_BU = _queries_of_tiles(start_BL, end_BL, tiles, S)
    R = H // G
    of_tile = pl.BlockSpec((None, tiles.keys, None, K), lambda b, g, j: (b, j, g, 0))
    of_group = pl.BlockSpec((None, L, R, K), lambda b, g, j: (b, 0, g, 0))
    of_group_rows = pl.BlockSpec((None, R, L), lambda b, g, j: (b, g, 0))
    whole = pl.BlockSpec((None, L), lambda b, g, j: (b, 0))
    one = pl.BlockSpec((None, None), lambda b, g, j: (b, j))
    shape = jax.ShapeDtypeStruct(k.shape, k.dtype)
    dk, dv = _call(
        partial(_dkv_kernel, tiles=tiles, how=how, n_heads=R),
        (B, G, S // tiles.keys),
        [
            *(one, one, whole, whole, of_group, of_tile, of_tile),
            *(of_group, of_group_rows, of_group_rows),
        ],
        [of_tile, of_tile],
        [shape, shape],
        "attention_dkv",
        how,
    )(first_BU, last_BU, start_BL, end_BL, q, k, v, g, log_z_BHL, delta_BHL)
    return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)


def _tiles(length: int, n_keys: int, queries: int, keys: int) -> TileSizes:
    """Return the largest tiles up to these sizes that divide the lengths."""

    def divisor(n: int, size: int) -> int:
        while n % size:
            size //= 2
        return size

    return TileSizes(divisor(length, queries), divisor(n_keys, keys))


def _queries_of_tiles(
    start_BL: jax.Array, end_BL: jax.Array, tiles: TileSizes, n_keys: int
) -> tuple[jax.Array, jax.Array]:
    """Return the range of query tiles that attend to each key tile, [B, U] each."""
    from_U = jnp.arange(0, n_keys, tiles.keys)
    starts_BT1 = start_BL.reshape(len(start_BL), -1, tiles.queries).min(2)[..., None]
    ends_BT1 = end_BL.reshape(len(end_BL), -1, tiles.queries).max(2)[..., None]
    meet_BTU = (starts_BT1 < from_U + tiles.keys) & (ends_BT1 > from_U)
    n = meet_BTU.shape[1]
    last_BU = jnp.where(meet_BTU.any(1), n - meet_BTU[:, ::-1].argmax(1), 0)
    return meet_BTU.argmax(1).astype(jnp.int32), last_BU.astype(jnp.int32)


def _specs(tiles: TileSizes, q: jax.Array, k: jax.Array) -> tuple[pl.BlockSpec, ...]:
    """Return the block specs of a query tile: queries, bounds, all keys of its head, rows."""
    _, _, H, K = q.shape
    _, S, G, _ = k.shape
    return (
        pl.BlockSpec((None, tiles.queries, None, K), lambda b, h, i: (b, i, h, 0)),
        pl.BlockSpec((None, tiles.queries), lambda b, h, i: (b, i)),
        pl.BlockSpec((None, S, None, K), lambda b, h, i: (b, 0, h // (H // G), 0)),
        pl.BlockSpec((None, None, tiles.queries), lambda b, h, i: (b, h, i)),
    )


def _call(
    kernel: Callable, grid: tuple, ins: Any, outs: Any, shapes: Any, name: str, how: Scores
) -> Callable:
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=ins,
        out_specs=outs,
        out_shape=shapes,
        name=name,
        interpret=how.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    )


# --- kernels


def _scores(q_TK: jax.Array, k_UK: jax.Array, how: Scores) -> tuple[jax.Array, jax.Array | None]:
    """Return scores [T, U] to base 2, and the derivative of the soft cap if there is one."""
    s_TU = plgpu.dot(q_TK, k_UK, trans_b=True) * how.scale
    if not how.softcap:
        return s_TU * LOG2_E, None
    t_TU = jnp.tanh(s_TU / how.softcap)
    return t_TU * (how.softcap * LOG2_E), 1 - t_TU * t_TU


def _inside(start_T: jax.Array, end_T: jax.Array, first_key: Any, n_keys: int) -> jax.Array:
    """Return the mask [T, U] of a tile: which keys each query attends to."""
    keys_U = first_key + jnp.arange(n_keys)
    return (keys_U >= start_T[:, None]) & (keys_U < end_T[:, None])


def _over_keys(
    start_T: jax.Array, end_T: jax.Array, size: int, n_keys: int, body: Callable, carry: Any
) -> Any:
    """Loop over the key tiles that any query attends to, with a mask on partial tiles.

    Args:
        start_T: first key of each query.
        end_T: key after the last one of each query.
        size: keys per tile.
        n_keys: number of keys.
        body: called with tile index, carry and whether a mask is needed.
        carry: initial loop carry.
    """
    low = jnp.minimum(start_T.min(), n_keys) // size
    high = jnp.maximum(pl.cdiv(end_T.max(), size), low)
    whole_low = jnp.clip(pl.cdiv(start_T.max(), size), low, high)
    whole_high = jnp.clip(end_T.min() // size, whole_low, high)
    parts = ((low, whole_low, True), (whole_low, whole_high, False), (whole_high, high, True))
    for first, last, masked in parts:
        carry = lax.fori_loop(first, last, partial(body, masked=masked), carry)
    return carry


def _forward_kernel(
    start_ref: Any,
    end_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    log_z_ref: Any,
    *,
    tiles: TileSizes,
    how: Scores,
) -> None:
    q_TK, start_T, end_T = q_ref[...], start_ref[...], end_ref[...]

    def body(j: Any, carry: Any, masked: bool) -> Any:
        acc_TK, highest_T, z_T = carry
        keys = pl.ds(j * tiles.keys, tiles.keys)
        s_TU, _ = _scores(q_TK, k_ref[keys], how)
        inside_TU = None
        if masked:
            inside_TU = _inside(start_T, end_T, j * tiles.keys, tiles.keys)
            s_TU = jnp.where(inside_TU, s_TU, NEG_INF)
        new_T = jnp.maximum(highest_T, s_TU.max(1))
        p_TU = jnp.exp2(s_TU - new_T[:, None])
        if inside_TU is not None:
            p_TU = jnp.where(inside_TU, p_TU, 0.0)
        fall_T = jnp.exp2(highest_T - new_T)
        v_UK = v_ref[keys]
        acc_TK = acc_TK * fall_T[:, None] + plgpu.dot(p_TU.astype(v_UK.dtype), v_UK)
        return acc_TK, new_T, z_T * fall_T + p_TU.sum(1)

    zeros_T = jnp.zeros(tiles.queries, jnp.float32)
    carry = jnp.zeros(q_TK.shape, jnp.float32), zeros_T + NEG_INF, zeros_T
    n_keys = k_ref.shape[0]
    acc_TK, highest_T, z_T = _over_keys(start_T, end_T, tiles.keys, n_keys, body, carry)
    z_T = jnp.where(z_T > 0, z_T, 1.0)  # query without keys
    out_ref[...] = (acc_TK / z_T[:, None]).astype(out_ref.dtype)
    log_z_ref[...] = highest_T + jnp.log2(z_T)


def _weights(
    q_TK: jax.Array,
    k_UK: jax.Array,
    v_UK: jax.Array,
    g_TK: jax.Array,
    log_z_T: jax.Array,
    delta_T: jax.Array,
    inside_TU: jax.Array | None,
    how: Scores,
) -> tuple[jax.Array, jax.Array]:
    """Return attention weights and the gradient of query–key products, [T, U] each."""
    s_TU, slope_TU = _scores(q_TK, k_UK, how)
    p_TU = jnp.exp2(s_TU - log_z_T[:, None])
    if inside_TU is not None:
        p_TU = jnp.where(inside_TU, p_TU, 0.0)
    ds_TU = p_TU * (plgpu.dot(g_TK, v_UK, trans_b=True) - delta_T[:, None])
    return p_TU, ds_TU if slope_TU is None else ds_TU * slope_TU


def _dq_kernel(
    start_ref: Any,
    end_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    g_ref: Any,
    log_z_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
    *,
    tiles: TileSizes,
    how: Scores,
) -> None:
    q_TK, g_TK, start_T, end_T = q_ref[...], g_ref[...], start_ref[...], end_ref[...]
    log_z_T, delta_T = log_z_ref[...], delta_ref[...]

    def body(j: Any, dq_TK: Any, masked: bool) -> Any:
        keys = pl.ds(j * tiles.keys, tiles.keys)
        k_UK = k_ref[keys]
        inside_TU = _inside(start_T, end_T, j * tiles.keys, tiles.keys) if masked else None
        _, ds_TU = _weights(q_TK, k_UK, v_ref[keys], g_TK, log_z_T, delta_T, inside_TU, how)
        return dq_TK + plgpu.dot(ds_TU.astype(k_UK.dtype), k_UK)

    zeros_TK = jnp.zeros(q_TK.shape, jnp.float32)
    dq_TK = _over_keys(start_T, end_T, tiles.keys, k_ref.shape[0], body, zeros_TK)
    dq_ref[...] = (dq_TK * how.scale).astype(dq_ref.dtype)


def _dkv_kernel(
    first_ref: Any,
    last_ref: Any,
    start_ref: Any,
    end_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    g_ref: Any,
    log_z_ref: Any,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    tiles: TileSizes,
    how: Scores,
    n_heads: int,
) -> None:
    """Compute the gradients of a tile of keys and values over all query heads that share them."""
    k_UK, v_UK = k_ref[...], v_ref[...]
    first_key = pl.program_id(2) * tiles.keys

    def body(i: Any, carry: Any, head: Any) -> Any:
        dk_UK, dv_UK = carry
        rows = pl.ds(i * tiles.queries, tiles.queries)
        q_TK, g_TK = q_ref[rows, head], g_ref[rows, head]
        inside_TU = _inside(start_ref[rows], end_ref[rows], first_key, tiles.keys)
        rest = log_z_ref[head, rows], delta_ref[head, rows], inside_TU
        p_TU, ds_TU = _weights(q_TK, k_UK, v_UK, g_TK, *rest, how)
        dv_UK += plgpu.dot(p_TU.astype(g_TK.dtype), g_TK, trans_a=True)
        return dk_UK + plgpu.dot(ds_TU.astype(q_TK.dtype), q_TK, trans_a=True), dv_UK

    def of_head(head: Any, carry: Any) -> Any:
        return lax.fori_loop(first_ref[...], last_ref[...], partial(body, head=head), carry)

    zeros_UK = jnp.zeros(k_UK.shape, jnp.float32)
    dk_UK, dv_UK = lax.fori_loop(0, n_heads, of_head, (zeros_UK, zeros_UK))
    dk_ref[...] = (dk_UK * how.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_UK.astype(dv_ref.dtype)
