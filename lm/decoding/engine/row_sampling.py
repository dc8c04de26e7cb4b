"""Sampling with per-row options: penalties, bias, limits, temperature and filters.

Options are arrays, so that one program serves all requests. Steps that no row uses are skipped;
rows that do not use a step keep their values bitwise.

Shape letters: B rows, T tokens per row, V vocabulary, E end tokens, N biased tokens, C listed
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from lm.decoding.engine.requests import MOST_LOGPROBS
from lm.decoding.sampling import first_largest, in_nucleus


@flax.struct.dataclass
class RowOptions:
    """Per-row options, constant over steps; see `GenerationRequest` for their meaning.

    Attributes:
        keys_B2: words of the random key of each row's seed, uint32.
        numbers_B: sample indices.
        n_prompt_B: prompt lengths.
        limits_B: maximum new tokens.
        min_new_B: minimum new tokens before an end token is allowed.
        top_k_B: number of tokens to sample from; 0: all.
        end_ids_BE: end tokens, then -1.
        n_listed_B: number of top tokens to list; -1: no log-probabilities.
        adapters_B: index of the low-rank adapter; 0: none.
        temperature_B: divisor of the logits; 0: greedy.
        top_p_B: nucleus probability.
        min_p_B: minimum probability relative to the largest one.
        repetition_B: divisor of the logits of written tokens.
        presence_B: subtracted from the logits of written tokens.
        frequency_B: subtracted for each occurrence of a token.
        bias_ids_BN: tokens with biased logits, then -1.
        bias_BN: biases added to them.
    """

    keys_B2: jax.Array
    numbers_B: jax.Array
    n_prompt_B: jax.Array
    limits_B: jax.Array
    min_new_B: jax.Array
    top_k_B: jax.Array
    end_ids_BE: jax.Array
    n_listed_B: jax.Array
    adapters_B: jax.Array
    temperature_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    bias_ids_BN: jax.Array
    bias_BN: jax.Array

    def of(self, rows: jax.Array) -> RowOptions:
        """Return the options of some rows."""
        return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), self)


@flax.struct.dataclass
class Chosen:
    """Chosen tokens, with log-probabilities for rows that request them.

    Attributes:
        tokens_B: chosen tokens, int32.
        logprobs_B: their log-probabilities, before temperature and filters.
        listed_BC: most likely tokens, in descending order.
        listed_logprobs_BC: their log-probabilities.
    """

    tokens_B: jax.Array
    logprobs_B: jax.Array
    listed_BC: jax.Array
    listed_logprobs_BC: jax.Array


def choose_tokens(
    logits_BV: jax.Array,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    options: RowOptions,
    allowed_BV: jax.Array | None,
) -> Chosen:
    """Choose the next token of each row.

    Args:
        logits_BV: float32 logits.
        tokens_BT: prompt and reply so far.
        lengths_B: their lengths.
        options: options of the rows.
        allowed_BV: mask of allowed tokens; None: all.
    """
    o, n_new_B = options, lengths_B - options.n_prompt_B
    is_greedy_B = o.temperature_B == 0
    wants_end_later_B = n_new_B < o.min_new_B
    changes = (_penalizes(o) | (o.bias_ids_BN >= 0).any(1) | wants_end_later_B).any()
    if allowed_BV is not None:
        changes |= ~allowed_BV.all()

    def change() -> jax.Array:
        scores_BV = _penalized(logits_BV, tokens_BT, lengths_B, o)
        if allowed_BV is not None:
            scores_BV = jnp.where(allowed_BV, scores_BV, -jnp.inf)
        return _where_any(wants_end_later_B, partial(_without_ends, o.end_ids_BE), scores_BV)

    def choose() -> jax.Array:
        scores_BV = lax.cond(changes, change, lambda: logits_BV)
        best_B = first_largest(scores_BV)
        drawn_B = lax.cond(is_greedy_B.all(), lambda: best_B, lambda: _drawn(scores_BV, n_new_B, o))
        return jnp.where(is_greedy_B, best_B, drawn_B)

    # A `cond` copies the result of a branch, which costs more than the search for a large V.
    is_plain = is_greedy_B.all() & ~changes
    tokens_B = lax.cond(is_plain, lambda: first_largest(logits_BV), choose)

    def listed() -> tuple[jax.Array, jax.Array, jax.Array]:
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        of_chosen_B = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]
        best_BC, ids_BC = lax.cond(
            (o.n_listed_B > 0).any(),
            lambda: largest_logprobs(logprobs_BV),
            lambda: largest_logprobs(logprobs_BV[:, : min(MOST_LOGPROBS, logits_BV.shape[1])]),
        )
        return of_chosen_B, ids_BC, best_BC

    shapes = jax.eval_shape(listed)
    nothing = [jnp.zeros(x.shape, x.dtype) for x in shapes]
    wanted = (o.n_listed_B >= 0).any()
    return Chosen(tokens_B, *lax.cond(wanted, lambda: tuple(listed()), lambda: tuple(nothing)))


def largest_logprobs(logprobs_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the largest values that can be listed, with their indices."""
    best_BC, ids_BC = lax.top_k(logprobs_BV, min(MOST_LOGPROBS, logprobs_BV.shape[1]))
    return best_BC, ids_BC


def _where_any(
    wants_B: jax.Array, change: Callable[[jax.Array], jax.Array], x_BV: jax.Array
) -> jax.Array:
    """Apply changes to the rows that want them; skip the computation if none does."""

    def changed(x_BV: jax.Array) -> jax.Array:
        return jnp.where(wants_B[:, None], change(x_BV), x_BV)

    return lax.cond(wants_B.any(), changed, lambda x: x, x_BV)


