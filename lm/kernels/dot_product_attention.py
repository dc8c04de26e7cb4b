"""Dot-product attention: masks, and the kernels that XLA compiles for any platform.

The Pallas kernel for TPUs is in `splash_attention`, tiles with O(L) memory in
`blockwise_attention`, and attention across devices in `ring_attention`.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, R = H/G, K head dim. In
`tiled_attention`: T queries of a tile times R, S keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.dense import softcap as apply_softcap

NEG_INF = -1e30  # score of a masked key; finite, so that a row that is masked throughout has no NaN
SHORTEST_TILE = 64


@flax.struct.dataclass
class AttentionMask:
    """Description of which keys each query attends to.

    Query i stands at key position `offset` + i. A query attends to keys of its own segment and, if
    causal, to none after itself.

    Attributes:
        causal: mask keys after the query.
        segments_BL: segment ids of the queries; None for a single segment.
        key_segments_BS: segment ids of keys that are not the queries' own tokens (a cache, an
            encoder's output).
        offset: position of the first query among the keys.
        prefix_BS: keys that queries before them attend to as well (prefix LM, Raffel 2020, fig. 3).
        window: a causal query attends to the last `window` keys, itself included (Child et al.
            2019; Beltagy et al. 2020); 0 for all.
        is_global: scalar; where true the window does not apply.
    """

    causal: bool = flax.struct.field(pytree_node=False)
    segments_BL: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    offset: jax.Array | int = 0
    prefix_BS: jax.Array | None = None
    window: int = flax.struct.field(pytree_node=False, default=0)
    is_global: jax.Array | None = None

    def materialize(self, n_queries: int, n_keys: int) -> jax.Array | None:
        """Return the boolean mask [B or 1, n_queries, n_keys], or None if nothing is masked."""
        mask = None
        if self.causal:
            queries_L = self.offset + jnp.arange(n_queries)
            mask = (queries_L[:, None] >= jnp.arange(n_keys))[None]
            if self.prefix_BS is not None:
                mask = mask | self.prefix_BS.astype(bool)[:, None, :]
            if self.window:
                near = jnp.arange(n_keys) > queries_L[:, None] - self.window
                mask &= near if self.is_global is None else near | self.is_global
        if self.segments_BL is not None:
            keys_BS = self.segments_BL if self.key_segments_BS is None else self.key_segments_BS
            same = self.segments_BL[:, :, None] == keys_BS[:, None, :]
            mask = same if mask is None else mask & same
        return mask


@dataclass(frozen=True)
class Dropout:
    """Dropout of attention weights: a random key and a rate."""

    key: jax.Array
    rate: float


def attention(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    *,
    kernel: str = "xla",
    scale: float | None = None,
    softcap: float = 0.0,
    bias_HLS: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Compute dot-product attention (Vaswani 2017, eq. 1) with grouped queries (Ainslie 2023).

    Args:
        q_BLHK: queries.
        k_BSGK: keys; each of the G heads serves H/G query heads.
        v_BSGK: values.
        mask: which keys each query attends to.
        kernel: "xla" computes all scores. "tiled" skips the masked half of square causal
            attention, as in training; decoding steps are not square and use "xla". "blockwise"
            holds one tile of scores at a time. "cudnn" is NVIDIA's fused kernel.
        scale: factor of the scores; None for 1/sqrt(K).
        softcap: bound of the scores (`dense.softcap`); 0 for none.
        bias_HLS: added to the scores, such as T5's relative position bias.
        dropout: dropout of the attention weights.

    Returns:
        The output [B, L, H, K]. Scores and softmax are computed in float32.

    Raises:
        ValueError: the kernel does not support one of the arguments.
    """
    L, S, K = q_BLHK.shape[1], k_BSGK.shape[1], q_BLHK.shape[-1]
    scale = K**-0.5 if scale is None else scale
    if kernel == "tiled" and mask.key_segments_BS is None and L == S:
        plain = mask.causal and mask.prefix_BS is None and not mask.window
        plain &= bias_HLS is None and dropout is None and not softcap
        if not plain or scale != K**-0.5:
            raise ValueError('attention kernel "tiled" supports plain causal attention only')
        return tiled_attention(q_BLHK, k_BSGK, v_BSGK, mask.segments_BL)
    if kernel in ("blockwise", "cudnn"):
        if not (bias_HLS is None and dropout is None):
            raise ValueError(f'attention kernel "{kernel}" supports neither bias nor dropout')
        if softcap:
            raise ValueError(f'attention kernel "{kernel}" does not support a soft-cap')
    if kernel == "cudnn":
        return _cudnn(q_BLHK, k_BSGK, v_BSGK, mask, scale)
    q_BLHK = q_BLHK * jnp.asarray(scale, q_BLHK.dtype)
    if kernel == "blockwise":
        if mask.prefix_BS is not None or (mask.causal and L != S):
            raise ValueError('attention kernel "blockwise" supports neither prefixes nor a cache')
        if mask.window:
            raise ValueError('attention kernel "blockwise" does not support windows')
        from lm.kernels.blockwise_attention import blockwise_attention

        own, other = mask.segments_BL, mask.key_segments_BS
        other = own if other is None else other
        return blockwise_attention(q_BLHK, k_BSGK, v_BSGK, own, other, mask.causal)
    return _attend(q_BLHK, k_BSGK, v_BSGK, mask.materialize(L, S), softcap, bias_HLS, dropout)


