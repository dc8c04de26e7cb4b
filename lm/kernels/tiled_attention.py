"""Causal attention in query tiles, for XLA's CPU backend.

Shape letters: B batch, L queries and keys, H heads, G key/value heads, R = H/G, K head dim, T
queries of a tile times R, S keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import NEG_INF, AttentionMask, Dropout, attention

SHORTEST_TILE = 64


def tiled_attention(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float = 0.0,
    bias_HLS: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Compute causal self-attention without the masked half.

    A query tile attends to the keys up to its end. Scores have keys first, [S, T], so that none of
    the six products of a step contracts the rows of both operands, which is slow on that backend.
    The softmax is normalized after summing the values, and the backward pass reuses the weights of
    the forward pass (Dao et al. 2022, alg. 4, without recomputation).

    Decoding steps (which are not square) and cross-attention compute all scores.

    Args:
        q_BLHK: queries.
        k_BSGK: keys.
        v_BSGK: values.
        mask: which keys each query attends to.
        scale: factor of the scores, 1/sqrt(K).
        softcap: see `attention`, like the next ones; not supported by tiles.
        bias_HLS: bias of the scores.
        sinks_H: attention-sink logits.
        dropout: dropout of attention weights.

    Returns:
        Output [B, L, H, K]. Softmax and sums are computed in float32.

    Raises:
        ValueError: self-attention is not plain causal attention.
    """
    if mask.key_segments_BS is not None or q_BLHK.shape[1] != k_BSGK.shape[1]:
        options: Any = {"softcap": softcap, "bias_HLS": bias_HLS, "sinks_H": sinks_H}
        options |= {"scale": scale, "dropout": dropout}
        return attention(q_BLHK, k_BSGK, v_BSGK, mask, **options)
    is_plain = bias_HLS is None and dropout is None and not softcap
    is_plain &= mask.causal and mask.prefix_BS is None and not mask.window
    if not is_plain or scale != q_BLHK.shape[-1] ** -0.5:
        raise ValueError('attention kernel "tiled" supports plain causal attention only')
    o_BLHK, total_BLH = _tiled(q_BLHK, k_BSGK, v_BSGK, mask.segments_BL)
    if sinks_H is None:
        return o_BLHK
    beside_BLH = jax.nn.sigmoid(total_BLH - sinks_H)  # see `beside_sinks`
    return o_BLHK * beside_BLH[..., None].astype(o_BLHK.dtype)


