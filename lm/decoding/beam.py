"""Beam search with length penalty and n-best: the whole search is one compiled loop.

A step extends every running hypothesis by every token and keeps the K best results of all. Those
that end among them are finished; the others run on (Sutskever 2014, section 3.2, except that
places of finished ones are used again). So a beam of 1 is greedy decoding.

Shape letters: B inputs, K beam, T most new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lm.decoding.controls import NEG_INF, UNSET, Controls

Cache = Any  # of the model: its `take(rows)` gives the cache of those rows
# (tokens [R, 1], positions [R, 1], cache) → (logits [R, 1, V], cache)
Decode = Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]


@dataclass(frozen=True)
class Search:
    """How to search: hypotheses of at most `max_length` tokens, the end counted, are compared by
    log-probability / ((5 + length) / 6)^length_penalty (Wu et al. 2016, eq. 14)."""

    beam_size: int
    max_length: int
    length_penalty: float = 0.0
    controls: Controls = field(default_factory=Controls)

    def norm(self, length: jax.Array | int) -> jax.Array:
        """What log-probabilities of hypotheses of a length are divided by."""
        return ((5.0 + jnp.asarray(length)) / 6.0) ** self.length_penalty


@flax.struct.dataclass
class _Hypotheses:
    """K an input, best first; scores are -inf where there is none."""

    tokens_BKT: jax.Array
    scores_BK: jax.Array
    lengths_BK: jax.Array


@flax.struct.dataclass
class _State:
    """After `step` tokens: running hypotheses scored by log-probability, finished ones normed.

    `rows` are the running hypotheses' parents among the rows of the cache.
    """

    step: jax.Array
    running: _Hypotheses
    finished: _Hypotheses
    rows: jax.Array


def beam_search(
    decode: Decode,
    cache: Cache,
    logits_BV: jax.Array,
    positions_B: jax.Array,
    limits_B: jax.Array,
    search: Search,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The K best hypotheses of each input: tokens [B, K, T], scores [B, K], lengths [B, K].

    The cache has a row an input and has read it; `logits_BV` are of each first token, which will
    stand at `positions_B`. A hypothesis ends with the end token, which it keeps, or unended at
    `limits_B` or `max_length` tokens, whichever is less: its score is that of having come so far.
    Where there are fewer than K, scores are -inf and lengths 0.
    """
    B, K = len(logits_BV), search.beam_size
    limits_B = jnp.minimum(limits_B, search.max_length)
    cache = cache.take(jnp.repeat(jnp.arange(B), K))
    empty = _Hypotheses(
        jnp.full((B, K, search.max_length), UNSET, jnp.int32),
        jnp.full((B, K), NEG_INF, jnp.float32),
        jnp.zeros((B, K), jnp.int32),
    )
    one = empty.replace(scores_BK=empty.scores_BK.at[:, 0].set(0))  # type: ignore[attr-defined]
    start = _State(jnp.zeros((), jnp.int32), one, empty, jnp.arange(B * K))
    state = _advance(start, jnp.repeat(logits_BV, K, axis=0), limits_B, search)

    def goes_on(carry: tuple[_State, Cache]) -> jax.Array:
        state, _ = carry
        # Log-probabilities only fall, and no norm is larger than that of the longest.
        bound_B = state.running.scores_BK.max(-1) / search.norm(limits_B)
        return (bound_B > state.finished.scores_BK.min(-1)).any()

    def body(carry: tuple[_State, Cache]) -> tuple[_State, Cache]:
        state, cache = carry
        last_R1 = jnp.take(state.running.tokens_BKT, state.step - 1, axis=2).reshape(-1, 1)
        # Where all hypotheses have ended the next position may be none the model knows.
        at_B = positions_B + jnp.minimum(state.step, limits_B) - 1
        at_R1 = jnp.repeat(at_B, K)[:, None]
        logits_R1V, cache = decode(jnp.maximum(last_R1, 0), at_R1, _reorder(cache, state.rows))
        return _advance(state, logits_R1V[:, 0], limits_B, search), cache

    state, _ = jax.lax.while_loop(goes_on, body, (state, cache))
    found = state.finished
    return found.tokens_BKT, found.scores_BK, found.lengths_BK


def _advance(state: _State, logits_RV: jax.Array, limits_B: jax.Array, search: Search) -> _State:
    """Every running hypothesis one token longer, or finished, or dropped."""
    (B, K), V = state.running.scores_BK.shape, logits_RV.shape[-1]
    controls, written_RT = search.controls, state.running.tokens_BKT.reshape(B * K, -1)
    logits_RV = controls.adjusted(logits_RV.astype(jnp.float32), written_RT)
    scores_RV = controls.allowed(jax.nn.log_softmax(logits_RV), written_RT, state.step)
    scores_BKV = state.running.scores_BK[:, :, None] + scores_RV.reshape(B, K, V)
    scores_BK, chosen_BK = jax.lax.top_k(scores_BKV.reshape(B, K * V), K)
    parents_BK, tokens_BK = chosen_BK // V, chosen_BK % V

    length = state.step + 1
    tokens_BKT = jnp.take_along_axis(state.running.tokens_BKT, parents_BK[:, :, None], axis=1)
    tokens_BKT = jax.lax.dynamic_update_slice(tokens_BKT, tokens_BK[:, :, None], (0, 0, state.step))
    ends_BK = jnp.broadcast_to((length >= limits_B)[:, None], (B, K))
    if controls.end_id is not None:
        ends_BK |= tokens_BK == controls.end_id
    running = _Hypotheses(
        tokens_BKT, jnp.where(ends_BK, NEG_INF, scores_BK), jnp.full((B, K), length)
    )
    ended_BK = jnp.where(ends_BK, scores_BK / search.norm(length), NEG_INF)
    ended = running.replace(scores_BK=ended_BK)  # type: ignore[attr-defined]
    rows = (jnp.arange(B)[:, None] * K + parents_BK).reshape(-1)
    return _State(length, running, _best(state.finished, ended), rows)


def _best(old: _Hypotheses, new: _Hypotheses) -> _Hypotheses:
    """The K best of both, sorted; of equals the old."""
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), old, new)
    scores_BK, best_BK = jax.lax.top_k(both.scores_BK, old.scores_BK.shape[1])
    lengths_BK = jnp.take_along_axis(both.lengths_BK, best_BK, axis=1)
    return _Hypotheses(
        jnp.take_along_axis(both.tokens_BKT, best_BK[:, :, None], axis=1),
        scores_BK,
        jnp.where(scores_BK == NEG_INF, 0, lengths_BK),
    )


def _reorder(cache: Cache, rows: jax.Array) -> Cache:
    """The cache of each row's parent; a source is the same for all hypotheses of an input."""
    taken = cache.take(rows)
    source = getattr(cache, "source", None)
    return taken if source is None else taken.replace(source=source)
