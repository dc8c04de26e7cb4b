"""Dot-product attention: the mask shared by all kernels, and the reference implementation.

`tiled_attention` is faster on CPUs, `blockwise_attention` needs O(L) memory, `splash_attention` is
the Pallas kernel for TPUs, `gpu_attention` has kernels for GPUs, and `ring_attention` computes
across devices.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, R = H/G, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.elementwise import softcap as apply_softcap

NEG_INF = -1e30  # masked score; finite, so that a fully masked row gives no NaN


@flax.struct.dataclass
class AttentionMask:
    """Attention mask: which keys each query attends to.

    Query i is at key position `offset` + i. A query attends to keys in its segment and, if
    causal, to none after itself. Tokens of a segment are contiguous and its prefix comes first, so
    every query attends to a contiguous range of keys (`mask_ranges`).

    Attributes:
        causal: mask keys after the query.
        segments_BL: segment ids of the queries; None for a single segment.
        key_segments_BS: segment ids of keys that are not the queries' own tokens (a cache, an
            encoder's output).
        offset: position of the first query among the keys.
        prefix_BS: keys that earlier queries attend to as well (prefix LM, Raffel 2020, fig. 3).
        window: a causal query attends to the last `window` keys, including itself (Child et al.
            2019; Beltagy et al. 2020), a bidirectional one to `window` // 2 on either side; 0: all.
        is_global: scalar; if true, the window does not apply.
        window_BL: per-query windows that replace `window`, for chunked attention: queries see keys
            from the start of their chunk (Llama 4).
    """

    causal: bool = flax.struct.field(pytree_node=False)
    segments_BL: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    offset: jax.Array | int = 0
    prefix_BS: jax.Array | None = None
    window: int = flax.struct.field(pytree_node=False, default=0)
    is_global: jax.Array | None = None
    window_BL: jax.Array | None = None

    def materialize(self, n_queries: int, n_keys: int) -> jax.Array | None:
        """Return the boolean mask [B or 1, n_queries, n_keys], or None if nothing is masked."""
        mask = None
        if self.causal:
            queries_L = self.offset + jnp.arange(n_queries)
            mask = (queries_L[:, None] >= jnp.arange(n_keys))[None]
            if self.prefix_BS is not None:
                mask = mask | self.prefix_BS.astype(bool)[:, None, :]
        if self.window:
            before_LS = self.offset + jnp.arange(n_queries)[:, None] - jnp.arange(n_keys)
            window = self.window if self.window_BL is None else self.window_BL[..., None]
            near = before_LS < window if self.causal else jnp.abs(before_LS) <= self.window // 2
            near = near if self.is_global is None else near | self.is_global
            mask = near[None] if mask is None else mask & near
        if self.segments_BL is not None:
            keys_BS = self.segments_BL if self.key_segments_BS is None else self.key_segments_BS
            same = self.segments_BL[:, :, None] == keys_BS[:, None, :]
            mask = same if mask is None else mask & same
        return mask


@dataclass(frozen=True)
class Dropout:
    """Dropout of attention weights: random key and rate."""

    key: jax.Array
    rate: float


def attention(
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
    """Compute dot-product attention (Vaswani 2017, eq. 1) with grouped queries (Ainslie 2023).

    Materializes all scores; XLA compiles it for any platform.

    Args:
        q_BLHK: queries.
        k_BSGK: keys; each of the G heads serves H/G query heads.
        v_BSGK: values, whose head dim may differ.
        mask: which keys each query attends to.
        scale: factor of the scores.
        softcap: soft cap of the scores (`elementwise.softcap`); 0: none.
        bias_HLS: bias added to the scores, such as T5's relative position bias; [B, H, L, S] if it
            differs by row.
        sinks_H: attention-sink logits, which take part in the softmax without a value.
        dropout: dropout of attention weights.

    Returns:
        Output [B, L, H, head dim of the values]. Scores and softmax are computed in float32.
    """
    B, L, H, K = q_BLHK.shape
    S, G = k_BSGK.shape[1:3]
    q_BLHK = q_BLHK * jnp.asarray(scale, q_BLHK.dtype)
    q_BLGRK = q_BLHK.reshape(B, L, G, H // G, K)
    mask_BLS = mask.materialize(L, S)
    scores_BGRLS = jnp.einsum(
        "BLGRK,BSGK->BGRLS", q_BLGRK, k_BSGK, preferred_element_type=jnp.float32
    )
    if softcap:
        scores_BGRLS = apply_softcap(scores_BGRLS, softcap)
    if bias_HLS is not None:
        *rows, _, _, _ = bias_HLS.shape
        scores_BGRLS += bias_HLS.reshape(*rows, G, H // G, *bias_HLS.shape[-2:])
    if mask_BLS is not None:
        scores_BGRLS = jnp.where(mask_BLS[:, None, None], scores_BGRLS, NEG_INF)
    weights_BGRLS = jax.nn.softmax(scores_BGRLS, axis=-1)
    if sinks_H is not None:
        log_z_BGRL1 = jax.nn.logsumexp(scores_BGRLS, axis=-1, keepdims=True)
        weights_BGRLS *= beside_sinks(log_z_BGRL1, sinks_H.reshape(G, -1, 1, 1))
    if dropout is not None:
        keep = jax.random.bernoulli(dropout.key, 1 - dropout.rate, weights_BGRLS.shape)
        weights_BGRLS = jnp.where(keep, weights_BGRLS / (1 - dropout.rate), 0)
    out_BLGRK = jnp.einsum(
        "BGRLS,BSGK->BLGRK",
        weights_BGRLS.astype(v_BSGK.dtype),
        v_BSGK,
        preferred_element_type=jnp.float32,
    )
    return out_BLGRK.reshape(B, L, H, -1).astype(q_BLHK.dtype)


def beside_sinks(log_z: jax.Array, sinks: jax.Array) -> jax.Array:
    """Return the softmax mass left to the keys next to an attention sink.

    A softmax over scores s and sink z is the softmax over s times Σ exp(s) / (Σ exp(s) + exp(z)).

    Args:
        log_z: log-normalizer of each query over its keys, log Σ exp(s).
        sinks: sink logit of each head, broadcastable to `log_z`.
    """
    return jax.nn.sigmoid(log_z - sinks)
