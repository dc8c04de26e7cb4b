"""Sampling: choose the next token from the logits, one step of a key/value cache at a time.

Shape letters: B batch, L prompt length, T most new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
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
from lm.models.variables import Params, as_variables


@dataclass(frozen=True)
class Sampling:
    """Sampling options.

    Attributes:
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: sample from the k most likely tokens (Fan et al. 2018); 0: from all.
        top_p: sample from the smallest set of tokens whose probability reaches p (Holtzman et al.
            2020); 1: from all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def sample_tokens(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
    """Return one token id a row, int32 [B]; temperature, top-k and top-p apply in this order.

    Args:
        logits_BV: float32 logits.
        sampling: options.
        keys_B: random key of each row.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        descending_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        probabilities_BV = jax.nn.softmax(descending_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        # The most likely token stays, however small p is.
        kept_BV = jnp.where(before_BV < max(sampling.top_p, 1e-9), descending_BV, jnp.inf)
        logits_BV = jnp.where(logits_BV < kept_BV.min(-1, keepdims=True), -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


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
) -> Iterator[np.ndarray]:
    """Yield the token ids of each step, int32 [B]; -1 for rows that have ended.

    A row ends at the end token (which is not yielded), after `max_new_tokens`, or when its context
    is full. Prompts are padded on the left, so that all rows write the same cache slot. A row's
    tokens depend on its prompt, its number and the seed, not on the other rows.

    Args:
        model: model with the methods `empty_cache` and `decode`.
        params: its parameters.
        prompts: token ids of each prompt.
        max_new_tokens: most steps, T.
        sampling: options.
        seed: seed of all rows.
        controls: constraints on the new tokens.
        has_prefix: tokens of a prompt attend to each other in both directions.
        numbers: numbers of the rows, part of their random keys; None: 0 … B-1.
    """
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

    cache = model.apply({}, B, L + T, method="empty_cache")
    numbers_B = np.arange(B) if numbers is None else np.asarray(numbers)
    step = partial(_next_tokens, model, sampling, controls, params, numbers_B)
    start: Any = (tokens_BL, positions_BL, segments_BL, segments_BL if has_prefix else None)
    written_BT = jnp.full((B, T), UNSET, jnp.int32)
    written_BT, cache = step(start, written_BT, cache, 0, jax.random.key(seed))
    alive_B = np.ones(B, bool)
    for i in range(n_steps):
        # The next step is dispatched before this one's tokens are read.
        current_B = written_BT[:, i]
        if i + 1 < n_steps:
            position_B = lengths_B + np.minimum(i, limits_B - 1)
            one = (current_B[:, None], position_B[:, None], np.ones((B, 1), np.int32), None)
            written_BT, cache = step(one, written_BT, cache, i + 1, jax.random.key(seed))
        ids_B = np.asarray(jax.device_get(current_B))
        alive_B &= ~np.isin(ids_B, controls.end_ids) & (i < limits_B)
        if not alive_B.any():
            return
        yield np.where(alive_B, ids_B, UNSET)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames=("written_BT", "cache"))
def _next_tokens(
    model: nn.Module,
    sampling: Sampling,
    controls: Controls,
    params: Params,
    numbers_B: jax.Array,
    inputs: tuple[jax.Array, ...],
    written_BT: jax.Array,
    cache: DecodingCache,
    n: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, DecodingCache]:
    """Return the `n` written tokens and one more, and the cache with the inputs."""
    tokens_BL, positions_BL, segments_BL, prefix_BL = inputs
    prefix = () if prefix_BL is None else (prefix_BL,)
    outputs: Any = model.apply(
        as_variables(params), tokens_BL, positions_BL, segments_BL, cache, *prefix, method="decode"
    )
    logits_BLV, cache = outputs
    logits_BV = controls.penalized(logits_BLV[:, -1].astype(jnp.float32), written_BT)
    logits_BV = controls.masked(logits_BV, written_BT, n)
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, n)))(numbers_B)
    tokens_B = sample_tokens(logits_BV, sampling, keys_B)
    return jax.lax.dynamic_update_slice(written_BT, tokens_B[:, None], (0, n)), cache
