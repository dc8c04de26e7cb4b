"""Sampling: choose next tokens from logits, with several cached steps per dispatch.

Shape letters: B batch, L prompt length, T maximum new tokens, C columns per dispatch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.decoding.beam import DecodingCache
from lm.decoding.controls import UNSET, Controls
from lm.decoding.prompts import (
    TokenIds,
    check_ids,
    check_prompts,
    context_length,
    pad_ids,
    padded_length,
)
from lm.decoding.weights import unroll
from lm.models.layers import Embedding, Linear
from lm.models.quantized_layers import quantized_kernel, with_quantized
from lm.models.variables import Params, as_variables
from lm.parallel.mesh import current_mesh

STEPS_PER_DISPATCH = 16
_SHORTEST_CACHE = 256


@dataclass(frozen=True)
class Sampling:
    """Sampling options.

    Attributes:
        temperature: divisor of the logits; 0 is greedy.
        top_k: sample from the k most likely tokens (Fan et al. 2018); 0: all.
        top_p: sample from the smallest set of tokens with total probability at least p (Holtzman et
            al. 2020); 1: all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def sample_tokens(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
    """Sample one token id per row, int32 [B]; applies temperature, top-k and top-p in this order.

    Args:
        logits_BV: float32 logits.
        sampling: options.
        keys_B: random key of each row.
    """
    if sampling.temperature == 0:
        return first_largest(logits_BV)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        logits_BV = jnp.where(in_nucleus(logits_BV, sampling.top_p), logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def in_nucleus(logits_BV: jax.Array, p: float | jax.Array) -> jax.Array:
    """Return the smallest sets of tokens with total probability at least p, bool [B, V].

    p may be a scalar or [B, 1].

    A token is in the set if the tokens more likely than it have total probability below p. The
    threshold is found by bisection instead of sorting: probabilities are ordered like their bits.
    """
    probabilities_BV = jax.nn.softmax(logits_BV, axis=-1)
    bits_BV = jax.lax.bitcast_convert_type(probabilities_BV, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B1, high_B1 = bounds  # invariant: low < threshold ≤ high
        middle_B1 = low_B1 + (high_B1 - low_B1) // 2
        likelier_BV = jnp.where(bits_BV > middle_B1, probabilities_BV, 0)
        is_in = likelier_BV.sum(-1, keepdims=True) < jnp.maximum(
            p, 1e-9
        )  # always true for the most likely token
        return jnp.where(is_in, low_B1, middle_B1), jnp.where(is_in, middle_B1, high_B1)

    high_B1 = bits_BV.max(-1, keepdims=True)
    _, least_B1 = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(high_B1, -1), high_B1))
    return bits_BV >= least_B1


def first_largest(x: jax.Array) -> jax.Array:
    """Return the index of the largest value along the last axis (first of ties), int32.

    XLA's CPU backend vectorizes these two reductions, but not `argmax`.
    """
    n, largest = x.shape[-1], x.max(-1, keepdims=True)
    return jnp.where(x < largest, n, jnp.arange(n, dtype=jnp.int32)).min(-1)


@flax.struct.dataclass
class Rows:
    """Constant per-row data of a batch.

    Attributes:
        key: random key of the batch.
        numbers_B: row numbers, which are part of the random keys.
        lengths_B: prompt lengths.
        limits_B: maximum new tokens of each row.
    """

    key: jax.Array
    numbers_B: jax.Array
    lengths_B: jax.Array
    limits_B: jax.Array


@flax.struct.dataclass
class State:
    """State after `n` new tokens of every row; donated to the next step.

    Attributes:
        written_BT: new tokens, then `UNSET`.
        n: number of new tokens.
        alive_B: rows that have not ended.
        cache: cache of the prompts and of all new tokens except the last.
    """

    written_BT: jax.Array
    n: jax.Array
    alive_B: jax.Array
    cache: DecodingCache


def sample_steps(
    model: nn.Module,
    params: Params,
    prompts: Sequence[TokenIds],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    controls: Controls,
    has_prefix: bool = False,
    numbers: Sequence[int] | None = None,
    per_dispatch: int = STEPS_PER_DISPATCH,
) -> Iterator[np.ndarray]:
    """Yield the token ids of each step, int32 [B]; -1 for rows that have ended.

    A row ends at an end token (not yielded), after `max_new_tokens`, when its context is full, or
    when the controls allow no token.
    Prompts are left-padded, so that all rows write the same cache slot. A row's tokens depend on
    its prompt, number and the seed, not on other rows.

    Args:
        model: model with methods `empty_cache` and `decode`.
        params: parameters.
        prompts: token ids of each prompt.
        max_new_tokens: maximum number of steps, T.
        sampling: options.
        seed: seed of all rows.
        controls: constraints on new tokens.
        has_prefix: prompt tokens attend to each other bidirectionally.
        numbers: row numbers, part of the random keys; None: 0 … B-1.
        per_dispatch: steps per call of the compiled program.
    """
    model, params = unroll(model, params)
    context = context_length(model)
    check_prompts(prompts, context)
    check_ids(prompts, model)
    lengths_B = np.array([len(prompt) for prompt in prompts])
    B, L = len(prompts), padded_length(int(lengths_B.max()))
    tokens_BL, segments_BL = pad_ids(prompts, L, left=True)
    positions_BL = np.maximum(np.arange(L) - (L - lengths_B)[:, None], 0)
    T = min(max_new_tokens, context or max_new_tokens)
    limits_B = np.minimum(T, context - lengths_B) if context else np.full(B, T)
    n_steps = int(limits_B.max())

    numbers_B = np.arange(B) if numbers is None else np.asarray(numbers)
    of_rows = map(jnp.asarray, (numbers_B, lengths_B, limits_B))
    rows = Rows(jax.random.key(seed), *of_rows)
    inputs: Any = (tokens_BL, positions_BL, segments_BL, segments_BL if has_prefix else None)
    room = cache_length(L, L + T)
    # Every dispatch returns the same number of columns; the last ones may exceed T.
    written_BT = jnp.full((B, T + per_dispatch), UNSET, jnp.int32)
    state = _start(model, sampling, controls, room, params, rows, inputs, written_BT)
    new_BC, n_new, n, i = state.written_BT[:, :1], 1, 1, 0
    alive_B = np.ones(B, bool)
    while n_new:
        read_BC, n_read, n_new = new_BC, n_new, min(per_dispatch, n_steps - n)
        if n_new:  # the next steps are dispatched before these tokens are read
            if L + n > room:
                room = cache_length(L + n, L + T)
                longer: Any = lengthen(model, B, room, state.cache)
                state = replace(state, cache=longer)
            n_new = min(n_new, room - L - n + 1)
            n += n_new
            state, new_BC = _continue(
                model, sampling, controls, per_dispatch, params, rows, state, n
            )
        for ids_B in np.asarray(jax.device_get(read_BC)).T[:n_read]:
            is_written_B = (ids_B != UNSET) & ~np.isin(ids_B, controls.end_ids)
            alive_B &= is_written_B & (i < limits_B)
            if not alive_B.any():
                return
            yield np.where(alive_B, ids_B, UNSET)
            i += 1


def cache_length(needed: int, most: int) -> int:
    """Return the next power of two, so that attention reads few unwritten slots."""
    return min(most, max(_SHORTEST_CACHE, padded_length(needed)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def lengthen(model: nn.Module, batch: int, length: int, cache: DecodingCache) -> DecodingCache:
    """Extend the cache to hold more tokens."""

    def copy(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim)

    empty: Any = model.apply({}, batch, length, method="empty_cache")
    return jax.tree.map(copy, cache, empty)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames=("written_BT",))
def _start(
    model: nn.Module,
    sampling: Sampling,
    controls: Controls,
    cache_length: int,
    params: Params,
    rows: Rows,
    inputs: tuple[jax.Array, ...],
    written_BT: jax.Array,
) -> State:
    """Prefill the prompts and choose the first token."""
    tokens_BL, positions_BL, segments_BL, prefix_BL = inputs
    cache: Any = model.apply({}, len(tokens_BL), cache_length, method="empty_cache")
    prefix = () if prefix_BL is None else (prefix_BL,)
    logits_B1V, cache = decode_last(
        model, params, tokens_BL, positions_BL, segments_BL, cache, *prefix
    )
    state = State(written_BT, jnp.zeros((), jnp.int32), rows.limits_B > 0, cache)
    return _append(sampling, controls, rows, state, logits_B1V)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames=("state",))
def _continue(
    model: nn.Module,
    sampling: Sampling,
    controls: Controls,
    n_columns: int,
    params: Params,
    rows: Rows,
    state: State,
    stop: jax.Array,
) -> tuple[State, jax.Array]:
    """Choose tokens until there are `stop`, or all rows have ended.

    Returns:
        The state, and the next `n_columns` columns of tokens; those after `stop` are unset.
    """

    def is_unfinished(state: State) -> jax.Array:
        return (state.n < stop) & state.alive_B.any()

    def step(state: State) -> State:
        return next_token(model, sampling, controls, params, rows, state)

    after = jax.lax.while_loop(is_unfinished, step, state)
    return after, jax.lax.dynamic_slice_in_dim(after.written_BT, state.n, n_columns, axis=1)


def next_token(
    model: nn.Module,
    sampling: Sampling,
    controls: Controls,
    params: Params,
    rows: Rows,
    state: State,
) -> State:
    """Append one more token to every row.

    Args:
        model: unrolled model.
        sampling: options.
        controls: constraints on new tokens.
        params: parameters of the model.
        rows: the rows.
        state: state after at least one token.
    """
    tokens_B1 = jax.lax.dynamic_slice_in_dim(state.written_BT, state.n - 1, 1, axis=1)
    position_B1 = (rows.lengths_B + jnp.minimum(state.n, rows.limits_B) - 1)[:, None]
    inputs = jnp.maximum(tokens_B1, 0), position_B1, jnp.ones_like(tokens_B1), state.cache
    logits_B1V, cache = decode_last(model, params, *inputs)
    return _append(sampling, controls, rows, replace(state, cache=cache), logits_B1V)


def decode_last(
    model: nn.Module,
    params: Params,
    *inputs: Any,
    at_BN: jax.Array | None = None,
    adapt: Any = None,
) -> tuple[jax.Array, Any]:
    """Run the `decode` method; return logits of N tokens per row, [B, N, V], and the cache.

    Args:
        model: unrolled model.
        params: parameters.
        *inputs: arguments of `decode`.
        at_BN: indices of the tokens; None: the last one of each row.
        adapt: additional interceptor of the model's methods (`nn.intercept_methods`), or None.
    """
    mesh = current_mesh()
    on_one_device = mesh is None or mesh.size == 1

    def lean(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, context.method_name
        if name == "logits" and not module.path:
            at_BN1 = None if at_BN is None else at_BN[..., None]
            args = jax.tree.map(
                lambda x: x[:, -1:] if at_BN1 is None else jnp.take_along_axis(x, at_BN1, 1), args
            )
        if quantized_kernel(module) is not None:
            return with_quantized(method, args, kwargs, context)
        is_lookup = (type(module), name) == (Embedding, "__call__")
        if is_lookup and on_one_device and module.embedding.dtype == jnp.bfloat16:
            # XLA's CPU backend would convert the whole table to float32.
            table_VD, ids_BL = jax.lax.optimization_barrier((module.embedding, args[0]))
            return table_VD[ids_BL]
        is_product = (type(module), name) in ((Linear, "__call__"), (Embedding, "attend"))
        if is_product and module.dtype == jnp.bfloat16 and args[0].shape[:2] == (1, 1):
            # XLA's CPU backend has a library for bfloat16 matrices, and none for a vector.
            return method(jnp.concatenate([args[0]] * 2))[:1]
        return method(*args, **kwargs)

    with nn.intercept_methods(lean), nn.intercept_methods(adapt) if adapt else nullcontext():
        outputs: Any = model.apply(as_variables(params), *inputs, method="decode")
    return outputs


def _append(
    sampling: Sampling, controls: Controls, rows: Rows, state: State, logits_B1V: jax.Array
) -> State:
    """Append one token to each row of the state."""
    n, written_BT = state.n, state.written_BT
    logits_BV = controls.penalized(logits_B1V[:, -1].astype(jnp.float32), written_BT)
    logits_BV = controls.masked(logits_BV, written_BT, n)
    fold_in = partial(jax.random.fold_in, jax.random.fold_in(rows.key, n))
    tokens_B = sample_tokens(logits_BV, sampling, jax.vmap(fold_in)(rows.numbers_B))
    tokens_B = jnp.where((logits_BV != -jnp.inf).any(-1), tokens_B, UNSET)
    written_BT = jax.lax.dynamic_update_slice(written_BT, tokens_B[:, None], (0, n))
    is_last_B = controls.ends(tokens_B) | (tokens_B == UNSET) | (n + 1 >= rows.limits_B)
    alive_B = state.alive_B & ~is_last_B
    return State(written_BT, n + 1, alive_B, state.cache)