def _penalizes(o: RowOptions) -> jax.Array:
    """Return which rows have penalties, bool [B]."""
    return (o.repetition_B != 1) | (o.presence_B != 0) | (o.frequency_B != 0)


def _penalized(
    logits_BV: jax.Array, tokens_BT: jax.Array, lengths_B: jax.Array, o: RowOptions
) -> jax.Array:
    """Apply penalties (Keskar et al. 2019, §4.1; OpenAI's) and bias to the logits."""
    rows_B1, V = jnp.arange(len(logits_BV))[:, None], logits_BV.shape[1]

    def penalize(x_BV: jax.Array) -> jax.Array:
        at_T = jnp.arange(tokens_BT.shape[1])
        is_new_BT = (at_T >= o.n_prompt_B[:, None]) & (at_T < lengths_B[:, None])
        tokens_or_none_BT = jnp.where(is_new_BT, tokens_BT, V)
        counts_BV = jnp.zeros(x_BV.shape).at[rows_B1, tokens_or_none_BT].add(1, mode="drop")
        by_B1 = o.repetition_B[:, None]
        repeated_BV = jnp.where(x_BV > 0, x_BV / by_B1, x_BV * by_B1)
        x_BV = jnp.where(counts_BV > 0, repeated_BV - o.presence_B[:, None], x_BV)
        return x_BV - o.frequency_B[:, None] * counts_BV

    def add_bias(x_BV: jax.Array) -> jax.Array:
        ids_BN = jnp.where(o.bias_ids_BN < 0, V, o.bias_ids_BN)
        return x_BV.at[rows_B1, ids_BN].add(o.bias_BN, mode="drop")

    penalized_BV = _where_any(_penalizes(o), penalize, logits_BV)
    return _where_any((o.bias_ids_BN >= 0).any(1), add_bias, penalized_BV)


def _without_ends(end_ids_BE: jax.Array, x_BV: jax.Array) -> jax.Array:
    rows_B1 = jnp.arange(len(x_BV))[:, None]
    ids_BE = jnp.where(end_ids_BE < 0, x_BV.shape[1], end_ids_BE)
    return x_BV.at[rows_B1, ids_BE].set(-jnp.inf, mode="drop")


def _drawn(scores_BV: jax.Array, n_new_B: jax.Array, o: RowOptions) -> jax.Array:
    """Sample each row, with the keys of `sample_steps`."""
    x_BV = filtered(scores_BV, o)

    def key(words_2: jax.Array, n_new: jax.Array, number: jax.Array) -> jax.Array:
        of_seed = jax.random.wrap_key_data(words_2)
        return jax.random.fold_in(jax.random.fold_in(of_seed, n_new), number)

    keys_B = jax.vmap(key)(o.keys_B2, n_new_B, o.numbers_B)
    return jax.vmap(jax.random.categorical)(keys_B, x_BV).astype(jnp.int32)


def filtered(scores_BV: jax.Array, o: RowOptions) -> jax.Array:
    """Apply temperature, top-k, top-p and min-p; filtered tokens get -inf."""
    divisor_B1 = jnp.where(o.temperature_B == 0, 1, o.temperature_B)[:, None]
    x_BV, V = scores_BV / divisor_B1, scores_BV.shape[1]
    is_drawn_B = o.temperature_B != 0

    def keep_top_k(x_BV: jax.Array) -> jax.Array:
        return jnp.where(x_BV < kth_largest(x_BV, o.top_k_B)[:, None], -jnp.inf, x_BV)

    def keep_nucleus(x_BV: jax.Array) -> jax.Array:
        return jnp.where(in_nucleus(x_BV, o.top_p_B[:, None]), x_BV, -jnp.inf)

    def keep_likely(x_BV: jax.Array) -> jax.Array:
        least_B1 = x_BV.max(-1, keepdims=True) + jnp.log(o.min_p_B)[:, None]
        return jnp.where(x_BV < least_B1, -jnp.inf, x_BV)

    x_BV = _where_any(is_drawn_B & (o.top_k_B > 0) & (o.top_k_B < V), keep_top_k, x_BV)
    x_BV = _where_any(is_drawn_B & (o.top_p_B < 1), keep_nucleus, x_BV)
    return _where_any(is_drawn_B & (o.min_p_B > 0), keep_likely, x_BV)


def kth_largest(x_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """Return the k-th largest value of each row, float32 [B], by bisection of its bits.

    Floats are ordered like the integers of their bits, once those of negative ones are flipped.
    """
    bits_BV = lax.bitcast_convert_type(x_BV, jnp.int32)
    flipped = jnp.int32(0x7FFFFFFF)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ flipped, bits_BV)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds  # at least k values reach `low`; fewer reach `high` + 1
        middle_B = (low_B >> 1) + (high_B >> 1) + (((low_B & 1) + (high_B & 1) + 1) >> 1)
        reaches_B = (order_BV >= middle_B[:, None]).sum(-1) >= k_B
        return jnp.where(reaches_B, middle_B, low_B), jnp.where(reaches_B, high_B, middle_B - 1)

    low_B, _ = lax.fori_loop(0, 33, halve, (order_BV.min(-1), order_BV.max(-1)))
    return lax.bitcast_convert_type(jnp.where(low_B < 0, low_B ^ flipped, low_B), jnp.float32)
