"""Chunked Mamba-2 recurrence (state-space duality; Dao and Gu 2024, arXiv 2405.21060).

Each head has a state S [P, N], updated by every token:
S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_tᵀ and y_t = S_t C_t. Within a chunk this is a product over
all pairs of tokens, like attention without softmax; states are passed from chunk to chunk (ibid.,
§6).

Shape letters: B batch, L length, H heads, G groups of heads, R = H/G, P head dim, N state,
Z chunks, Q tokens of a chunk.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax


def state_space(
    x_BLHP: jax.Array,
    dt_BLH: jax.Array,
    a_H: jax.Array,
    b_BLGN: jax.Array,
    c_BLGN: jax.Array,
    ids_BL: jax.Array,
    state_BHPN: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence over a sequence.

    Args:
        x_BLHP: inputs.
        dt_BLH: step sizes; a token of step size 0 leaves the state unchanged.
        a_H: decay rates, negative.
        b_BLGN: input matrices B of each group of heads.
        c_BLGN: output matrices C of each group of heads.
        ids_BL: segment ids in ascending order: the state is zero at the start of each segment,
            except for segment 0, which continues from `state_BHPN`.
        state_BHPN: state before the first token.
        chunk: maximum tokens per chunk.

    Returns:
        Outputs [B, L, H, P] and the state after the last token, both float32.
    """
    B, L, H, P = x_BLHP.shape
    G, N = b_BLGN.shape[2:]
    Q, R = min(chunk, L), H // G
    dt_BLH = dt_BLH.astype(jnp.float32)
    b_BZQGN, c_BZQGN = (split_chunks(x.astype(jnp.float32), Q) for x in (b_BLGN, c_BLGN))
    x_BLGRP = (x_BLHP.astype(jnp.float32) * dt_BLH[..., None]).reshape(B, L, G, R, P)
    x_BZQGRP = split_chunks(x_BLGRP, Q)
    decays = chunk_decays((dt_BLH * a_H).reshape(B, L, G, R), ids_BL, Q)

    scores = float32_einsum("bzign,bzjgn->bzijg", c_BZQGN, b_BZQGN)
    y_BZQGRP = float32_einsum("bzijg,bzijgr,bzjgrp->bzigrp", scores, decays.between, x_BZQGRP)
    added_BZGRPN = float32_einsum("bzjgn,bzjgr,bzjgrp->bzgrpn", b_BZQGN, decays.to_end, x_BZQGRP)

    def pass_on(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        kept_BGR, added_BGRPN = chunk
        return kept_BGR[..., None, None] * state + added_BGRPN, state

    start = state_BHPN.astype(jnp.float32).reshape(B, G, R, P, N)
    chunks = decays.whole.swapaxes(0, 1), added_BZGRPN.swapaxes(0, 1)
    after, before_ZBGRPN = lax.scan(pass_on, start, chunks)
    y_BZQGRP += float32_einsum(
        "bzign,zbgrpn,bzigr->bzigrp", c_BZQGN, before_ZBGRPN, decays.from_start
    )
    return y_BZQGRP.reshape(B, -1, H, P)[:, :L], after.reshape(B, H, P, N)


@flax.struct.dataclass
class ChunkDecays:
    """Decay of a state within chunks; 0 between tokens of different segments.

    Attributes:
        between: from token j to token i of a chunk, [B, Z, Q, Q, G, R]; 0 where j > i.
        from_start: from the state before a chunk to each token, [B, Z, Q, G, R].
        to_end: from each token to the state after the chunk, [B, Z, Q, G, R].
        whole: from the state before a chunk to the state after it, [B, Z, G, R].
    """

    between: jax.Array
    from_start: jax.Array
    to_end: jax.Array
    whole: jax.Array


def chunk_decays(log_decay_BLGR: jax.Array, ids_BL: jax.Array, size: int) -> ChunkDecays:
    """Return the decays within chunks of `size` tokens.

    Args:
        log_decay_BLGR: logarithm of each token's decay, float32.
        ids_BL: segment ids, as in `state_space`.
        size: tokens per chunk, Q.
    """
    ids_BZQ = split_chunks(ids_BL, size, "edge")
    decay_BZQGR = jnp.cumsum(split_chunks(log_decay_BLGR, size), axis=2)
    seen_BZQQ = ids_BZQ[:, :, :, None] == ids_BZQ[:, :, None]
    seen_BZQQ &= jnp.tril(jnp.ones((size, size), bool))
    between = decay_BZQGR[:, :, :, None] - decay_BZQGR[:, :, None]
    between = jnp.exp(jnp.where(seen_BZQQ[..., None, None], between, -jnp.inf))
    last_BZ1, end_BZ1GR = ids_BZQ[:, :, -1:], decay_BZQGR[:, :, -1:]
    to_end = jnp.exp(end_BZ1GR - decay_BZQGR) * (ids_BZQ == last_BZ1)[..., None, None]
    before_BZ1 = jnp.pad(last_BZ1[:, :-1], ((0, 0), (1, 0), (0, 0)))
    whole_BZGR = jnp.exp(end_BZ1GR[:, :, 0]) * (last_BZ1 == before_BZ1)[..., None]
    from_start = jnp.exp(decay_BZQGR) * (ids_BZQ == before_BZ1)[..., None, None]
    return ChunkDecays(between, from_start, to_end, whole_BZGR)


def split_chunks(x: jax.Array, size: int, mode: str = "constant") -> jax.Array:
    """Return x [B, L, …] as chunks [B, Z, size, …], with L padded as by `jnp.pad`."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)], mode=mode)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def float32_einsum(axes: str, *operands: jax.Array) -> jax.Array:
    """Return `jnp.einsum` of the operands, float32."""
    return jnp.einsum(axes, *operands, preferred_element_type=jnp.float32)
