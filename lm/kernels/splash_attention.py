"""Splash attention: the Pallas kernel for TPUs that ships with JAX, on any mesh.

Fully masked tiles of scores are skipped, so causal attention costs half.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.ring_attention import (
    Grads,
    Partial,
    Segments,
    halves,
    join_halves,
    zigzag_order,
)

LANES = 128  # lengths must be multiples of the TPU lane count
LARGEST_BLOCK = 512
# The fused backward kernel writes a gradient of the queries for each of these key blocks, which
# fill a core's memory.
LARGEST_HELD = 256 * 1024  # elements
LONGEST_KEYS = 8192  # keys per call of that kernel, to limit the number of these gradients


def make_splash_kernel(
    n_heads: int,
    length: int,
    n_keys: int,
    *,
    causal: bool,
    window: int = 0,
    offset: int = 0,
    softcap: float = 0.0,
    head_shards: int = 1,
    query_shards: int = 1,
    interpret: bool = False,
) -> Any:
    """Build the kernel for global arrays of these sizes, sharded over heads and queries.

    Args:
        n_heads: query heads H.
        length: queries L.
        n_keys: keys S; every query shard has all of them.
        causal: mask keys after the query. With several query shards, queries are in zig-zag order.
        window: window of the queries, as of `AttentionMask`; 0: all.
        offset: position of the first query among the keys.
        softcap: soft cap of the scores; 0: none.
        head_shards: number of devices that the heads are sharded over.
        query_shards: number of devices that the queries are sharded over.
        interpret: run on any platform, slowly, for tests.

    Returns:
        Kernel, a pytree for `splash_attention`.
    """
    splash = _splash()
    shape = length, n_keys
    if window:
        sides = (window - 1, 0) if causal else (window // 2, window // 2)
        mask: Any = splash.LocalMask(shape, sides, offset)
    else:
        mask = splash.CausalMask(shape, offset) if causal else splash.FullMask(shape)
    if causal and query_shards > 1:
        mask.q_sequence = zigzag_order(length, query_shards).astype("int32")
    block_q, block_kv = largest_block(length // query_shards), largest_block(n_keys)
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
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Compute attention with a device's shard of the kernel from `make_splash_kernel`.

    Args:
        kernel: this device's shard of the kernel.
        q_BLHK: scaled queries.
        k_BSGK: keys.
        v_BSGK: values.
        segments_BL: segment ids that attention stays within, or None.
        key_segments_BS: segment ids of the keys; None if they equal those of the queries.
        sinks_H: attention-sink logits.

    Returns:
        Output [B, L, H, K].
    """
    segments = None
    if segments_BL is not None:
        keys_BS = segments_BL if key_segments_BS is None else key_segments_BS
        segments = _splash().SegmentIds(segments_BL, keys_BS)
    by_head = (jnp.swapaxes(x, 1, 2) for x in (q_BLHK, k_BSGK, v_BSGK))
    of_rows = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    return of_rows(*by_head, segments, sinks_H).swapaxes(1, 2)


