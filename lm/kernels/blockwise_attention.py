"""Blockwise attention: one tile of scores at a time, combined by online softmax.

Memory is linear in the length, and causal attention never computes tiles above the diagonal (Dao et
al. 2022). `PartialAttention` over a subset of keys is unnormalized, so that results over different
keys can be added (Milakov and Gimelshein 2018, alg. 3); the gradients of a tile only need the
log-normalizer over all keys (Dao et al. 2022, alg. 4). `ring_attention` uses the same functions
across devices. Scores and sums are float32; queries are already scaled.

Shape letters: B batch, L queries, S keys (of a tile), H heads, G key/value heads, R query heads per
key/value head, T queries of a tile, K head dim, N tiles, stacked on the first axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.dot_product_attention import NEG_INF, AttentionMask, beside_sinks
from lm.kernels.elementwise import softcap as apply_softcap

LONGEST_TILE, SHORTEST_TILE = 512, 64

Segments = tuple[jax.Array, jax.Array] | None  # of queries [B, L] and keys [B, S]
Partial = tuple[jax.Array, jax.Array]  # output, and log Z [B, H, L]

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def count_tiles(length: int) -> int:
    """Return the smallest number of equal tiles of at most `LONGEST_TILE`.

    0 if they would be shorter than `SHORTEST_TILE`.
    """
    fewest = -(-length // LONGEST_TILE)
    n = next(n for n in range(fewest, length + 1) if length % n == 0)
    return n if n == 1 or length // n >= SHORTEST_TILE else 0


def blockwise_attention(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    scale: float,
    softcap: float = 0.0,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Compute attention tile by tile.

    Args:
        q_BLHK: queries; `count_tiles(L)` and `count_tiles(S)` must not be 0.
        k_BSGK: keys.
        v_BSGK: values.
        mask: which keys each query attends to; its offset is a constant.
        scale: factor of the scores.
        softcap: soft cap of the scores; 0: none.
        sinks_H: attention-sink logits.

    Returns:
        Output [B, L, H, K].

    Raises:
        ValueError: the mask is not supported.
    """
    if mask.prefix_BS is not None or (mask.causal and not _is_aligned(q_BLHK, k_BSGK, mask)):
        raise ValueError('attention kernel "blockwise" supports neither prefixes nor a cache')
    q_BLHK = q_BLHK * jnp.asarray(scale, q_BLHK.dtype)
    own, other = mask.segments_BL, mask.key_segments_BS
    ids = None if own is None else (own, own if other is None else other)
    tiles = BlockwiseTiles(softcap, mask.window)
    out_BLHK, log_z_BHL = _blockwise(q_BLHK, k_BSGK, v_BSGK, ids, mask.causal, tiles)
    if sinks_H is not None:
        beside_BLH = beside_sinks(log_z_BHL.swapaxes(1, 2), sinks_H)
        out_BLHK *= beside_BLH[..., None].astype(out_BLHK.dtype)
    return out_BLHK


def _is_aligned(q_BLHK: jax.Array, k_BSGK: jax.Array, mask: AttentionMask) -> bool:
    """Return whether the last query aligns with the last key."""
    return isinstance(mask.offset, int) and mask.offset + q_BLHK.shape[1] == k_BSGK.shape[1]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blockwise(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    ids: Segments,
    causal: bool,
    tiles: BlockwiseTiles,
) -> Partial:
    return _forward(q_BLHK, k_BSGK, v_BSGK, ids, causal, tiles)[0]


def _forward(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    ids: Segments,
    causal: bool,
    tiles: BlockwiseTiles,
) -> tuple[Partial, tuple]:
    q, k, v = (x.swapaxes(1, 2) for x in (q_BLHK, k_BSGK, v_BSGK))
    out, log_z = tiles.forward(q, k, v, ids, causal)
    # A query without keys has no gradient.
    log_z = jnp.where(log_z > NEG_INF / 2, log_z, jnp.inf)
    return (out.swapaxes(1, 2).astype(q_BLHK.dtype), log_z), (q, k, v, ids, out, log_z)


def _backward(causal: bool, tiles: BlockwiseTiles, residuals: tuple, gradients: Partial) -> tuple:
    q, k, v, ids, out, log_z = residuals
    g_BLHK, of_log_z = gradients
    g = g_BLHK.swapaxes(1, 2)
    delta = jnp.sum(g * out, axis=-1, dtype=jnp.float32) - of_log_z
    grads = tiles.backward(q, k, v, ids, causal, log_z, delta, out, g)
    return *(d.swapaxes(1, 2).astype(g_BLHK.dtype) for d in grads), None


