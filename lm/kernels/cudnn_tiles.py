"""Ring-attention steps with NVIDIA's cuDNN kernel, as exposed by JAX.

The kernel supports causal masks and lengths of queries and keys; segment masks only as arrays.
But tokens of a segment are contiguous, so of keys before the queries, only the last ones are
visible, to the first queries. Moved to the front, they become a length. A causal square is split
into two squares of half the length and a rectangle of keys before queries; squares up to
`LONGEST_SQUARE` use an array mask.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import NEG_INF
from lm.kernels.ring_attention import (
    Grads,
    Partial,
    Segments,
    add_partial,
    halves,
    join_halves,
)

LONGEST_SQUARE = 512


@dataclass(frozen=True)
class CudnnTiles:
    """Tiles for `ring_attention`; with segments, keys precede the queries or align with them."""

    def forward(
        self, q_BHLK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, ids: Segments, causal: bool
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
        if ids is None:
            return _attend(q_BHLK, k_BGSK, v_BGSK, causal=causal)
        if not causal:
            seen_BHL, lengths, order_BS = _visible(*ids)
            k, v = (_take(x, order_BS) for x in (k_BGSK, v_BGSK))
            out_BHLK, log_z_BHL = _attend(q_BHLK, k, v, lengths=lengths)
            out_BHLK = jnp.where(seen_BHL[..., None], out_BHLK, 0)
            return out_BHLK, jnp.where(seen_BHL, log_z_BHL, NEG_INF)
        half, odd = divmod(q_BHLK.shape[2], 2)
        if odd or 2 * half <= LONGEST_SQUARE:
            return _attend(q_BHLK, k_BGSK, v_BGSK, mask_BLS=_square_mask(*ids))
        q, k, v, of_squares = halves((q_BHLK, k_BGSK, v_BGSK, ids))
        out_BHLK, log_z_BHL = join_halves(self.forward(q, k, v, of_squares, True))
        early, late = slice(0, half), slice(half, None)
        rectangle = self.forward(
            q_BHLK[:, :, late],
            k_BGSK[:, :, early],
            v_BGSK[:, :, early],
            (ids[0][:, late], ids[1][:, early]),
            False,
        )
        added = add_partial((out_BHLK[:, :, late], log_z_BHL[:, :, late]), rectangle)
        return (
            out_BHLK.at[:, :, late].set(added[0].astype(out_BHLK.dtype)),
            log_z_BHL.at[:, :, late].set(added[1]),
        )

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
        of_queries = log_z_BHL, delta_BHL, out_BHLK, g_BHLK
        if ids is None:
            return _gradients(q_BHLK, k_BGSK, v_BGSK, *of_queries, causal=causal)
        if not causal:
            seen_BHL, lengths, order_BS = _visible(*ids)
            k, v = (_take(x, order_BS) for x in (k_BGSK, v_BGSK))
            log_z_BHL = jnp.where(seen_BHL, log_z_BHL, -NEG_INF)
            g_BHLK = jnp.where(seen_BHL[..., None], g_BHLK, 0)
            rest = log_z_BHL, delta_BHL, out_BHLK, g_BHLK
            dq, dk, dv = _gradients(q_BHLK, k, v, *rest, lengths=lengths)
            back_BS = jnp.argsort(order_BS, axis=1)
            dq = jnp.where(seen_BHL[..., None], dq, 0)
            return dq, _take(dk, back_BS), _take(dv, back_BS)
        half, odd = divmod(q_BHLK.shape[2], 2)
        if odd or 2 * half <= LONGEST_SQUARE:
            return _gradients(q_BHLK, k_BGSK, v_BGSK, *of_queries, mask_BLS=_square_mask(*ids))
        arrays = *halves((q_BHLK, k_BGSK, v_BGSK, ids)), True, *halves(of_queries)
        squares = join_halves(self.backward(*arrays))
        dq, dk, dv = (x.astype(jnp.float32) for x in squares)
        early, late = slice(0, half), slice(half, None)
        added = self.backward(
            q_BHLK[:, :, late],
            k_BGSK[:, :, early],
            v_BGSK[:, :, early],
            (ids[0][:, late], ids[1][:, early]),
            False,
            *(x[:, :, late] for x in of_queries),
        )
        return (
            dq.at[:, :, late].add(added[0]),
            dk.at[:, :, early].add(added[1]),
            dv.at[:, :, early].add(added[2]),
        )


def _visible(
    ids_BL: jax.Array, ids_BS: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
    """Return which keys before them the queries see.

    Returns:
        Whether a query sees keys, [B, 1, L]; the numbers [B] of these queries, which come first,
        and of visible keys, at least 1; key order [B, S] that puts visible keys first.
    """
    S = ids_BS.shape[1]
    is_first_BL, is_seen_BS = ids_BL == ids_BL[:, :1], ids_BS == ids_BL[:, :1]
    n_queries_B, n_keys_B = is_first_BL.sum(1), is_seen_BS.sum(1)
    order_BS = (jnp.arange(S) - n_keys_B[:, None]) % S
    seen_BL = is_first_BL & (n_keys_B > 0)[:, None]
    return seen_BL[:, None], (n_queries_B, jnp.maximum(n_keys_B, 1)), order_BS


def _square_mask(ids_BL: jax.Array, ids_BS: jax.Array) -> jax.Array:
    return (ids_BL[:, :, None] == ids_BS[:, None]) & jnp.tri(ids_BL.shape[1], dtype=bool)


def _take(x_BGSK: jax.Array, order_BS: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BGSK, order_BS[:, None, :, None], axis=2)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, **mask: Any) -> Partial:
    fused, arrays, options = _call(q, **mask)
    return tuple(
        fused._dot_product_attention_fwd_p_wrapper.bind(
            q, k, v, *arrays, **options, is_training=True
        )
    )


def _gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_z: jax.Array,
    delta: jax.Array,
    out: jax.Array,
    g: jax.Array,
    **mask: Any,
) -> Grads:
    del delta  # computed by the kernel
    fused, arrays, options = _call(q, **mask)
    return tuple(
        fused._dot_product_attention_bwd_p_wrapper.bind(q, k, v, *arrays, log_z, out, g, **options)
    )


def _call(
    q: jax.Array,
    causal: bool = False,
    lengths: tuple[jax.Array, jax.Array] | None = None,
    mask_BLS: jax.Array | None = None,
) -> tuple[Any, tuple, dict[str, Any]]:
    """Return JAX's module, and the arrays and options of its calls."""
    # The public function has no backward pass that takes log Z.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    unused = jnp.zeros(0, q.dtype)
    bias, n_queries, n_keys = unused, unused, unused
    mask_type = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    if lengths is not None:
        mask_type = fused.MaskType.PADDING
        n_queries, n_keys = (n.astype(jnp.int32) for n in lengths)
    if mask_BLS is not None:
        bias = fused.combine_bias_and_mask(None, mask_BLS[:, None], q.dtype)
    options = {
        "scale": 1.0,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (mask_BLS is not None, False),
        "mask_type": mask_type,
        "layout": fused.AttentionLayout.BNTH.value,
        "sliding_window_length": None,
    }
    return fused, (bias, n_queries, n_keys, *[unused] * 4), options
