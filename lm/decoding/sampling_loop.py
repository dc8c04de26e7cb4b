"""Generating continuations of prompts with a key/value cache, one token a step.

Shape letters: B batch, L prompt length, T most new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.decoding.beam import Cache
from lm.decoding.controls import UNSET, Controls
from lm.decoding.prompts import Tokens, check_prompts, context_of, few_widths, pad
from lm.decoding.sampling import Sampling, choose_tokens
from lm.models.variables import as_variables
from lm.train_step import Params


def generate(
    model: nn.Module,
    params: Params,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    controls: Controls,
    is_prefix: bool = False,
    numbers: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """Token ids of the next step of every prompt, [B], -1 for rows that have ended.

    A row ends at the end token (not given out), after `max_new_tokens`, or when its context is
    full. Prompts are padded on the left, so that all rows write the same cache slot; with
    `is_prefix` their tokens see one another. A row's tokens depend on its prompt, its number (its
    place, unless given) and the seed, not on what the other rows hold.
    """
    context = context_of(model)
    check_prompts(prompts, context)
    lengths_B = np.array([len(prompt) for prompt in prompts])
    B, L = len(prompts), few_widths(int(lengths_B.max()))
    tokens_BL, segments_BL = pad(prompts, L, left=True)
    positions_BL = np.maximum(np.arange(L) - (L - lengths_B)[:, None], 0)
    T = min(max_new_tokens, context or max_new_tokens)
    limits_B = np.minimum(T, context - lengths_B) if context else np.full(B, T)
    n_steps = int(limits_B.max())

    cache = model.apply({}, B, L + T, method="empty_cache")
    numbers_B = np.arange(B) if numbers is None else np.asarray(numbers)
    step = partial(_next_tokens, model, sampling, controls, params, numbers_B)
    start: Any = (tokens_BL, positions_BL, segments_BL, segments_BL if is_prefix else None)
    written_BT = jnp.full((B, T), UNSET, jnp.int32)
    written_BT, cache = step(start, written_BT, cache, 0, jax.random.key(seed))
    alive_B = np.ones(B, bool)
    for i in range(n_steps):
        # The next step is dispatched before this one's tokens are read.
        current_B = written_BT[:, i]
        if i + 1 < n_steps:
            at_B = lengths_B + np.minimum(i, limits_B - 1)
            one = (current_B[:, None], at_B[:, None], np.ones((B, 1), np.int32), None)
            written_BT, cache = step(one, written_BT, cache, i + 1, jax.random.key(seed))
        chosen_B = np.asarray(jax.device_get(current_B))
        alive_B &= (chosen_B != controls.end_id) & (i < limits_B)
        if not alive_B.any():
            return
        yield np.where(alive_B, chosen_B, UNSET)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames=("written_BT", "cache"))
def _next_tokens(
    model: nn.Module,
    sampling: Sampling,
    controls: Controls,
    params: Params,
    numbers_B: jax.Array,
    inputs: tuple[jax.Array, ...],
    written_BT: jax.Array,
    cache: Cache,
    n: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, Cache]:
    """The `n` written tokens and one more, and the cache with the inputs."""
    tokens_BL, positions_BL, segments_BL, prefix_BL = inputs
    prefix = () if prefix_BL is None else (prefix_BL,)
    outputs: Any = model.apply(
        as_variables(params), tokens_BL, positions_BL, segments_BL, cache, *prefix, method="decode"
    )
    logits_BLV, cache = outputs
    logits_BV = controls.adjusted(logits_BLV[:, -1].astype(jnp.float32), written_BT)
    logits_BV = controls.allowed(logits_BV, written_BT, n)
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, n)))(numbers_B)
    tokens_B = choose_tokens(logits_BV, sampling, keys_B)
    return jax.lax.dynamic_update_slice(written_BT, tokens_B[:, None], (0, n)), cache