@dataclass(frozen=True)
class SplashTiles:
    """Ring-attention steps with the splash kernel, with one kernel for all three gradients.

    Attributes:
        softcap: soft cap of the scores; 0: none.
        interpret: run on any platform, slowly, for tests.
    """

    softcap: float = 0.0
    interpret: bool = False

    def forward(
        self,
        q_BHLK: jax.Array,
        k_BGSK: jax.Array,
        v_BGSK: jax.Array,
        ids: Segments,
        causal: bool,
    ) -> Partial:
        """Compute attention of queries to keys.

        Args:
            q_BHLK: scaled queries.
            k_BGSK: keys.
            v_BGSK: values.
            ids: segment ids of queries and keys, which attention stays within.
            causal: mask keys after the query; otherwise all pairs are visible.

        Returns:
            Output, and log Z, which is very small for a query without keys.
        """
        kernel = self._kernel(q_BHLK, k_BGSK, causal)
        out_BHLK, (log_z_BHL,) = jax.vmap(kernel)(q_BHLK, k_BGSK, v_BGSK, self._segments(ids))
        return out_BHLK, log_z_BHL

    def backward(
        self,
        q_BHLK: jax.Array,
        k_BGSK: jax.Array,
        v_BGSK: jax.Array,
        ids: Segments,
        causal: bool,
        log_z_BHL: jax.Array,
        delta_BHL: jax.Array,
        out_BHLK: jax.Array,
        g_BHLK: jax.Array,
    ) -> Grads:
        """Return the gradients of queries, keys and values.

        Args:
            q_BHLK: scaled queries.
            k_BGSK: keys.
            v_BGSK: values.
            ids: segment ids of queries and keys, which attention stays within.
            causal: mask keys after the query; otherwise all pairs are visible.
            log_z_BHL: log-normalizer of each query over all keys.
            delta_BHL: Σ gradient · output of each query.
            out_BHLK: output over all keys.
            g_BHLK: gradient of the output.

        Returns:
            Contributions of these keys to the gradients.
        """
        own = q_BHLK, k_BGSK, v_BGSK
        of_queries = log_z_BHL, delta_BHL, out_BHLK, g_BHLK
        half, S = q_BHLK.shape[2] // 2, k_BGSK.shape[2]
        if S <= LONGEST_KEYS or S % (LONGEST_KEYS if not causal else 2 * LANES):
            return self._backward(*own, ids, causal, log_z_BHL, delta_BHL, g_BHLK)
        if not causal:
            return self._by_keys(*own, ids, *of_queries)
        # Two squares on the diagonal, and the square of late queries and early keys.
        q, k, v, of_squares, *rest = halves((*own, ids, *of_queries))
        squares = join_halves(self.backward(q, k, v, of_squares, True, *rest))
        dq, dk, dv = (x.astype(jnp.float32) for x in squares)
        late, early = slice(half, None), slice(0, half)
        added = self.backward(
            q_BHLK[:, :, late],
            k_BGSK[:, :, early],
            v_BGSK[:, :, early],
            None if ids is None else (ids[0][:, late], ids[1][:, early]),
            False,
            *(x[:, :, late] for x in of_queries),
        )
        return (
            dq.at[:, :, late].add(added[0]),
            dk.at[:, :, early].add(added[1]),
            dv.at[:, :, early].add(added[2]),
        )

    def _by_keys(
        self,
        q_BHLK: jax.Array,
        k_BGSK: jax.Array,
        v_BGSK: jax.Array,
        ids: Segments,
        *of_queries: jax.Array,
    ) -> Grads:
        """Return the gradients of `backward`, computed over chunks of keys."""

        def parts(x: jax.Array, axis: int) -> jax.Array:
            cut = x.reshape(*x.shape[:axis], -1, LONGEST_KEYS, *x.shape[axis + 1 :])
            return jnp.moveaxis(cut, axis, 0)

        def step(dq: jax.Array, keys: Any) -> tuple[jax.Array, Any]:
            k, v, key_ids = keys
            here = None if ids is None else (ids[0], key_ids)
            added, *of_keys = self.backward(q_BHLK, k, v, here, False, *of_queries)
            return dq + added, of_keys

        key_ids = None if ids is None else parts(ids[1], 1)
        keys = parts(k_BGSK, 2), parts(v_BGSK, 2), key_ids
        dq, of_keys = jax.lax.scan(step, jnp.zeros(q_BHLK.shape, jnp.float32), keys)
        dk, dv = (jnp.moveaxis(x, 0, 2).reshape(k_BGSK.shape) for x in of_keys)
        return dq, dk, dv

    def _backward(
        self,
        q_BHLK: jax.Array,
        k_BGSK: jax.Array,
        v_BGSK: jax.Array,
        ids: Segments,
        causal: bool,
        *of_queries: jax.Array,
    ) -> Grads:
        # The kernel's public function takes log Z only from its own forward pass.
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

        kernel = self._kernel(q_BHLK, k_BGSK, causal)
        given = kernel.kwargs
        sizes = given["block_sizes"]

        def of_row(q: Any, k: Any, v: Any, segments: Any, *of_queries: Any) -> Any:
            return splash_attention_kernel._splash_attention_bwd_dkv(
                q,
                k,
                v,
                segments,
                None,
                *of_queries,
                bq=sizes.block_q_dkv,
                bkv=sizes.block_kv_dkv,
                bkv_compute=sizes.block_kv_dkv_compute,
                mask_info=kernel.dkv_mask_info,
                use_fused_bwd_kernel=True,
                q_layout=sizes.q_layout,
                k_layout=sizes.k_layout,
                v_layout=sizes.v_layout,
                **{name: given[name] for name in OF_BACKWARD},
            )

        segments = self._segments(ids)
        log_z_BHL, delta_BHL, g_BHLK = of_queries
        return jax.vmap(of_row)(q_BHLK, k_BGSK, v_BGSK, segments, log_z_BHL, g_BHLK, delta_BHL)

    def _kernel(self, q_BHLK: jax.Array, k_BGSK: jax.Array, causal: bool) -> Any:
        splash, shape = _splash(), (q_BHLK.shape[2], k_BGSK.shape[2])
        mask: Any = splash.CausalMask(shape) if causal else splash.FullMask(shape)
        block_q, block_kv = map(largest_block, shape)
        held = largest_block(shape[1], LARGEST_HELD // max(k_BGSK.shape[3], LANES))
        return splash.make_splash_mha(
            splash.MultiHeadMask([mask] * q_BHLK.shape[1]),
            block_sizes=splash.BlockSizes(
                block_q=block_q,
                block_kv=block_kv,
                block_q_dkv=block_q,
                block_kv_dkv=held,
                block_kv_dkv_compute=block_kv,
                use_fused_bwd_kernel=True,
            ),
            save_residuals=True,
            attn_logits_soft_cap=self.softcap or None,
            head_shards=1,
            q_seq_shards=1,
            interpret=self.interpret,
        )

    def _segments(self, ids: Segments) -> Any:
        return None if ids is None else _splash().SegmentIds(*ids)


OF_BACKWARD = ("is_mqa", "mask_value", "attn_logits_soft_cap", "mask_function", "interpret")


def _splash() -> Any:
    # Lazy: the import takes half a second.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash


def largest_block(length: int, block: int = LARGEST_BLOCK) -> int:
    """Return the largest block, a power of two times 128, that divides a length."""
    while length % block:
        block //= 2
    return block
