"""Splash attention: the Pallas kernel for TPUs that ships with JAX, on any mesh.

It skips tiles of scores that are masked throughout, so causal attention costs half.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.ring_attention import zigzag_order

LANES = 128  # lengths must be multiples of a TPU's lanes
LARGEST_BLOCK = 512


def make_splash_kernel(
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
    """Build the kernel for global arrays of these sizes, sharded over heads and queries.

    Args:
        n_heads: query heads H.
        length: queries L.
        n_keys: keys S, which every shard of queries has whole.
        causal: mask keys after the query. With several shards of queries, these come in zig-zag
            order.
        window: a causal query attends to the last `window` keys; 0 for all.
        softcap: bound of the scores; 0 for none.
        head_shards: devices that the heads are sharded over.
        query_shards: devices that the queries are sharded over.
        interpret: run on any platform, slowly, for tests.

    Returns:
        The kernel, a pytree for `splash_attention`.
    """
    splash = _splash()
    mask: Any = splash.FullMask((length, n_keys))
    if causal:
        mask = splash.CausalMask((length, n_keys))
        if window:
            mask = splash.LocalMask((length, n_keys), (window - 1, 0), 0)
        if query_shards > 1:
            mask.q_sequence = zigzag_order(length, query_shards).astype("int32")
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
    """Compute attention with a device's shard of the kernel from `make_splash_kernel`.

    Args:
        kernel: the shard of the kernel.
        q_BLHK: scaled queries.
        k_BSGK: keys.
        v_BSGK: values.
        segments_BL: segments that attention stays within, or None.
        key_segments_BS: segments of the keys; None for those of the queries.

    Returns:
        The output [B, L, H, K].
    """
    segments = None
    if segments_BL is not None:
        keys_BS = segments_BL if key_segments_BS is None else key_segments_BS
        segments = _splash().SegmentIds(segments_BL, keys_BS)
    by_head = (jnp.swapaxes(x, 1, 2) for x in (q_BLHK, k_BSGK, v_BSGK))
    return jax.vmap(kernel)(*by_head, segments).swapaxes(1, 2)


def _splash() -> Any:
    # Imported on use: the import takes half a second.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash


def _block(length: int) -> int:
    """Return the largest block, a power of two times 128, that divides a length."""
    block = LARGEST_BLOCK
    while length % block:
        block //= 2
    return block
