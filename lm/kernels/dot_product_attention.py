"""Attention kernels by name, and the choice among them.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, R = H/G, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.activations import softcap as capped
from lm.kernels.blockwise_attention import blockwise_attention
from lm.kernels.tiled_attention import MASKED, tiled_attention


@flax.struct.dataclass
class AttentionMask:
    """Which keys a query sees: those of its own segment and, if causal, not after itself.

    Without segment ids all is one segment. Keys that are not the queries' own tokens (a cache, an
    encoder) bring `key_segments_BS`. Query i stands at key position `offset` + i. Keys of a
    prefix, where `prefix_BS` is true, are seen by queries before them too (Raffel 2020, fig. 3).

    With a `window` a causal query sees no key further back than the last so many, itself included
    (Child et al. 2019; Beltagy et al. 2020), unless `is_global`, a number, is true.
    """

    causal: bool = flax.struct.field(pytree_node=False)
    segments_BL: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    offset: jax.Array | int = 0
    prefix_BS: jax.Array | None = None
    window: int = flax.struct.field(pytree_node=False, default=0)
    is_global: jax.Array | None = None

    def mask(self, n_queries: int, n_keys: int) -> jax.Array | None:
        """[B or 1, n_queries, n_keys], true where a query sees a key; None: everything is seen."""
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
    """Dropout of attention weights."""

    key: jax.Array
    rate: float


def attention(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visibility: AttentionMask,
    *,
    kernel: str = "xla",
    scale: float | None = None,
    softcap: float = 0.0,
    bias_HLS: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Dot-product attention (Vaswani 2017, eq. 1) with grouped queries: [B, L, H, K].

    Scores are multiplied by `scale`, 1/sqrt(K) unless given, kept below `softcap` unless it is 0,
    and `bias_HLS` is added to them.
    Kernels: "xla" computes every score; "tiled" never computes the masked half of whole causal
    squares, as a decoder trains on; its steps of decoding, which are no such square, go to "xla";
    "blockwise" never has more than a tile of the scores; "cudnn" is NVIDIA's. ValueError if one
    cannot do what is asked. Scores and softmax are float32.
    """
    L, S, K = q_BLHK.shape[1], k_BSGK.shape[1], q_BLHK.shape[-1]
    scale = K**-0.5 if scale is None else scale
    if kernel == "tiled" and visibility.key_segments_BS is None and L == S:
        plain = visibility.causal and visibility.prefix_BS is None and not visibility.window
        plain &= bias_HLS is None and dropout is None and not softcap
        if not plain or scale != K**-0.5:
            raise ValueError('attention kernel "tiled" is for plain causal attention')
        return tiled_attention(q_BLHK, k_BSGK, v_BSGK, visibility.segments_BL)
    if kernel in ("blockwise", "cudnn"):
        if not (bias_HLS is None and dropout is None):
            raise ValueError(f'attention kernel "{kernel}" has neither bias nor dropout')
        if softcap:
            raise ValueError(f'attention kernel "{kernel}" has no soft-cap')
    if kernel == "cudnn":
        return _cudnn(q_BLHK, k_BSGK, v_BSGK, visibility, scale)
    q_BLHK = q_BLHK * jnp.asarray(scale, q_BLHK.dtype)
    if kernel == "blockwise":
        if visibility.prefix_BS is not None or (visibility.causal and L != S):
            raise ValueError('attention kernel "blockwise" has no prefixes and no cache')
        if visibility.window:
            raise ValueError('attention kernel "blockwise" has no windows')
        own, other = visibility.segments_BL, visibility.key_segments_BS
        other = own if other is None else other
        return blockwise_attention(q_BLHK, k_BSGK, v_BSGK, own, other, visibility.causal)
    return _attend(q_BLHK, k_BSGK, v_BSGK, visibility.mask(L, S), softcap, bias_HLS, dropout)


def _cudnn(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visibility: AttentionMask,
    scale: float,
) -> jax.Array:
    """NVIDIA's fused kernel, which takes a causal mask by name and any other as an array."""
    only_causal = visibility.causal and visibility.segments_BL is None
    only_causal &= visibility.prefix_BS is None and not visibility.window
    mask_BLS = None
    if not only_causal:
        mask_BLS = visibility.mask(q_BLHK.shape[1], k_BSGK.shape[1])
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
    B, L, H, K = q_BLHK.shape
    G = k_BSGK.shape[2]
    q_BLGRK = q_BLHK.reshape(B, L, G, H // G, K)
    scores_BGRLS = jnp.einsum(
        "BLGRK,BSGK->BGRLS", q_BLGRK, k_BSGK, preferred_element_type=jnp.float32
    )
    if softcap:
        scores_BGRLS = capped(scores_BGRLS, softcap)
    if bias_HLS is not None:
        scores_BGRLS += bias_HLS.reshape(G, H // G, *bias_HLS.shape[1:])
    if mask_BLS is not None:
        scores_BGRLS = jnp.where(mask_BLS[:, None, None], scores_BGRLS, MASKED)
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
