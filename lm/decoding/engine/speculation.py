"""Speculative decoding: verify several proposed tokens in one forward pass (Leviathan et al. 2023).

A proposal is accepted if it equals the token that the model samples with its own random numbers; a
draft model samples with the same ones (Daliri, Musco and Suresh 2024: drafter-invariant coupling).
So replies and their distribution are those of token-by-token decoding, whatever the proposals.

Shape letters: R rows, T tokens per row, L tokens per pass (last token and proposals), V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lm.decoding.engine.adapters import Adapters
from lm.decoding.engine.programs import (
    DraftModel,
    EngineState,
    NewTokens,
    Replies,
    StateSharding,
    StepRows,
    placed,
)
from lm.decoding.engine.row_sampling import RowOptions, choose_tokens
from lm.decoding.sampling import decode_last
from lm.kernels.paged_attention import PagedRows
from lm.models.layer_pages import Pages
from lm.models.paged_cache import PagedCache
from lm.models.variables import Params

_LONGEST = 3  # maximum length of the n-gram used for prompt look-up


@partial(
    jax.jit,
    static_argnames=("model", "n_columns", "n_proposed", "sharding"),
    donate_argnames=("state",),
)
def speculate_rows(
    model: nn.Module,
    params: Params,
    state: EngineState,
    adapters: Adapters | None,
    draft: DraftModel | None,
    options: RowOptions,
    rows: StepRows,
    n_columns: int,
    n_proposed: int,
    sharding: StateSharding,
) -> tuple[EngineState, NewTokens]:
    """Decode the next tokens of some rows, 1 to `n_proposed` + 1 per row and step.

    Args:
        model: unrolled model.
        params: parameters.
        state: texts and pages.
        adapters: low-rank adapters of the model, or None.
        draft: draft model; None: propose what followed the last tokens earlier in the text.
        options: options of all rows.
        rows: the rows.
        n_columns: maximum number of steps in the result.
        n_proposed: proposed tokens per step.
        sharding: sharding of the state.

    Returns:
        The state, and the tokens: `n_proposed` + 1 columns per step, -1 after a rejected proposal.
    """
    L, own = n_proposed + 1, options.of(rows.numbers_R)
    adapt = adapters and adapters.interceptor(own.adapters_B)
    most_R = own.n_prompt_B + own.limits_B - 1  # keys of the last token are never needed

    def step(carry: tuple[Pages, Pages, Replies]) -> tuple[Pages, Pages, Replies]:
        pages, draft_pages, now = carry
        if draft is None:
            proposed_RP = look_up(now.text_RT, now.lengths_R, n_proposed)
        else:
            proposed_RP, draft_pages = _propose(
                draft, own, rows, most_R, n_proposed, draft_pages, now
            )
        tokens_RL = jnp.concatenate([now.last_R1, proposed_RP], axis=1)
        until_R = jnp.minimum(now.lengths_R + n_proposed, most_R)
        paged = PagedRows(rows.tables_RM, now.lengths_R - 1, jnp.where(now.alive_R, until_R, 0))
        places_RL = jnp.broadcast_to(jnp.arange(L), tokens_RL.shape)
        positions_RL = now.lengths_R[:, None] - 1 + places_RL
        cache = PagedCache.of(model, pages, paged)
        inputs = tokens_RL, positions_RL, jnp.ones_like(tokens_RL), cache
        logits_RLV, cache = decode_last(model, params, *inputs, at_BN=places_RL, adapt=adapt)

        def check(place: jax.Array, carry: tuple[jax.Array, Replies]) -> tuple[jax.Array, Replies]:
            accepts_R, now = carry
            chosen = choose_tokens(
                logits_RLV[:, place], now.text_RT, now.lengths_R, own, rows.allowed_RV
            )
            writes_R = now.alive_R & accepts_R
            proposed_R = proposed_RP[:, jnp.minimum(place, n_proposed - 1)]
            is_same_R = jnp.where(writes_R, chosen.tokens_B, -1) == proposed_R
            return is_same_R, now.append(chosen, writes_R, own)

        start = jnp.ones_like(now.alive_R), now
        return cache.pages, draft_pages, lax.fori_loop(0, L, check, start)[1]

    start = state.pages, state.draft_pages, Replies.of(model, state, rows, n_columns * L)
    pages, draft_pages, now = lax.while_loop(
        lambda carry: (carry[2].new.n < rows.n_steps * L) & carry[2].alive_R.any(), step, start
    )
    return placed(now.stored(state, rows, pages, draft_pages), sharding), now.new


def look_up(text_RT: jax.Array, lengths_R: jax.Array, n: int) -> jax.Array:
    """Return what followed an earlier occurrence of each text's last tokens, [R, n].

    A match of the last three tokens wins over two, and two over one; of equal matches, the latest
    (prompt look-up: Saxena 2023).

    Args:
        text_RT: texts.
        lengths_R: their lengths.
        n: number of tokens to return.
    """
    T = text_RT.shape[1]
    ends_T = jnp.arange(T)
    is_same_RT = jnp.ones(text_RT.shape, bool)
    n_same_RT = jnp.zeros(text_RT.shape, jnp.int32)
    for back in range(_LONGEST):
        own_R1 = jnp.take_along_axis(text_RT, jnp.maximum(lengths_R - 1 - back, 0)[:, None], axis=1)
        before_RT = jnp.roll(text_RT, back, axis=1)
        is_same_RT &= (before_RT == own_R1) & (ends_T >= back) & (ends_T < lengths_R[:, None] - 1)
        n_same_RT += is_same_RT
    best_R = (n_same_RT * T + ends_T).argmax(1)
    following_Rn = jnp.minimum(best_R[:, None] + 1 + jnp.arange(n), lengths_R[:, None] - 1)
    return jnp.take_along_axis(text_RT, following_Rn, axis=1)


def _propose(
    draft: DraftModel,
    own: RowOptions,
    rows: StepRows,
    most_R: jax.Array,
    n: int,
    pages: Pages,
    now: Replies,
) -> tuple[jax.Array, Pages]:
    """Return the tokens that a draft model proposes, [R, n], and its updated pages."""
    R = len(now.text_RT)

    def choose(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        pages, text_RT, proposed_RP = carry
        now_R = now.lengths_R + i
        last_R1 = jnp.take_along_axis(text_RT, now_R[:, None] - 1, axis=1, mode="clip")
        is_kept_R = now.alive_R & (now_R <= most_R)
        paged = PagedRows(rows.tables_RM, now_R - 1, jnp.where(is_kept_R, now_R, 0))
        cache = PagedCache.of(draft.model, pages, paged)
        inputs = last_R1, now_R[:, None] - 1, jnp.ones_like(last_R1), cache
        logits_R1V, cache = decode_last(draft.model, draft.params, *inputs)
        own_of_draft = replace(own, n_listed_B=jnp.full(R, -1))
        chosen = choose_tokens(logits_R1V[:, 0], text_RT, now_R, own_of_draft, rows.allowed_RV)
        text_RT = text_RT.at[jnp.arange(R), now_R].set(chosen.tokens_B, mode="drop")
        proposed_RP = proposed_RP.at[:, i].set(chosen.tokens_B, mode="drop")
        return cache.pages, text_RT, proposed_RP

    # If all proposals are accepted, the keys of the last one are needed: run one more pass.
    start = pages, now.text_RT, jnp.zeros((R, n), jnp.int32)
    pages, _, proposed_RP = lax.fori_loop(0, n + 1, choose, start)
    return proposed_RP, pages
