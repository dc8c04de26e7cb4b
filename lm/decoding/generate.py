"""Generating continuations of prompts with a key/value cache, one token a step.

Shape letters: B batch, L prompt length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.decoding.sampling import Sampling, choose_tokens
from lm.errors import UserError
from lm.models.cache import Cache
from lm.models.decoder import Decoder
from lm.steps import Params


def generate(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    end_id: int | None = None,
) -> Iterator[np.ndarray]:
    """Token ids of the next step of every prompt, [B], -1 for rows that have ended.

    A row ends at `end_id` (not given out), after `max_new_tokens`, or when its context is full.
    Prompts are padded on the left, so that all rows write the same cache slot. A row's
    tokens depend on its prompt, its place and the seed, not on what the other rows hold.
    """
    context = model.config.max_length
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(
                f"prompt {number} is empty, and the tokenizer has no token to start with"
            )
        if len(prompt) >= context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens; the context holds {context}, "
                "one of them for the continuation"
            )
    lengths = np.array([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    tokens_BL = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens_BL, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    positions_BL = np.arange(width) - (width - lengths)[:, None]
    segments_BL = (positions_BL >= 0).astype(np.int32)
    n_steps = min(max_new_tokens, context - int(lengths.min()))

    key = jax.random.key(seed)
    cache = model.empty_cache(len(prompts), width + n_steps)
    step = partial(_next_tokens, model, sampling)
    tokens, cache = step(params, tokens_BL, np.maximum(positions_BL, 0), segments_BL, cache, key)
    alive = np.ones(len(prompts), bool)
    for i in range(n_steps):
        # The next step is dispatched before this one's tokens are read.
        current = tokens
        if i + 1 < n_steps:
            at = np.minimum(lengths + i, context - 1)[:, None].astype(np.int32)
            ones = np.ones((len(prompts), 1), np.int32)
            key = jax.random.fold_in(jax.random.key(seed), i + 1)
            tokens, cache = step(params, current[:, None], at, ones, cache, key)
        chosen = np.array(jax.device_get(current))
        alive &= (chosen != end_id) & (lengths + i < context)
        if not alive.any():
            return
        yield np.where(alive, chosen, -1)


@partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def _next_tokens(
    model: Decoder,
    sampling: Sampling,
    params: Params,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    segment_ids_BL: jax.Array,
    cache: Cache,
    key: jax.Array,
) -> tuple[jax.Array, Cache]:
    outputs: Any = model.apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL, cache)
    logits_BLV, cache = outputs
    return choose_tokens(logits_BLV[:, -1].astype(jnp.float32), sampling, key), cache