def _cudnn(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    scale: float,
) -> jax.Array:
    """Call NVIDIA's fused kernel, which has a flag for causal masks and takes others as arrays."""
    only_causal = mask.causal and mask.segments_BL is None
    only_causal &= mask.prefix_BS is None and not mask.window
    mask_BLS = None
    if not only_causal:
        mask_BLS = mask.materialize(q_BLHK.shape[1], k_BSGK.shape[1])
    return jax.nn.dot_product_attention(
        q_BLHK,
        k_BSGK,
        v_BSGK,
        mask=None if mask_BLS is None else mask_BLS[:, None],
        scale=scale,
        is_causal=only_causal,
        implementation="cudnn",
    )


def _attend(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BLS: jax.Array | None,
    softcap: float,
    bias_HLS: jax.Array | None,
    dropout: Dropout | None,
) -> jax.Array:
    """Compute attention with all scores in memory."""
    B, L, H, K = q_BLHK.shape
    G = k_BSGK.shape[2]
    q_BLGRK = q_BLHK.reshape(B, L, G, H // G, K)
    scores_BGRLS = jnp.einsum(
        "BLGRK,BSGK->BGRLS", q_BLGRK, k_BSGK, preferred_element_type=jnp.float32
    )
    if softcap:
        scores_BGRLS = apply_softcap(scores_BGRLS, softcap)
    if bias_HLS is not None:
        scores_BGRLS += bias_HLS.reshape(G, H // G, *bias_HLS.shape[1:])
    if mask_BLS is not None:
        scores_BGRLS = jnp.where(mask_BLS[:, None, None], scores_BGRLS, NEG_INF)
    weights_BGRLS = jax.nn.softmax(scores_BGRLS, axis=-1)
    if dropout is not None:
        keep = jax.random.bernoulli(dropout.key, 1 - dropout.rate, weights_BGRLS.shape)
        weights_BGRLS = jnp.where(keep, weights_BGRLS / (1 - dropout.rate), 0)
    out_BLGRK = jnp.einsum(
        "BGRLS,BSGK->BLGRK",
        weights_BGRLS.astype(v_BSGK.dtype),
        v_BSGK,
        preferred_element_type=jnp.float32,
    )
    return out_BLGRK.reshape(B, L, H, K).astype(q_BLHK.dtype)


@jax.custom_vjp
def tiled_attention(
    q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, segment_ids_BL: jax.Array | None
) -> jax.Array:
    """Compute causal attention without the masked half, for XLA's CPU backend.

    A tile of queries attends to the keys up to its end. Scores lie keys first, [S, T], so that
    none of the six products of a step contracts the rows of both operands, which that backend does
    slowly. The softmax is normalized after the values are summed, and the backward pass takes the
    weights from the forward pass (Dao et al. 2022, alg. 4, without recomputation).

    Args:
        q_BLHK: queries, which are scaled by 1/sqrt(K) here.
        k_BLGK: keys.
        v_BLGK: values.
        segment_ids_BL: segments that attention stays within, or None.

    Returns:
        The output [B, L, H, K]. Softmax and sums are computed in float32.
    """
    return _tiled_forward(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)[0]


def _tiles(length: int) -> Iterator[slice]:
    """Yield four query tiles, or fewer where they would be shorter than `SHORTEST_TILE`."""
    tile = max(-(-length // 4), SHORTEST_TILE)
    for start in range(0, length, tile):
        yield slice(start, min(start + tile, length))


def _batched_dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Contract one axis of each operand, batched over their first two."""
    dimensions = (((x_axis,), (y_axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _tile_queries(x_BGRLK: jax.Array, tile: slice) -> jax.Array:
    """Return the queries of a tile, [B, G, T, K]: the R heads of a group one after the other."""
    B, G, _, _, K = x_BGRLK.shape
    return x_BGRLK[:, :, :, tile].reshape(B, G, -1, K)


def _tile_mask(segment_ids_BL: jax.Array | None, tile: slice, R: int) -> jax.Array:
    """Return the mask of a tile, [B or 1, 1, S, T], true where a query attends to a key."""
    mask = (jnp.arange(tile.stop)[:, None] <= jnp.arange(tile.start, tile.stop))[None]
    if segment_ids_BL is not None:
        mask &= segment_ids_BL[:, : tile.stop, None] == segment_ids_BL[:, None, tile]
    return jnp.tile(mask, (1, 1, R))[:, None]


def _split_heads(x_BLHK: jax.Array, G: int) -> jax.Array:
    """Split the query heads into groups: [B, G, R, L, K]."""
    B, L, H, K = x_BLHK.shape
    return x_BLHK.reshape(B, L, G, H // G, K).transpose(0, 2, 3, 1, 4)


def _tiled_forward(
    q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, segment_ids_BL: jax.Array | None
) -> tuple[jax.Array, tuple]:
    B, L, H, K = q_BLHK.shape
    G = k_BLGK.shape[2]
    q_BGRLK = _split_heads(q_BLHK * jnp.asarray(K**-0.5, q_BLHK.dtype), G)
    k_BGLK, v_BGKL = k_BLGK.swapaxes(1, 2), v_BLGK.transpose(0, 2, 3, 1)
    outputs, weights = [], []
    for tile in _tiles(L):
        scores_BGST = _batched_dot(k_BGLK[:, :, : tile.stop], _tile_queries(q_BGRLK, tile), 3, 3)
        scores_BGST = jnp.where(_tile_mask(segment_ids_BL, tile, H // G), scores_BGST, NEG_INF)
        e_BGST = jnp.exp(scores_BGST - scores_BGST.max(2, keepdims=True))
        inverse_BG1T = 1 / e_BGST.sum(2, keepdims=True)
        e_BGST = e_BGST.astype(q_BLHK.dtype)
        o_BGKT = _batched_dot(v_BGKL[..., : tile.stop], e_BGST, 3, 2) * inverse_BG1T
        outputs.append(o_BGKT.reshape(B, G, K, H // G, -1))
        weights.append((e_BGST, inverse_BG1T))
    o_BGKRL = jnp.concatenate(outputs, -1).astype(q_BLHK.dtype)
    o_BLHK = o_BGKRL.transpose(0, 4, 1, 3, 2).reshape(B, L, H, K)
    return o_BLHK, (q_BGRLK, k_BGLK, v_BLGK, o_BLHK, weights)


def _tiled_backward(residuals: tuple, g_BLHK: jax.Array) -> tuple:
    q_BGRLK, k_BGLK, v_BLGK, o_BLHK, weights = residuals
    B, G, R, L, K = q_BGRLK.shape
    dtype = q_BGRLK.dtype
    inner_BLH = jnp.sum(g_BLHK * o_BLHK, axis=-1, dtype=jnp.float32)
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


tiled_attention.defvjp(_tiled_forward, _tiled_backward)
