"""Beam search with length penalty and n-best, as one compiled loop.

A step extends every running hypothesis by every token and keeps the K best. Those that end are
finished, the others continue (Sutskever et al. 2014, section 3.2, except that a finished hypothesis
frees its place in the beam). So a beam of 1 is greedy decoding.

Shape letters: B inputs, K beam, R = B·K rows, T maximum new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm.data.tokenizer import Tokenizer
from lm.decoding.controls import UNSET, Controls


class DecodingCache(Protocol):
    """Cache of any model with token-by-token decoding."""

    def take(self, rows: jax.Array) -> Self:
        """Select rows of the cache."""
        ...


# (tokens [R, 1], positions [R, 1], cache) → (logits [R, 1, V], cache)
DecodeStep = Callable[[jax.Array, jax.Array, DecodingCache], tuple[jax.Array, DecodingCache]]


@dataclass(frozen=True)
class BeamOptions:
    """Options of beam search.

    Attributes:
        beam_size: hypotheses per input, K.
        max_length: maximum tokens of a hypothesis, including the end token, T.
        length_penalty: exponent of the length penalty: hypotheses are ranked by
            log-probability / ((5 + length) / 6)^length_penalty (Wu et al. 2016, eq. 14).
        controls: constraints on new tokens.
    """

    beam_size: int
    max_length: int
    length_penalty: float = 0.0
    controls: Controls = field(default_factory=Controls)

    @classmethod
    def from_config(
        cls, config: ConfigDict, tokenizer: Tokenizer, further_ends: Sequence[int] = ()
    ) -> BeamOptions:
        """Return the options of a resolved configuration; for arguments see `Controls`."""
        decode = config.decode
        controls = Controls.from_config(config, tokenizer, further_ends)
        return cls(decode.beam_size, decode.max_length, decode.length_penalty, controls)

    def norm(self, length: jax.Array | int) -> jax.Array:
        """Return the divisor of log-probabilities for a length."""
        return ((5.0 + jnp.asarray(length)) / 6.0) ** self.length_penalty


@flax.struct.dataclass
class _Hypotheses:
    """Top-K hypotheses per input, best first; scores are -inf for missing ones."""

    tokens_BKT: jax.Array
    scores_BK: jax.Array
    lengths_BK: jax.Array


@flax.struct.dataclass
class _State:
    """State of the search after `step` tokens.

    Attributes:
        step: number of tokens so far, int32 scalar.
        running: unfinished hypotheses; scores are log-probabilities.
        finished: finished hypotheses; scores are divided by `BeamOptions.norm`.
        rows: cache row of each running hypothesis's parent, int32 [R].
    """

    step: jax.Array
    running: _Hypotheses
    finished: _Hypotheses
    rows: jax.Array


def beam_search(
    decode: DecodeStep,
    cache: DecodingCache,
    logits_BV: jax.Array,
    positions_B: jax.Array,
    limits_B: jax.Array,
    options: BeamOptions,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the K best hypotheses of each input: tokens [B, K, T], scores and lengths [B, K].

    A hypothesis ends with an end token (which is included), or without one after `limits_B` or
    `max_length` tokens. If there are fewer than K, scores are -inf and lengths 0.

    Args:
        decode: one step of the model.
        cache: cache of the inputs, one row each.
        logits_BV: logits of the first new token.
        positions_B: position of the first new token.
        limits_B: maximum new tokens of each input.
        options: beam size, lengths and controls.
    """
    B, K = len(logits_BV), options.beam_size
    limits_B = jnp.minimum(limits_B, options.max_length)
    cache = cache.take(jnp.repeat(jnp.arange(B), K))
    empty = _Hypotheses(
        jnp.full((B, K, options.max_length), UNSET, jnp.int32),
        jnp.full((B, K), -jnp.inf, jnp.float32),
        jnp.zeros((B, K), jnp.int32),
    )
    one = empty.replace(scores_BK=empty.scores_BK.at[:, 0].set(0))  # type: ignore[attr-defined]
    start = _State(jnp.zeros((), jnp.int32), one, empty, jnp.arange(B * K))
    state = _advance(start, jnp.repeat(logits_BV, K, axis=0), limits_B, options)

    def can_improve(carry: tuple[_State, DecodingCache]) -> jax.Array:
        state, _ = carry
        # Log-probabilities only fall, and the longest hypothesis has the largest norm.
        bound_B = state.running.scores_BK.max(-1) / options.norm(limits_B)
        return (bound_B > state.finished.scores_BK.min(-1)).any()

    def body(carry: tuple[_State, DecodingCache]) -> tuple[_State, DecodingCache]:
        state, cache = carry
        last_R1 = jnp.take(state.running.tokens_BKT, state.step - 1, axis=2).reshape(-1, 1)
        # Once all hypotheses have ended, the next position may exceed the model's context.
        position_B = positions_B + jnp.minimum(state.step, limits_B) - 1
        position_R1 = jnp.repeat(position_B, K)[:, None]
        if K > 1:
            cache = _reorder(cache, state.rows)
        logits_R1V, cache = decode(jnp.maximum(last_R1, 0), position_R1, cache)
        return _advance(state, logits_R1V[:, 0], limits_B, options), cache

    state, _ = jax.lax.while_loop(can_improve, body, (state, cache))
    found = state.finished
    return found.tokens_BKT, found.scores_BK, found.lengths_BK


