"""Attention kernels by name, and the choice among them.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, R = H/G, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp

MASKED = -1e30


@flax.struct.dataclass
class Visibility:
    """Which keys a query sees: those of its own segment and, if causal, not after itself.

    Without segment ids every key is of one segment. Query i stands at key position `offset` + i.
    """

    causal: bool = flax.struct.field(pytree_node=False)
    query_segments_BL: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    offset: jax.Array | int = 0

    def mask(self, first_query: int, n_queries: int, n_keys: int) -> jax.Array | None:
        """[B or 1, n_queries, n_keys], true where a query sees a key; None: everything is seen."""
        mask = None
        if self.causal:
            queries_L = first_query + self.offset + jnp.arange(n_queries)
            mask = (queries_L[:, None] >= jnp.arange(n_keys))[None]
        if self.query_segments_BL is not None and self.key_segments_BS is not None:
            queries_BL = self.query_segments_BL[:, first_query : first_query + n_queries]
            same = queries_BL[:, :, None] == self.key_segments_BS[:, None, :n_keys]
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
    visibility: Visibility,
    *,
    kernel: str = "xla",
    dropout: Dropout | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani 2017, eq. 1) with grouped queries: [B, L, H, K].

    Kernels: "xla" computes every score; "tiled" skips the keys after a tile of queries, so that
    of a causal square little more than half is computed. Scores and softmax are float32.
    """
    L, S = q_BLHK.shape[1], k_BSGK.shape[1]
    if kernel == "xla" or not can_tile(visibility, L, S):
        return _attend(q_BLHK, k_BSGK, v_BSGK, visibility.mask(0, L, S), dropout)
    tile = tile_length(L)
    outputs = []
    for start in range(0, L, tile):
        end = start + tile
        outputs.append(
            _attend(
                q_BLHK[:, start:end],
                k_BSGK[:, :end],
                v_BSGK[:, :end],
                visibility.mask(start, tile, end),
                dropout and Dropout(jax.random.fold_in(dropout.key, start), dropout.rate),
            )
        )
    return jnp.concatenate(outputs, axis=1)


def can_tile(visibility: Visibility, n_queries: int, n_keys: int) -> bool:
    """Whether "tiled" has something to skip: whole causal squares, as in training."""
    square = isinstance(visibility.offset, int) and visibility.offset == 0 and n_queries == n_keys
    return visibility.causal and square and tile_length(n_queries) < n_queries


def tile_length(length: int) -> int:
    """Queries a tile: a quarter of the sequence, or as near as divides it."""
    return next((length // n for n in (4, 2) if length % n == 0 and length // n >= 16), length)


def _attend(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BLS: jax.Array | None,
    dropout: Dropout | None,
) -> jax.Array:
    B, L, H, K = q_BLHK.shape
    G = k_BSGK.shape[2]
    q_BLGRK = (q_BLHK * jnp.asarray(K**-0.5, q_BLHK.dtype)).reshape(B, L, G, H // G, K)
    scores_BGRLS = jnp.einsum(
        "BLGRK,BSGK->BGRLS", q_BLGRK, k_BSGK, preferred_element_type=jnp.float32
    )
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
