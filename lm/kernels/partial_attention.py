"""Attention over some of the keys, and the sum of such parts: what long sequences are made of.

A part keeps its softmax undivided, so that parts over different keys add up (Milakov and
Gimelshein 2018, alg. 3); the gradients of a part need only the whole sum's logarithm (Dao et al.
2022, alg. 4). Scores and sums are float32; queries come scaled.

Shape letters: B batch, G key/value heads, R query heads of each, T queries, S keys, K head dim,
N tiles, stacked on a first axis.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.kernels.tiled_attention import MASKED

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


class Queries(NamedTuple):
    q_BGRTK: jax.Array
    segments_BT: jax.Array | None


class Keys(NamedTuple):
    k_BGSK: jax.Array
    v_BGSK: jax.Array
    segments_BS: jax.Array | None


class Part(NamedTuple):
    """Over the keys seen so far: Σ exp(score - largest) v, the largest score, Σ exp(…)."""

    sum_BGRTK: jax.Array
    largest_BGRT: jax.Array
    total_BGRT: jax.Array


class Saved(NamedTuple):
    """What the backward pass of a query needs: its gradient, its product with the output, log Z."""

    g_BGRTK: jax.Array
    inner_BGRT: jax.Array
    log_z_BGRT: jax.Array


def nothing(queries: Queries) -> Part:
    """The part over no keys."""
    zeros = jnp.zeros(queries.q_BGRTK.shape, jnp.float32)
    return Part(zeros, jnp.full(zeros.shape[:-1], MASKED), zeros[..., 0])


def visit(parts: Part, queries: Queries, keys: Keys, pair: tuple[Any, Any], diagonal: bool) -> Part:
    """The stacked parts after the queries of tile a have seen the keys of tile b, (a, b) a pair.

    On the `diagonal` query i sees keys 0 … i; segments keep to themselves everywhere.
    """
    a, b = pair
    here, tile = _at(queries, a), _at(keys, b)
    scores = _scores(here, tile, diagonal)
    largest = scores.max(-1)
    e_BGRTS = jnp.exp(scores - largest[..., None])
    values = _einsum("BGRTS,BGSK->BGRTK", e_BGRTS.astype(tile.v_BGSK.dtype), tile.v_BGSK)
    return _put(parts, a, _sum(_at(parts, a), Part(values, largest, e_BGRTS.sum(-1))))


def finish(parts: Part) -> tuple[jax.Array, jax.Array]:
    """The attention output, float32, and log Z, of parts that have seen all their keys.

    A query that sees none has log Z = ∞, so no gradients.
    """
    log_z = jnp.where(parts.largest_BGRT > MASKED, parts.largest_BGRT, jnp.inf)
    out = parts.sum_BGRTK / parts.total_BGRT[..., None]
    return out, log_z + jnp.log(parts.total_BGRT)


def saved(g: jax.Array, out: jax.Array, log_z: jax.Array) -> Saved:
    """For `visit_backwards`: `g` is the gradient of `out`."""
    return Saved(g, jnp.sum(g * out, axis=-1, dtype=jnp.float32), log_z)


def visit_backwards(
    grads: tuple[jax.Array, Keys],
    queries: Queries,
    saved: Saved,
    keys: Keys,
    pair: tuple[Any, Any],
    diagonal: bool,
) -> tuple[jax.Array, Keys]:
    """The stacked gradients of queries and keys with those of a pair of tiles added."""
    a, b = pair
    here, tile, of = _at(queries, a), _at(keys, b), _at(saved, a)
    dtype = here.q_BGRTK.dtype
    p_BGRTS = jnp.exp(_scores(here, tile, diagonal) - of.log_z_BGRT[..., None])
    dp_BGRTS = _einsum("BGRTK,BGSK->BGRTS", of.g_BGRTK, tile.v_BGSK)
    ds_BGRTS = (p_BGRTS * (dp_BGRTS - of.inner_BGRT[..., None])).astype(dtype)
    dq, (dk, dv, _) = grads
    dq = dq.at[a].add(_einsum("BGRTS,BGSK->BGRTK", ds_BGRTS, tile.k_BGSK))
    dk = dk.at[b].add(_einsum("BGRTS,BGRTK->BGSK", ds_BGRTS, here.q_BGRTK))
    dv = dv.at[b].add(_einsum("BGRTS,BGRTK->BGSK", p_BGRTS.astype(dtype), of.g_BGRTK))
    return dq, Keys(dk, dv, None)


def zero_gradients(queries: Queries, keys: Keys) -> tuple[jax.Array, Keys]:
    """What `visit_backwards` adds to, float32."""
    zeros = partial(jnp.zeros_like, dtype=jnp.float32)
    return zeros(queries.q_BGRTK), Keys(zeros(keys.k_BGSK), zeros(keys.v_BGSK), None)


def query_tiles(q_BLHK: jax.Array, segments_BL: jax.Array | None, G: int, n: int) -> Queries:
    """Queries cut into `n` equal tiles, [N, B, G, R, T, K]."""
    B, L, H, K = q_BLHK.shape
    q_BNTGRK = q_BLHK.reshape(B, n, L // n, G, H // G, K)
    return Queries(q_BNTGRK.transpose(1, 0, 3, 4, 2, 5), _segment_tiles(segments_BL, n))


def key_tiles(k_BSGK: jax.Array, v_BSGK: jax.Array, segments_BS: jax.Array | None, n: int) -> Keys:
    """Keys and values cut into `n` equal tiles, [N, B, G, S, K]."""

    def tiles(x_BSGK: jax.Array) -> jax.Array:
        B, S, G, K = x_BSGK.shape
        return x_BSGK.reshape(B, n, S // n, G, K).transpose(1, 0, 3, 2, 4)

    return Keys(tiles(k_BSGK), tiles(v_BSGK), _segment_tiles(segments_BS, n))


def joined(out_NBGRTK: jax.Array) -> jax.Array:
    """The tiles of an output side by side again, [B, L, H, K]."""
    N, B, G, R, T, K = out_NBGRTK.shape
    return out_NBGRTK.transpose(1, 0, 4, 2, 3, 5).reshape(B, N * T, G * R, K)


def _segment_tiles(segments_BL: jax.Array | None, n: int) -> jax.Array | None:
    if segments_BL is None:
        return None
    return segments_BL.reshape(len(segments_BL), n, -1).swapaxes(0, 1)


def _scores(queries: Queries, keys: Keys, diagonal: bool) -> jax.Array:
    """[B, G, R, T, S], with `MASKED` for what is not seen."""
    scores = _einsum("BGRTK,BGSK->BGRTS", queries.q_BGRTK, keys.k_BGSK)
    if diagonal:
        T, S = scores.shape[-2:]
        scores = jnp.where(jnp.tri(T, S, dtype=bool), scores, MASKED)
    if queries.segments_BT is not None and keys.segments_BS is not None:
        same_BTS = queries.segments_BT[:, :, None] == keys.segments_BS[:, None, :]
        scores = jnp.where(same_BTS[:, None, None], scores, MASKED)
    return scores


def _sum(one: Part, other: Part) -> Part:
    largest = jnp.maximum(one.largest_BGRT, other.largest_BGRT)
    of_one, of_other = (jnp.exp(part.largest_BGRT - largest) for part in (one, other))
    return Part(
        one.sum_BGRTK * of_one[..., None] + other.sum_BGRTK * of_other[..., None],
        largest,
        one.total_BGRT * of_one + other.total_BGRT * of_other,
    )


def _at(tree: Any, tile: Any) -> Any:
    return jax.tree.map(lambda x: x[tile], tree)


def _put(tree: Any, tile: Any, values: Any) -> Any:
    return jax.tree.map(lambda x, value: x.at[tile].set(value), tree, values)
