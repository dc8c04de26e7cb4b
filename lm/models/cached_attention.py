"""Attention in decoding: cached keys and values are heads first, so no step transposes them.

Shape letters: N layers, B batch, L queries, S cache length, H heads, G key/value heads, R = H/G,
K head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import NEG_INF, AttentionMask, beside_sinks
from lm.kernels.elementwise import softcap
from lm.models.cache import KeyValueCache, Layer, heads_first, write_layer
from lm.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from lm.models.attention import MixerInputs


def empty_keys_values(
    config: TransformerConfig, n_layers: int, batch: int, length: int
) -> KeyValueCache:
    """Return zeros as the keys and values of `n_layers` layers, which are the first axis."""
    c = config
    shape = (n_layers, batch, length, c.n_kv_heads, c.head_dim)
    return heads_first(c, (jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)))


def attend_and_cache(
    config: TransformerConfig,
    q_BLHK: jax.Array,
    keys_values: tuple[jax.Array, ...],
    inputs: MixerInputs,
    cache: KeyValueCache,
    layer: Layer | None,
) -> tuple[jax.Array, KeyValueCache]:
    """Write keys and values to a layer's cache, then attend to the cache.

    Args:
        config: configuration of the stack.
        q_BLHK: queries.
        keys_values: keys and values of the same tokens, [B, L, G, K] each, or one shared array.
        inputs: mask, whose offset is the slot of the first token, and bias of the scores.
        cache: cache of all layers.
        layer: index of the layer in the cache.

    Returns:
        The output [B, L, H, K], and the cache.
    """
    if hasattr(cache, "attend"):  # pages (`paged_cache.py`)
        return cache.attend(config, q_BLHK, keys_values, inputs)  # type: ignore[no-any-return]
    assert layer is not None
    new = heads_first(config, keys_values)
    cache, held = write_layer(cache, layer, new, inputs.mask.offset, axis=2)
    further = inputs.mask, inputs.bias_HLS, inputs.sinks_H
    return attend_to_cache(config, q_BLHK, held, *further), cache


def attend_to_cache(
    config: TransformerConfig,
    q_BLHK: jax.Array,
    held: KeyValueCache,
    mask: AttentionMask,
    bias_HLS: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Compute attention to the cached keys and values of one layer, as `attention` does.

    The R query heads of a group are rows of one product with its keys, which are never repeated.
    Scores, softmax and sums are in float32; operands have the dtype of the queries, or of the
    cache if that is wider.

    Args:
        config: configuration of the stack.
        q_BLHK: queries.
        held: keys and values of the layer.
        mask: visible keys.
        bias_HLS: bias of the scores.
        sinks_H: logits of the attention sinks.

    Returns:
        The output [B, L, H, K].
    """
    B, L, H, K = q_BLHK.shape
    (k_BGSK, k_scale), (v_BGSK, v_scale) = (
        x if isinstance(x, tuple) else (x, None) for x in (held[0], held[-1])
    )
    G, S = k_BGSK.shape[1:3]
    dtype = jnp.promote_types(q_BLHK.dtype, k_BGSK.dtype)
    q_BLGRK = (q_BLHK * jnp.asarray(config.score_scale, q_BLHK.dtype)).reshape(B, L, G, -1, K)
    q_BGTK = q_BLGRK.transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K).astype(dtype)

    def product(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(axes, x, y.astype(dtype), preferred_element_type=jnp.float32)

    scores = product("BGTK,BGSK->BGTS", q_BGTK, k_BGSK)
    if k_scale is not None:
        scores *= k_scale.swapaxes(2, 3)
    scores_BGRLS = scores.reshape(B, G, -1, L, S)
    if config.attention_softcap:
        scores_BGRLS = softcap(scores_BGRLS, config.attention_softcap)
    if bias_HLS is not None:
        scores_BGRLS += bias_HLS.reshape(G, H // G, *bias_HLS.shape[1:])
    mask_BLS = mask.materialize(L, S)
    if mask_BLS is not None:
        scores_BGRLS = jnp.where(mask_BLS[:, None, None], scores_BGRLS, NEG_INF)
    weights_BGRLS = jax.nn.softmax(scores_BGRLS, axis=-1)
    if sinks_H is not None:
        log_z_BGRL1 = jax.nn.logsumexp(scores_BGRLS, axis=-1, keepdims=True)
        weights_BGRLS *= beside_sinks(log_z_BGRL1, sinks_H.reshape(G, -1, 1, 1))
    weights_BGTS = weights_BGRLS.reshape(B, G, -1, S)
    if v_scale is not None:
        weights_BGTS *= v_scale.swapaxes(2, 3)
    out_BGTK = product("BGTS,BGSK->BGTK", weights_BGTS.astype(dtype), v_BGSK)
    out_BLGRK = out_BGTK.reshape(B, G, -1, L, K).transpose(0, 3, 1, 2, 4)
    return out_BLGRK.reshape(B, L, H, K).astype(q_BLHK.dtype)