def _advance(
    state: _State, logits_RV: jax.Array, limits_B: jax.Array, options: BeamOptions
) -> _State:
    """Extend every running hypothesis by one token, finish it, or drop it."""
    (B, K), V = state.running.scores_BK.shape, logits_RV.shape[-1]
    controls, written_RT = options.controls, state.running.tokens_BKT.reshape(B * K, -1)
    logits_RV = controls.penalized(logits_RV.astype(jnp.float32), written_RT)
    scores_RV = controls.masked(jax.nn.log_softmax(logits_RV), written_RT, state.step)
    scores_BKV = state.running.scores_BK[:, :, None] + scores_RV.reshape(B, K, V)
    scores_BK, best_BK = jax.lax.top_k(scores_BKV.reshape(B, K * V), K)
    parents_BK, tokens_BK = best_BK // V, best_BK % V

    length = state.step + 1
    tokens_BKT = jnp.take_along_axis(state.running.tokens_BKT, parents_BK[:, :, None], axis=1)
    tokens_BKT = jax.lax.dynamic_update_slice(tokens_BKT, tokens_BK[:, :, None], (0, 0, state.step))
    ends_BK = jnp.broadcast_to((length >= limits_B)[:, None], (B, K))
    ends_BK |= controls.ends(tokens_BK)
    running = _Hypotheses(
        tokens_BKT, jnp.where(ends_BK, -jnp.inf, scores_BK), jnp.full((B, K), length)
    )
    ended_BK = jnp.where(ends_BK, scores_BK / options.norm(length), -jnp.inf)
    ended = running.replace(scores_BK=ended_BK)  # type: ignore[attr-defined]
    rows = (jnp.arange(B)[:, None] * K + parents_BK).reshape(-1)
    return _State(length, running, _best(state.finished, ended), rows)


def _best(old: _Hypotheses, new: _Hypotheses) -> _Hypotheses:
    """Return the K best of both, sorted; ties keep the old ones."""
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), old, new)
    scores_BK, best_BK = jax.lax.top_k(both.scores_BK, old.scores_BK.shape[1])
    lengths_BK = jnp.take_along_axis(both.lengths_BK, best_BK, axis=1)
    return _Hypotheses(
        jnp.take_along_axis(both.tokens_BKT, best_BK[:, :, None], axis=1),
        scores_BK,
        jnp.where(scores_BK == -jnp.inf, 0, lengths_BK),
    )


def _reorder(cache: DecodingCache, rows: jax.Array) -> DecodingCache:
    """Reorder the cache by each row's parent.

    The encoded source is the same for all hypotheses of an input, so it stays in place.
    """
    taken = cache.take(rows)
    source = getattr(cache, "source", None)
    return taken if source is None else taken.replace(source=source)  # type: ignore[attr-defined]