_blockwise.defvjp(_forward, _backward)


@dataclass(frozen=True)
class BlockwiseTiles:
    """Blockwise attention tiles; also the steps of `ring_attention`.

    Arrays are [B, H, L, K]; queries are already scaled. Results are float32.

    Attributes:
        softcap: soft cap of the scores; 0: none.
        window: a causal query attends to the last `window` keys; 0: all.
    """

    softcap: float = 0.0
    window: int = 0

    def forward(
        self, q_BHLK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, ids: Segments, causal: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Compute attention of queries to keys.

        Args:
            q_BHLK: scaled queries.
            k_BGSK: keys.
            v_BGSK: values.
            ids: segment ids of queries and keys, which attention stays within.
            causal: mask keys after the query, where the last query aligns with the last key.

        Returns:
            Output, and log Z, which is very small for a query without keys.
        """
        queries, keys = _split(q_BHLK, k_BGSK, v_BGSK, ids)

        def step(partials: Any, pair: Any, band: Band | None) -> Any:
            return attend_tile(partials, queries, keys, pair, band, self.softcap)

        out, log_z = normalize(self._scan(step, empty_partial(queries), queries, keys, causal))
        return _join(out), _join(log_z)

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
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
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
        queries, keys = _split(q_BHLK, k_BGSK, v_BGSK, ids)
        n, G = len(queries.q_BGRTK), k_BGSK.shape[1]
        of_queries = (split_queries(x, G, n) for x in (g_BHLK, delta_BHL, log_z_BHL))
        residuals = QueryResiduals(*of_queries)

        def step(grads: Any, pair: Any, band: Band | None) -> Any:
            return attend_tile_backward(grads, queries, residuals, keys, pair, band, self.softcap)

        dq, (dk, dv, _) = self._scan(step, zero_grads(queries, keys), queries, keys, causal)
        # `_join` expects the query-head axis, which keys do not have.
        return _join(dq), _join(dk[:, :, :, None]), _join(dv[:, :, :, None])

    def _scan(self, step: Callable, start: Any, queries: Queries, keys: Keys, causal: bool) -> Any:
        """Scan `step` over all pairs of query and key tiles that are not fully masked."""
        sizes = queries.q_BGRTK.shape[-2], keys.k_BGSK.shape[-2]
        n, m = len(queries.q_BGRTK), len(keys.k_BGSK)
        band = Band(m * sizes[1] - n * sizes[0], self.window) if causal else None
        for is_cut, pairs in _tile_pairs(n, m, sizes, band):

            def body(carry: Any, pair: Any, band: Any = band if is_cut else None) -> Any:
                return step(carry, pair, band), None

            start, _ = jax.lax.scan(body, start, pairs)
        return start


class Band(NamedTuple):
    """Causal mask, optionally with a window.

    Attributes:
        offset: position of the first query among the keys.
        window: number of keys that a query attends to; 0: all before it.
    """

    offset: int
    window: int

    def visible(self, queries: Any, keys: Any) -> Any:
        """Return whether queries attend to keys, given the indices of both."""
        before = queries + self.offset - keys
        return (before >= 0) & (before < self.window) if self.window else before >= 0


def _tile_pairs(
    n: int, m: int, sizes: tuple[int, int], band: Band | None
) -> Iterator[tuple[bool, tuple[np.ndarray, ...]]]:
    """Yield (query, key) tile indices, and whether the mask is partial in these tiles."""
    if band is None:
        rows, columns = np.indices((n, m))
        yield False, (rows.ravel(), columns.ravel())
        return
    # A tile is inside a band if all its corners are, and outside if its nearest corner is.
    T, S = sizes
    first, last = np.arange(n)[:, None] * T, np.arange(m) * S
    corners = [
        band.visible(first + row, last + column) for row in (0, T - 1) for column in (0, S - 1)
    ]
    whole = np.logical_and.reduce(corners)
    newest, oldest = first + T - 1 + band.offset - last, first + band.offset - last - S + 1
    seen = (newest >= 0) & ((oldest < band.window) if band.window else True)
    yield True, np.nonzero(seen & ~whole)
    if whole.any():
        yield False, np.nonzero(whole)


class Queries(NamedTuple):
    """Query tiles (stacked or single) with segment ids."""

    q_BGRTK: jax.Array
    segments_BT: jax.Array | None


class Keys(NamedTuple):
    """Key and value tiles (stacked or single) with segment ids."""

    k_BGSK: jax.Array
    v_BGSK: jax.Array
    segments_BS: jax.Array | None


class PartialAttention(NamedTuple):
    """Online-softmax accumulator over the keys so far: Σ exp(s - max) v, max s, Σ exp(s - max)."""

    values_BGRTK: jax.Array
    max_BGRT: jax.Array
    normalizer_BGRT: jax.Array


class QueryResiduals(NamedTuple):
    """Inputs of a query tile's backward pass: output gradient, Σ gradient · output, and log Z."""

    g_BGRTK: jax.Array
    delta_BGRT: jax.Array
    log_z_BGRT: jax.Array


def empty_partial(queries: Queries) -> PartialAttention:
    """Return an accumulator over no keys."""
    zeros = jnp.zeros(queries.q_BGRTK.shape, jnp.float32)
    return PartialAttention(zeros, jnp.full(zeros.shape[:-1], NEG_INF), zeros[..., 0])


def attend_tile(
    partials: PartialAttention,
    queries: Queries,
    keys: Keys,
    pair: tuple[Any, Any],
    band: Band | None,
    softcap: float,
) -> PartialAttention:
    """Accumulate attention of one query tile to one key tile.

    Args:
        partials: accumulators of all query tiles, stacked.
        queries: query tiles, stacked.
        keys: key tiles, stacked.
        pair: indices of the query tile and the key tile.
        band: mask of the pair if it is partial, else None.
        softcap: soft cap of the scores; 0: none.

    Returns:
        `partials` with the query tile updated.
    """
    a, b = pair
    here, tile = _at(queries, a), _at(keys, b)
    scores, _ = _scores(here, tile, pair, band, softcap)
    largest = scores.max(-1)
    e_BGRTS = jnp.exp(scores - largest[..., None])
    values = _einsum("BGRTS,BGSK->BGRTK", e_BGRTS.astype(tile.v_BGSK.dtype), tile.v_BGSK)
    update = PartialAttention(values, largest, e_BGRTS.sum(-1))
    return _put(partials, a, _combine(_at(partials, a), update))


def normalize(partials: PartialAttention) -> tuple[jax.Array, jax.Array]:
    """Return the attention output [N, B, G, R, T, K] and log Z [N, B, G, R, T], both float32."""
    # With a window, a query may see no key of these tiles.
    normalizer = jnp.maximum(partials.normalizer_BGRT, jnp.finfo(jnp.float32).tiny)
    out = partials.values_BGRTK / normalizer[..., None]
    return out, partials.max_BGRT + jnp.log(normalizer)


def attend_tile_backward(
    grads: tuple[jax.Array, Keys],
    queries: Queries,
    residuals: QueryResiduals,
    keys: Keys,
    pair: tuple[Any, Any],
    band: Band | None,
    softcap: float,
) -> tuple[jax.Array, Keys]:
    """Accumulate the gradients of one pair of tiles.

    Args:
        grads: gradients of all queries and keys, stacked.
        queries: query tiles, stacked.
        residuals: residuals of all query tiles, stacked.
        keys: key tiles, stacked.
        pair: indices of the query tile and the key tile.
        band: mask of the pair if it is partial, else None.
        softcap: soft cap of the scores; 0: none.

    Returns:
        `grads` with the gradients of the pair added.
    """
    a, b = pair
    here, tile, of = _at(queries, a), _at(keys, b), _at(residuals, a)
    dtype = here.q_BGRTK.dtype
    scores, slope = _scores(here, tile, pair, band, softcap)
    p_BGRTS = jnp.exp(scores - of.log_z_BGRT[..., None])
    dp_BGRTS = _einsum("BGRTK,BGSK->BGRTS", of.g_BGRTK, tile.v_BGSK)
    ds_BGRTS = p_BGRTS * (dp_BGRTS - of.delta_BGRT[..., None])
    ds_BGRTS = (ds_BGRTS if slope is None else ds_BGRTS * slope).astype(dtype)
    dq, (dk, dv, _) = grads
    dq = dq.at[a].add(_einsum("BGRTS,BGSK->BGRTK", ds_BGRTS, tile.k_BGSK))
    dk = dk.at[b].add(_einsum("BGRTS,BGRTK->BGSK", ds_BGRTS, here.q_BGRTK))
    dv = dv.at[b].add(_einsum("BGRTS,BGRTK->BGSK", p_BGRTS.astype(dtype), of.g_BGRTK))
    return dq, Keys(dk, dv, None)


def zero_grads(queries: Queries, keys: Keys) -> tuple[jax.Array, Keys]:
    """Return float32 zeros to accumulate gradients into."""
    zeros = partial(jnp.zeros_like, dtype=jnp.float32)
    return zeros(queries.q_BGRTK), Keys(zeros(keys.k_BGSK), zeros(keys.v_BGSK), None)


def _split(
    q_BHLK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, ids: Segments
) -> tuple[Queries, Keys]:
    """Split queries, keys and values into equal tiles."""
    n, m = (count_tiles(x.shape[2]) or 1 for x in (q_BHLK, k_BGSK))
    own, others = (None, None) if ids is None else ids
    k, v = (split_queries(x, x.shape[1], m)[:, :, :, 0] for x in (k_BGSK, v_BGSK))
    queries = Queries(split_queries(q_BHLK, k_BGSK.shape[1], n), _split_segments(own, n))
    return queries, Keys(k, v, _split_segments(others, m))


def split_queries(x_BHL: jax.Array, G: int, n: int) -> jax.Array:
    """Split [B, H, L, …] into `n` equal tiles, [N, B, G, R, T, …]."""
    B, H, L = x_BHL.shape[:3]
    return jnp.moveaxis(x_BHL.reshape(B, G, H // G, n, L // n, *x_BHL.shape[3:]), 3, 0)


def _join(x_NBGRT: jax.Array) -> jax.Array:
    """Concatenate tiles [N, B, G, R, T, …] to [B, H, L, …]."""
    N, B, G, R, T = x_NBGRT.shape[:5]
    return jnp.moveaxis(x_NBGRT, 0, 3).reshape(B, G * R, N * T, *x_NBGRT.shape[5:])


def _split_segments(segments_BL: jax.Array | None, n: int) -> jax.Array | None:
    if segments_BL is None:
        return None
    return segments_BL.reshape(len(segments_BL), n, -1).swapaxes(0, 1)


def _scores(
    queries: Queries, keys: Keys, pair: tuple[Any, Any], band: Band | None, softcap: float
) -> tuple[jax.Array, jax.Array | None]:
    """Return scores of a pair of tiles, [B, G, R, T, S], and the derivative of the soft cap.

    Masked scores are `NEG_INF`.
    """
    scores, slope = _einsum("BGRTK,BGSK->BGRTS", queries.q_BGRTK, keys.k_BGSK), None
    if softcap:
        scores = apply_softcap(scores, softcap)
        slope = 1 - jnp.square(scores / softcap)
    if band is not None:
        T, S = scores.shape[-2:]
        rows, columns = pair[0] * T + jnp.arange(T), pair[1] * S + jnp.arange(S)
        scores = jnp.where(band.visible(rows[:, None], columns), scores, NEG_INF)
    if queries.segments_BT is not None and keys.segments_BS is not None:
        same_BTS = queries.segments_BT[:, :, None] == keys.segments_BS[:, None, :]
        scores = jnp.where(same_BTS[:, None, None], scores, NEG_INF)
    return scores, slope


def _combine(one: PartialAttention, other: PartialAttention) -> PartialAttention:
    """Add two partial results, rescaled to the larger maximum."""
    largest = jnp.maximum(one.max_BGRT, other.max_BGRT)
    scale, other_scale = (jnp.exp(p.max_BGRT - largest) for p in (one, other))
    return PartialAttention(
        one.values_BGRTK * scale[..., None] + other.values_BGRTK * other_scale[..., None],
        largest,
        one.normalizer_BGRT * scale + other.normalizer_BGRT * other_scale,
    )


def _at(tree: Any, tile: Any) -> Any:
    return jax.tree.map(lambda x: x[tile], tree)


def _put(tree: Any, tile: Any, values: Any) -> Any:
    return jax.tree.map(lambda x, value: x.at[tile].set(value), tree, values)
