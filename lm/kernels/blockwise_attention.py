"""Blockwise attention: tiles of scores, of which one exists at a time, combined by online softmax.

Memory grows with the length, not with its square, and causal attention never computes the tiles
above the diagonal (Dao et al. 2022). `PartialAttention` over some of the keys is unnormalized, so
that partial results over different keys can be added (Milakov and Gimelshein 2018, alg. 3); the
gradients of a tile need only the log-normalizer of the whole (Dao et al. 2022, alg. 4).
`ring_attention` uses the same functions across devices. Scores and sums are float32; queries come
scaled.

Shape letters: B batch, L queries, S keys (of a tile), H heads, G key/value heads, R query heads of
each, T queries of a tile, K head dim, N tiles, stacked on a first axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.dot_product_attention import NEG_INF, AttentionMask

LONGEST_TILE, SHORTEST_TILE = 512, 64

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def count_tiles(length: int) -> int:
    """Return the smallest number of equal tiles of at most `LONGEST_TILE`.

    0 if they would be shorter than `SHORTEST_TILE`.
    """
    fewest = -(-length // LONGEST_TILE)
    n = next(n for n in range(fewest, length + 1) if length % n == 0)
    return n if n == 1 or length // n >= SHORTEST_TILE else 0


def blockwise_attention(
    q_BLHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: AttentionMask, scale: float
) -> jax.Array:
    """Compute attention tile by tile.

    Args:
        q_BLHK: queries; `count_tiles(L)` and `count_tiles(S)` must not be 0.
        k_BSGK: keys.
        v_BSGK: values.
        mask: which keys each query attends to.
        scale: factor of the scores.

    Returns:
        The output [B, L, H, K].

    Raises:
        ValueError: the mask is not supported.
    """
    if mask.prefix_BS is not None or (mask.causal and q_BLHK.shape[1] != k_BSGK.shape[1]):
        raise ValueError('attention kernel "blockwise" supports neither prefixes nor a cache')
    if mask.window:
        raise ValueError('attention kernel "blockwise" does not support windows')
    q_BLHK = q_BLHK * jnp.asarray(scale, q_BLHK.dtype)
    own, other = mask.segments_BL, mask.key_segments_BS
    return _blockwise(q_BLHK, k_BSGK, v_BSGK, own, own if other is None else other, mask.causal)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BL: jax.Array | None,
    key_segments_BS: jax.Array | None,
    causal: bool,
) -> jax.Array:
    return _forward(q_BLHK, k_BSGK, v_BSGK, segments_BL, key_segments_BS, causal)[0]


def _forward(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BL: jax.Array | None,
    key_segments_BS: jax.Array | None,
    causal: bool,
) -> tuple[jax.Array, tuple]:
    n, m, G = count_tiles(q_BLHK.shape[1]), count_tiles(k_BSGK.shape[1]), k_BSGK.shape[2]
    queries = split_queries(q_BLHK, segments_BL, G, n)
    keys = split_keys(k_BSGK, v_BSGK, key_segments_BS, m)

    def step(partials: Any, pair: Any, diagonal: bool) -> Any:
        return attend_tile(partials, queries, keys, pair, diagonal)

    out, log_z = normalize(_scan_tile_pairs(step, empty_partial(queries), n, m, causal))
    return merge_tiles(out).astype(q_BLHK.dtype), (queries, keys, out, log_z)


def _backward(causal: bool, residuals: tuple, g_BLHK: jax.Array) -> tuple:
    queries, keys, out, log_z = residuals
    n, _, G = queries.q_BGRTK.shape[:3]
    of_queries = tile_residuals(split_queries(g_BLHK, None, G, n).q_BGRTK, out, log_z)

    def step(grads: Any, pair: Any, diagonal: bool) -> Any:
        return attend_tile_backward(grads, queries, of_queries, keys, pair, diagonal)

    zeros = zero_grads(queries, keys)
    dq, (dk, dv, _) = _scan_tile_pairs(step, zeros, n, len(keys.k_BGSK), causal)
    # `merge_tiles` expects the axis of query heads, which keys do not have.
    dk, dv = (merge_tiles(d[:, :, :, None]) for d in (dk, dv))
    return *(d.astype(g_BLHK.dtype) for d in (merge_tiles(dq), dk, dv)), None, None


_blockwise.defvjp(_forward, _backward)


def _scan_tile_pairs(step: Callable, start: Any, n: int, m: int, causal: bool) -> Any:
    """Scan `step` over the pairs of query and key tiles that are not masked throughout."""
    for diagonal, pairs in _tile_pairs(n, m, causal):

        def body(carry: Any, pair: Any, diagonal: bool = diagonal) -> tuple[Any, None]:
            return step(carry, pair, diagonal), None

        start, _ = jax.lax.scan(body, start, pairs)
    return start


def _tile_pairs(
    n: int, m: int, causal: bool
) -> Iterator[tuple[bool, tuple[np.ndarray, np.ndarray]]]:
    """Yield whether the causal mask cuts through the tiles, and their (query, key) indices."""
    if causal:
        yield True, (np.arange(n), np.arange(n))
        yield False, np.tril_indices(n, -1)
    else:
        rows, columns = np.indices((n, m))
        yield False, (rows.ravel(), columns.ravel())


class Queries(NamedTuple):
    """Query tiles, stacked or one at a time, and their segment ids."""

    q_BGRTK: jax.Array
    segments_BT: jax.Array | None


class Keys(NamedTuple):
    """Key and value tiles, stacked or one at a time, and their segment ids."""

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
    """Return the accumulator over no keys."""
    zeros = jnp.zeros(queries.q_BGRTK.shape, jnp.float32)
    return PartialAttention(zeros, jnp.full(zeros.shape[:-1], NEG_INF), zeros[..., 0])


def attend_tile(
    partials: PartialAttention,
    queries: Queries,
    keys: Keys,
    pair: tuple[Any, Any],
    diagonal: bool,
) -> PartialAttention:
    """Accumulate the attention of one query tile to one key tile.

    Args:
        partials: accumulators of all query tiles, stacked.
        queries: query tiles, stacked.
        keys: key tiles, stacked.
        pair: index of the query tile and of the key tile.
        diagonal: whether query i attends to keys 0 … i of the tile only.

    Returns:
        `partials` with that of the query tile updated.
    """
    a, b = pair
    here, tile = _at(queries, a), _at(keys, b)
    scores = _scores(here, tile, diagonal)
    largest = scores.max(-1)
    e_BGRTS = jnp.exp(scores - largest[..., None])
    values = _einsum("BGRTS,BGSK->BGRTK", e_BGRTS.astype(tile.v_BGSK.dtype), tile.v_BGSK)
    update = PartialAttention(values, largest, e_BGRTS.sum(-1))
    return _put(partials, a, _combine(_at(partials, a), update))


def normalize(partials: PartialAttention) -> tuple[jax.Array, jax.Array]:
    """Return the attention output [N, B, G, R, T, K] and log Z [N, B, G, R, T], both float32.

    A query that attends to no key has log Z = ∞, and so no gradient.
    """
    log_z = jnp.where(partials.max_BGRT > NEG_INF, partials.max_BGRT, jnp.inf)
    out = partials.values_BGRTK / partials.normalizer_BGRT[..., None]
    return out, log_z + jnp.log(partials.normalizer_BGRT)


def tile_residuals(g: jax.Array, out: jax.Array, log_z: jax.Array) -> QueryResiduals:
    """Return the residuals for `attend_tile_backward`; `g` is the gradient of `out`."""
    return QueryResiduals(g, jnp.sum(g * out, axis=-1, dtype=jnp.float32), log_z)


def attend_tile_backward(
    grads: tuple[jax.Array, Keys],
    queries: Queries,
    residuals: QueryResiduals,
    keys: Keys,
    pair: tuple[Any, Any],
    diagonal: bool,
) -> tuple[jax.Array, Keys]:
    """Accumulate the gradients of one pair of tiles.

    Args:
        grads: gradients of all queries and keys, stacked.
        queries: query tiles, stacked.
        residuals: residuals of all query tiles, stacked.
        keys: key tiles, stacked.
        pair: index of the query tile and of the key tile.
        diagonal: whether query i attends to keys 0 … i of the tile only.

    Returns:
        `grads` with those of the pair added.
    """
    a, b = pair
    here, tile, of = _at(queries, a), _at(keys, b), _at(residuals, a)
    dtype = here.q_BGRTK.dtype
    p_BGRTS = jnp.exp(_scores(here, tile, diagonal) - of.log_z_BGRT[..., None])
    dp_BGRTS = _einsum("BGRTK,BGSK->BGRTS", of.g_BGRTK, tile.v_BGSK)
    ds_BGRTS = (p_BGRTS * (dp_BGRTS - of.delta_BGRT[..., None])).astype(dtype)
    dq, (dk, dv, _) = grads
    dq = dq.at[a].add(_einsum("BGRTS,BGSK->BGRTK", ds_BGRTS, tile.k_BGSK))
    dk = dk.at[b].add(_einsum("BGRTS,BGRTK->BGSK", ds_BGRTS, here.q_BGRTK))
    dv = dv.at[b].add(_einsum("BGRTS,BGRTK->BGSK", p_BGRTS.astype(dtype), of.g_BGRTK))
    return dq, Keys(dk, dv, None)


def zero_grads(queries: Queries, keys: Keys) -> tuple[jax.Array, Keys]:
    """Return float32 zeros that `attend_tile_backward` accumulates into."""
    zeros = partial(jnp.zeros_like, dtype=jnp.float32)
    return zeros(queries.q_BGRTK), Keys(zeros(keys.k_BGSK), zeros(keys.v_BGSK), None)


def split_queries(q_BLHK: jax.Array, segments_BL: jax.Array | None, G: int, n: int) -> Queries:
    """Split queries into `n` equal tiles, [N, B, G, R, T, K]."""
    B, L, H, K = q_BLHK.shape
    q_BNTGRK = q_BLHK.reshape(B, n, L // n, G, H // G, K)
    return Queries(q_BNTGRK.transpose(1, 0, 3, 4, 2, 5), _split_segments(segments_BL, n))


def split_keys(k_BSGK: jax.Array, v_BSGK: jax.Array, segments_BS: jax.Array | None, n: int) -> Keys:
    """Split keys and values into `n` equal tiles, [N, B, G, S, K]."""

    def tiles(x_BSGK: jax.Array) -> jax.Array:
        B, S, G, K = x_BSGK.shape
        return x_BSGK.reshape(B, n, S // n, G, K).transpose(1, 0, 3, 2, 4)

    return Keys(tiles(k_BSGK), tiles(v_BSGK), _split_segments(segments_BS, n))


def merge_tiles(out_NBGRTK: jax.Array) -> jax.Array:
    """Concatenate the tiles of an output again: [B, L, H, K]."""
    N, B, G, R, T, K = out_NBGRTK.shape
    return out_NBGRTK.transpose(1, 0, 4, 2, 3, 5).reshape(B, N * T, G * R, K)


def _split_segments(segments_BL: jax.Array | None, n: int) -> jax.Array | None:
    if segments_BL is None:
        return None
    return segments_BL.reshape(len(segments_BL), n, -1).swapaxes(0, 1)


def _scores(queries: Queries, keys: Keys, diagonal: bool) -> jax.Array:
    """Return the scores of a pair of tiles, [B, G, R, T, S], `NEG_INF` where masked."""
    scores = _einsum("BGRTK,BGSK->BGRTS", queries.q_BGRTK, keys.k_BGSK)
    if diagonal:
        T, S = scores.shape[-2:]
        scores = jnp.where(jnp.tri(T, S, dtype=bool), scores, NEG_INF)
    if queries.segments_BT is not None and keys.segments_BS is not None:
        same_BTS = queries.segments_BT[:, :, None] == keys.segments_BS[:, None, :]
        scores = jnp.where(same_BTS[:, None, None], scores, NEG_INF)
    return scores


def _combine(one: PartialAttention, other: PartialAttention) -> PartialAttention:
    """Add two partial results, rescaled to the larger of their maxima."""
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
