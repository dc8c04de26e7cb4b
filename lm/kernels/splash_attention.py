"""Splash attention: the Pallas kernel for TPUs that comes with JAX, over any mesh.

Tiles of scores that are masked everywhere are skipped, so causal work is half of full work.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.zigzag import places

LANES = 128  # lengths are multiples of it
LARGEST_BLOCK = 512


def make_kernel(
    n_heads: int,
    length: int,
    n_keys: int,
    *,
    causal: bool,
    window: int = 0,
    softcap: float = 0.0,
    head_shards: int = 1,
    query_shards: int = 1,
    interpret: bool = False,
) -> Any:
    """The kernel for whole arrays of these sizes, to be cut into shards of heads and queries.

    A causal query sees the last `window` keys, 0: all; scores stay below `softcap`, 0: anywhere.
    With several shards of queries, causal ones come in zig-zag order; keys are always whole.
    `interpret` runs it slowly on any platform, for tests.
    """
    splash = _splash()
    mask: Any = splash.FullMask((length, n_keys))
    if causal:
        mask = splash.CausalMask((length, n_keys))
        if window:
            mask = splash.LocalMask((length, n_keys), (window - 1, 0), 0)
        if query_shards > 1:
            mask.q_sequence = places(length, query_shards).astype("int32")
    block_q, block_kv = _block(length // query_shards), _block(n_keys)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * n_heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        attn_logits_soft_cap=softcap or None,
        head_shards=head_shards,
        q_seq_shards=query_shards,
        interpret=interpret,
    )


def splash_attention(
    kernel: Any,
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BL: jax.Array | None,
    key_segments_BS: jax.Array | None,
) -> jax.Array:
    """Attention [B, L, H, K] of scaled queries, by a shard of the kernel from `make_kernel`."""
    segments = None
    if segments_BL is not None:
        keys_BS = segments_BL if key_segments_BS is None else key_segments_BS
        segments = _splash().SegmentIds(segments_BL, keys_BS)
    by_head = (jnp.swapaxes(x, 1, 2) for x in (q_BLHK, k_BSGK, v_BSGK))
    return jax.vmap(kernel)(*by_head, segments).swapaxes(1, 2)


def _splash() -> Any:
    # Half a second of every start, if not only those that need it paid for it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash


def _block(length: int) -> int:
    """The largest power of two times 128 that divides a length, up to the best size."""
    block = LARGEST_BLOCK
    while length % block:
        block //= 2
    return block
