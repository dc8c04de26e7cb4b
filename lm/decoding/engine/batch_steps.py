"""Decoding steps of a batch over the model's own cache, with options per row.

Rows start together and end separately; tokens are those of `sample_steps`.

Shape letters: B rows, L prompt or source length, T maximum new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.decoding.controls import UNSET
from lm.decoding.engine.option_table import OptionTable
from lm.decoding.engine.programs import reply_continues
from lm.decoding.engine.requests import GenerationRequest
from lm.decoding.engine.row_sampling import Chosen, RowOptions, choose_tokens
from lm.decoding.prompts import (
    first_inputs,
    is_encoder_decoder,
    pad_ids,
    pad_sources,
    padded_length,
)
from lm.decoding.sampling import State, cache_length, decode_last, lengthen
from lm.models.variables import Params, as_variables


def batch_steps(
    model: nn.Module,
    params: Params,
    requests: Sequence[GenerationRequest],
    seeds: Sequence[int],
    allowed: Callable[[], np.ndarray] | None,
    start_ids: tuple[int, ...],
    has_prefix: bool = False,
) -> Iterator[Chosen]:
    """Yield the next token of every row, on the host; -1 for rows that have ended.

    Args:
        model: model prepared for decoding, with `empty_cache` or `start`, and `decode`.
        params: parameters.
        requests: requests whose prompts and replies fit the context.
        seeds: seeds of the requests.
        allowed: returns a mask [B, V] of allowed next tokens, after the previous ones were yielded;
            None: all.
        start_ids: tokens that precede a target.
        has_prefix: prompt tokens attend to each other bidirectionally.
    """
    B = 1 << (len(requests) - 1).bit_length()
    table = OptionTable(B, model.config.vocab_size)  # type: ignore[attr-defined]
    for i, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
        table.set(i, replace(request, prompt=()), seed, 0)  # the text of a row is its reply only
    options = table.on_device
    prompts = [*(request.prompt for request in requests), *[requests[0].prompt] * B][:B]
    n_steps = max(request.max_new_tokens for request in requests)
    T, L, P = padded_length(n_steps + 1), padded_length(max(map(len, prompts))), len(start_ids)
    if has_source := is_encoder_decoder(model):
        arrays, room = pad_sources(prompts, model), T + P - 1
    else:
        arrays, room = pad_ids(prompts, L, left=True), cache_length(L, L + T)
    mask = allowed and allowed()
    lengths_B = np.array([P if has_source else len(prompt) for prompt in prompts])
    state, chosen = _start(model, room, T, has_prefix, start_ids, params, options, mask, *arrays)
    for n in range(1, n_steps):
        before, is_behind = (
            chosen,
            allowed is None,
        )  # without masks, the host reads one step behind the device
        if not is_behind:
            yield jax.device_get(chosen)
        if not has_source and L + n > room:
            room = cache_length(L + n, L + T)
            state = replace(state, cache=lengthen(model, B, room, state.cache))
        mask = allowed and allowed()
        state, chosen = _next(model, params, options, mask, lengths_B, state)
        if is_behind:
            yield jax.device_get(before)
    yield jax.device_get(chosen)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _start(
    model: nn.Module,
    room: int,
    T: int,
    has_prefix: bool,
    start_ids: tuple[int, ...],
    params: Params,
    options: RowOptions,
    allowed_BV: jax.Array | None,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
) -> tuple[State, Chosen]:
    """Prefill prompts or sources, and choose the first token."""
    B = len(tokens_BL)
    inputs: tuple[Any, ...]
    if is_encoder_decoder(model):
        variables = as_variables(params)
        cache: Any = model.apply(variables, tokens_BL, segments_BL, room, method="start")
        inputs = *first_inputs(start_ids, B), cache
    else:
        cache = model.apply({}, B, room, method="empty_cache")
        positions_BL = jnp.maximum(jnp.cumsum(segments_BL, 1) - 1, 0)
        prefix = (segments_BL,) if has_prefix else ()
        inputs = tokens_BL, positions_BL, segments_BL, cache, *prefix
    logits_B1V, cache = decode_last(model, params, *inputs)
    written_BT = jnp.full((B, T), UNSET, jnp.int32)
    state = State(written_BT, jnp.zeros((), jnp.int32), options.limits_B > 0, cache)
    return _append(options, allowed_BV, state, logits_B1V)


@partial(jax.jit, static_argnums=0, donate_argnames="state")
def _next(
    model: nn.Module,
    params: Params,
    options: RowOptions,
    allowed_BV: jax.Array | None,
    lengths_B: jax.Array,
    state: State,
) -> tuple[State, Chosen]:
    """Choose one more token for every row."""
    tokens_B1 = jax.lax.dynamic_slice_in_dim(state.written_BT, state.n - 1, 1, axis=1)
    position_B1 = (lengths_B + jnp.minimum(state.n, options.limits_B) - 1)[:, None]
    inputs = jnp.maximum(tokens_B1, 0), position_B1, jnp.ones_like(tokens_B1), state.cache
    logits_B1V, cache = decode_last(model, params, *inputs)
    return _append(options, allowed_BV, replace(state, cache=cache), logits_B1V)


def _append(
    options: RowOptions, allowed_BV: jax.Array | None, state: State, logits_B1V: jax.Array
) -> tuple[State, Chosen]:
    logits_BV, n = logits_B1V[:, -1].astype(jnp.float32), state.n
    lengths_B = jnp.broadcast_to(n, state.alive_B.shape)
    chosen = choose_tokens(logits_BV, state.written_BT, lengths_B, options, allowed_BV)
    tokens_B = jnp.where(state.alive_B, chosen.tokens_B, UNSET)
    written_BT = jax.lax.dynamic_update_slice(state.written_BT, tokens_B[:, None], (0, n))
    alive_B = state.alive_B & reply_continues(tokens_B, lengths_B + 1, options)
    return State(written_BT, n + 1, alive_B, state.cache), replace(chosen, tokens_B=tokens_B)