@jax.custom_vjp
def _tiled(
    q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, segment_ids_BL: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the output [B, L, H, K] and the logsumexp of the scores [B, L, H]."""
    return _tiled_forward(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)[0]


def _tiles(length: int) -> Iterator[slice]:
    """Yield four query tiles, or fewer if they would be shorter than `SHORTEST_TILE`."""
    tile = max(-(-length // 4), SHORTEST_TILE)
    for start in range(0, length, tile):
        yield slice(start, min(start + tile, length))


def _batched_dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Contract one axis of each operand, batched over the first two axes."""
    dimensions = (((x_axis,), (y_axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _tile_queries(x_BGRLK: jax.Array, tile: slice) -> jax.Array:
    """Return the queries of a tile, [B, G, T, K], with the R heads of a group concatenated."""
    B, G, _, _, K = x_BGRLK.shape
    return x_BGRLK[:, :, :, tile].reshape(B, G, -1, K)


def _tile_mask(segment_ids_BL: jax.Array | None, tile: slice, R: int) -> jax.Array:
    """Return the mask of a tile, [B or 1, 1, S, T]; true where a query attends to a key."""
    mask = (jnp.arange(tile.stop)[:, None] <= jnp.arange(tile.start, tile.stop))[None]
    if segment_ids_BL is not None:
        mask &= segment_ids_BL[:, : tile.stop, None] == segment_ids_BL[:, None, tile]
    return jnp.tile(mask, (1, 1, R))[:, None]


def _split_heads(x_BLHK: jax.Array, G: int) -> jax.Array:
    """Split query heads into groups, [B, G, R, L, K]."""
    B, L, H, K = x_BLHK.shape
    return x_BLHK.reshape(B, L, G, H // G, K).transpose(0, 2, 3, 1, 4)


def _tiled_forward(
    q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, segment_ids_BL: jax.Array | None
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    B, L, H, K = q_BLHK.shape
    G = k_BLGK.shape[2]
    q_BGRLK = _split_heads(q_BLHK * jnp.asarray(K**-0.5, q_BLHK.dtype), G)
    k_BGLK, v_BGKL = k_BLGK.swapaxes(1, 2), v_BLGK.transpose(0, 2, 3, 1)
    outputs, weights, totals = [], [], []
    for tile in _tiles(L):
        scores_BGST = _batched_dot(k_BGLK[:, :, : tile.stop], _tile_queries(q_BGRLK, tile), 3, 3)
        scores_BGST = jnp.where(_tile_mask(segment_ids_BL, tile, H // G), scores_BGST, NEG_INF)
        largest_BG1T = scores_BGST.max(2, keepdims=True)
        e_BGST = jnp.exp(scores_BGST - largest_BG1T)
        inverse_BG1T = 1 / e_BGST.sum(2, keepdims=True)
        totals.append((largest_BG1T - jnp.log(inverse_BG1T)).reshape(B, G, H // G, -1))
        e_BGST = e_BGST.astype(q_BLHK.dtype)
        o_BGKT = _batched_dot(v_BGKL[..., : tile.stop], e_BGST, 3, 2) * inverse_BG1T
        outputs.append(o_BGKT.reshape(B, G, K, H // G, -1))
        weights.append((e_BGST, inverse_BG1T))
    o_BGKRL = jnp.concatenate(outputs, -1).astype(q_BLHK.dtype)
    o_BLHK = o_BGKRL.transpose(0, 4, 1, 3, 2).reshape(B, L, H, K)
    total_BLH = jnp.concatenate(totals, -1).transpose(0, 3, 1, 2).reshape(B, L, H)
    return (o_BLHK, total_BLH), (q_BGRLK, k_BGLK, v_BLGK, o_BLHK, weights)


def _tiled_backward(residuals: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    g_BLHK, g_BLH = gradients
    q_BGRLK, k_BGLK, v_BLGK, o_BLHK, weights = residuals
    B, G, R, L, K = q_BGRLK.shape
    dtype = q_BGRLK.dtype
    inner_BLH = jnp.sum(g_BLHK * o_BLHK, axis=-1, dtype=jnp.float32) - g_BLH
    inner_BGRL = inner_BLH.reshape(B, L, G, R).transpose(0, 2, 3, 1)
    g_BGRLK, v_BGLK, k_BGKL = _split_heads(g_BLHK, G), v_BLGK.swapaxes(1, 2), k_BGLK.swapaxes(2, 3)
    dq, dk_BGLK, dv_BGLK = [], jnp.zeros((B, G, L, K)), jnp.zeros((B, G, L, K))
    for tile, (e_BGST, inverse_BG1T) in zip(_tiles(L), weights, strict=True):
        q_BGTK, keys = _tile_queries(q_BGRLK, tile), slice(0, tile.stop)
        g_BGTK = (_tile_queries(g_BGRLK, tile) * inverse_BG1T.swapaxes(2, 3)).astype(dtype)
        inner_BG1T = inner_BGRL[..., tile].reshape(B, G, 1, -1) * inverse_BG1T
        ds_BGST = e_BGST * (_batched_dot(v_BGLK[:, :, keys], g_BGTK, 3, 3) - inner_BG1T)
        ds_BGST = ds_BGST.astype(dtype)
        dv_BGLK = dv_BGLK.at[:, :, keys].add(_batched_dot(e_BGST, g_BGTK, 3, 2))
        dk_BGLK = dk_BGLK.at[:, :, keys].add(_batched_dot(ds_BGST, q_BGTK, 3, 2))
        dq.append(_batched_dot(k_BGKL[..., keys], ds_BGST, 3, 2).reshape(B, G, K, R, -1))
    dq_BGKRL = jnp.concatenate(dq, -1) * K**-0.5
    dq_BLHK = dq_BGKRL.transpose(0, 4, 1, 3, 2).reshape(B, L, G * R, K)
    dk_BLGK, dv_BLGK = dk_BGLK.swapaxes(1, 2), dv_BGLK.swapaxes(1, 2)
    return *(d.astype(dtype) for d in (dq_BLHK, dk_BLGK, dv_BLGK)), None


_tiled.defvjp(_tiled_forward, _tiled_backward)
