"""Chunked gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464).

Each head has a state S [P, N], a linear map from keys to values. Every token lets it decay by α,
and moves the value stored at its key k toward v, at the rate β:
S_t = α_t S_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ and y_t = S_t q_t.

Within a chunk the values that tokens write solve a triangular system (ibid., §3.3), so that all
tokens are computed by matrix products; states are passed from chunk to chunk.

Shape letters: B batch, L length, H heads, G groups of heads, R = H/G, P value dim, N key dim,
Z chunks, Q tokens of a chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lm.kernels.state_space import chunk_decays, float32_einsum, split_chunks

_EXACT = lax.Precision.HIGHEST


def delta_rule(
    v_BLHP: jax.Array,
    log_decay_BLH: jax.Array,
    rate_BLH: jax.Array,
    k_BLGN: jax.Array,
    q_BLGN: jax.Array,
    ids_BL: jax.Array,
    state_BHPN: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence over a sequence.

    Args:
        v_BLHP: values.
        log_decay_BLH: log α, at most 0.
        rate_BLH: β, from 0 to 1; a token of decay 1 and rate 0 leaves the state unchanged.
        k_BLGN: keys of each group of heads, of unit length.
        q_BLGN: queries of each group of heads.
        ids_BL: segment ids, as in `lm/kernels/state_space.py:state_space`.
        state_BHPN: state before the first token.
        chunk: maximum tokens per chunk.

    Returns:
        Outputs [B, L, H, P] and the state after the last token, both float32.
    """
    B, L, H, P = v_BLHP.shape
    G, N = k_BLGN.shape[2:]
    Q, R = min(chunk, L), H // G
    v, k, q, log_decay, rate = (
        x.astype(jnp.float32) for x in (v_BLHP, k_BLGN, q_BLGN, log_decay_BLH, rate_BLH)
    )
    k_BZQGN, q_BZQGN = split_chunks(k, Q), split_chunks(q, Q)
    v_BZQGRP = split_chunks(v.reshape(B, L, G, R, P), Q)
    rate_BZGRQ = jnp.moveaxis(split_chunks(rate.reshape(B, L, G, R), Q), 2, -1)
    decays = chunk_decays(log_decay.reshape(B, L, G, R), ids_BL, Q)
    between_BZGRQQ = jnp.moveaxis(decays.between, (2, 3), (4, 5))

    # Token i writes u_i = β_i (v_i - S k_i), S having decayed since the tokens j < i wrote u_j:
    # (I + A) u = β (v - S_0 k), with A_ij = β_i (k_i · k_j) times the decay from j to i.
    overlap_BZGQQ = float32_einsum("bzign,bzjgn->bzgij", k_BZQGN, k_BZQGN)
    a_BZGRQQ = jnp.tril(overlap_BZGQQ, -1)[:, :, :, None] * between_BZGRQQ * rate_BZGRQ[..., None]
    solve_BZGRQQ = unit_lower_inverse(a_BZGRQQ) * rate_BZGRQ[..., None, :]
    new_BZGRQP = float32_einsum("bzgrij,bzjgrp->bzgrip", solve_BZGRQQ, v_BZQGRP)
    reads_BZGRQN = float32_einsum(
        "bzgrij,bzjgr,bzjgn->bzgrin", solve_BZGRQQ, decays.from_start, k_BZQGN
    )
    writes_BZQGRN = decays.to_end[..., None] * k_BZQGN[..., None, :]

    def pass_on(
        state: jax.Array, chunk: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        kept_BGR, new_BGRQP, reads_BGRQN, writes_BQGRN = chunk
        u_BGRQP = new_BGRQP - float32_einsum("bgrin,bgrpn->bgrip", reads_BGRQN, state)
        after = kept_BGR[..., None, None] * state
        return after + float32_einsum("bgrip,bigrn->bgrpn", u_BGRQP, writes_BQGRN), (u_BGRQP, state)

    start = state_BHPN.astype(jnp.float32).reshape(B, G, R, P, N)
    parts = decays.whole, new_BZGRQP, reads_BZGRQN, writes_BZQGRN
    after, (u, before) = lax.scan(pass_on, start, tuple(x.swapaxes(0, 1) for x in parts))
    scores_BZGQQ = float32_einsum("bzign,bzjgn->bzgij", q_BZQGN, k_BZQGN)
    y_BZQGRP = float32_einsum("bzgij,bzgrij,zbgrjp->bzigrp", scores_BZGQQ, between_BZGRQQ, u)
    y_BZQGRP += float32_einsum("bzign,zbgrpn,bzigr->bzigrp", q_BZQGN, before, decays.from_start)
    return y_BZQGRP.reshape(B, -1, H, P)[:, :L], after.reshape(B, H, P, N)


@jax.custom_jvp
def unit_lower_inverse(a: jax.Array) -> jax.Array:
    """Return (I + a)⁻¹ of strictly lower triangular matrices a [..., Q, Q], float32.

    The inverses of the diagonal blocks of 1, 2, 4, … rows are merged in pairs: with C below the
    blocks A and B, the inverse has -B⁻¹ C A⁻¹ there. Unlike the powers of a, all of these are parts
    of the inverse, and as exact.
    """
    Q = a.shape[-1]
    row, column = jnp.arange(Q)[:, None], jnp.arange(Q)
    inverse = jnp.broadcast_to(jnp.eye(Q), a.shape)
    size = 1
    while size < Q:
        is_below = (row // size == column // size + 1) & (row // size % 2 == 1)
        inverse -= _exact_product(inverse, jnp.where(is_below, a, 0), inverse)
        size *= 2
    return inverse


@unit_lower_inverse.defjvp
def _inverse_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    inverse = unit_lower_inverse(*primals)
    return inverse, -_exact_product(inverse, tangents[0], inverse)


def _exact_product(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Return the product of three matrices, in float32 on every device."""
    return jnp.matmul(jnp.matmul(a, b, precision=_EXACT), c, precision=_EXACT)
