"""Copying of source tokens: the pointer-generator (See, Liu and Manning 2017, §2.2).

P(v) = p_gen softmax(logits)_v + (1 - p_gen) Σ_{s: source_s = v} a_s, where a is attention from the
decoder's last hidden state to the encoder's outputs. It is a separate bilinear attention (Luong
et al. 2015, "general"), because fused kernels return no attention weights, and a head of the last
layer would have to serve two purposes.

Shape letters: B batch, L target length, S source length, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import NEG_INF, AttentionMask


@flax.struct.dataclass
class EncodedSource:
    """Encoder outputs that a decoder attends to, their segment ids, and the tokens to copy."""

    encoded_BSD: jax.Array
    segment_ids_BS: jax.Array
    tokens_BS: jax.Array


@flax.struct.dataclass
class CopyState:
    """Hidden states of a decoder, and the probabilities of copying.

    Every array has a row for each target, so that losses can be computed in chunks.

    Attributes:
        x_BLD: hidden states, which the logits are computed from.
        gate_BL1: logit of p_gen, float32.
        weights_BLS: attention a to each source token, float32.
        tokens_BLS: the source tokens.
    """

    x_BLD: jax.Array
    gate_BL1: jax.Array
    weights_BLS: jax.Array
    tokens_BLS: jax.Array


def attend_to_source(
    x_BLD: jax.Array,
    query_BLD: jax.Array,
    gate_BL1: jax.Array,
    segments_BL: jax.Array,
    source: EncodedSource,
) -> CopyState:
    """Compute the probabilities of copying each source token.

    Args:
        x_BLD: hidden states of the decoder.
        query_BLD: queries, scaled.
        gate_BL1: logit of p_gen.
        segments_BL: segment ids of the targets; tokens of other segments are not copied.
        source: encoded source.
    """
    scores_BLS = jnp.einsum(
        "bld,bsd->bls",
        query_BLD.astype(source.encoded_BSD.dtype),
        source.encoded_BSD,
        preferred_element_type=jnp.float32,
    )
    mask_BLS = AttentionMask(False, segments_BL, source.segment_ids_BS).materialize(
        *scores_BLS.shape[1:]
    )
    assert mask_BLS is not None
    weights_BLS = jax.nn.softmax(jnp.where(mask_BLS, scores_BLS, NEG_INF), axis=-1)
    tokens_BLS = jnp.broadcast_to(source.tokens_BS[:, None], weights_BLS.shape)
    return CopyState(x_BLD, gate_BL1, weights_BLS, tokens_BLS)


def mixed_logits(logits: Callable[[jax.Array], jax.Array], x_BLD: Any) -> jax.Array:
    """Return `logits` of hidden states, mixed with the copies of a `CopyState`."""
    if not isinstance(x_BLD, CopyState):
        return logits(x_BLD)
    return mix(logits(x_BLD.x_BLD), x_BLD)


def mix(logits_BLV: jax.Array, state: CopyState) -> jax.Array:
    """Return the log-probabilities [B, L, V] of generating or copying each token, float32."""
    B, L, V = logits_BLV.shape
    rows = jnp.arange(B)[:, None, None], jnp.arange(L)[None, :, None]
    copied_BLV = jnp.zeros((B, L, V)).at[(*rows, state.tokens_BLS)].add(state.weights_BLS)
    is_there = copied_BLV > 0
    log_copied_BLV = jnp.log(jnp.where(is_there, copied_BLV, 1))
    generated_BLV = jax.nn.log_sigmoid(state.gate_BL1) + jax.nn.log_softmax(logits_BLV)
    both_BLV = jnp.logaddexp(generated_BLV, jax.nn.log_sigmoid(-state.gate_BL1) + log_copied_BLV)
    return jnp.where(is_there, both_BLV, generated_BLV)
