"""Speculative decoding: several proposed tokens are checked in one pass (Leviathan et al. 2023).

A proposal is accepted where it is the token that the model chooses with its own random numbers, and
a draft model chooses with the same ones (Daliri, Musco and Suresh 2024: drafter-invariant
coupling). So the replies, and their distribution, are those of decoding token by token, whatever
proposes.

Shape letters: R rows, T tokens of a row, L tokens of a pass: the last one and the proposals, V
vocabulary.
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
    StateSharding,
    goes_on,
    no_tokens,
    placed,
)
from lm.decoding.engine.row_sampling import RowOptions, choose_tokens
from lm.decoding.sampling import decode_last
from lm.kernels.paged_attention import PagedRows
from lm.models.layer_pages import Pages
from lm.models.paged_cache import PagedCache
from lm.models.variables import Params

_LONGEST = 3  # tokens by which a place before is found again


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
    rows_R: jax.Array,
    tables_RM: jax.Array,
    goes_on_R: jax.Array,
    n_steps: jax.Array,
    allowed_RV: jax.Array,
    n_columns: int,
    n_proposed: int,
    sharding: StateSharding,
) -> tuple[EngineState, NewTokens]:
    """Choose the next tokens of some rows, 1 to `n_proposed` + 1 of each row a step.

    Args:
        model: unrolled model.
        params: its parameters.
        state: texts and pages.
        adapters: low-rank adapters of the model; None: there are none.
        draft: model that proposes; None: what followed the last tokens before.
        options: options of all rows.
        rows_R: numbers of the rows; beyond the last row for none.
        tables_RM: their pages.
        goes_on_R: false for rows that get no token now.
        n_steps: most steps.
        allowed_RV: tokens that may be chosen.
        n_columns: number of steps that the result has room for.
        n_proposed: proposed tokens a step.
        sharding: sharding of the state.

    Returns:
        The state, and the tokens: `n_proposed` + 1 places a step, -1 after a rejected proposal.
    """
    R, L, own = len(rows_R), n_proposed + 1, options.of(rows_R)
    adapt = adapters and adapters.interceptor(own.adapters_B)
    most_R = own.n_prompt_B + own.limits_B - 1  # the keys of the last token are never needed

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        pages, draft_pages, text_RT, lengths_R, alive_R, new = carry
        if draft is None:
            proposed_RP = look_up(text_RT, lengths_R, n_proposed)
        else:
            propose = partial(_propose, draft, own, tables_RM, most_R, allowed_RV, n_proposed)
            proposed_RP, draft_pages = propose(draft_pages, text_RT, lengths_R, alive_R)
        last_R1 = jnp.take_along_axis(text_RT, lengths_R[:, None] - 1, axis=1)
        tokens_RL = jnp.concatenate([last_R1, proposed_RP], axis=1)
        until_R = jnp.minimum(lengths_R + n_proposed, most_R)
        paged = PagedRows(tables_RM, lengths_R - 1, jnp.where(alive_R, until_R, 0))
        places_RL = jnp.broadcast_to(jnp.arange(L), (R, L))
        positions_RL = lengths_R[:, None] - 1 + places_RL
        inputs = (
            tokens_RL,
            positions_RL,
            jnp.ones_like(tokens_RL),
            PagedCache.of(model, pages, paged),
        )
        logits_RLV, cache = decode_last(model, params, *inputs, at_BN=places_RL, adapt=adapt)

        def check(place: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            text_RT, lengths_R, alive_R, accepts_R, new = carry
            chosen = choose_tokens(logits_RLV[:, place], text_RT, lengths_R, own, allowed_RV)
            writes_R = alive_R & accepts_R
            tokens_R = jnp.where(writes_R, chosen.tokens_B, -1)
            at_R = jnp.where(writes_R, lengths_R, text_RT.shape[1])
            text_RT = text_RT.at[jnp.arange(R), at_R].set(tokens_R, mode="drop")
            chosen = replace(chosen, tokens_B=tokens_R)
            written = jax.tree.map(lambda x, y: x.at[new.n].set(y), new.chosen, chosen)
            lengths_R = lengths_R + writes_R
            alive_R &= ~writes_R | goes_on(tokens_R, lengths_R, own)
            proposed_R = proposed_RP[:, jnp.minimum(place, n_proposed - 1)]
            return (
                text_RT,
                lengths_R,
                alive_R,
                tokens_R == proposed_R,
                NewTokens(written, new.n + 1),
            )

        start = text_RT, lengths_R, alive_R, jnp.ones_like(alive_R), new
        text_RT, lengths_R, alive_R, _, new = lax.fori_loop(0, L, check, start)
        return cache.pages, draft_pages, text_RT, lengths_R, alive_R, new

    new = NewTokens(no_tokens(model, (n_columns * L, R)), jnp.zeros((), jnp.int32))
    was_alive_R = state.alive_B.at[rows_R].get(mode="fill", fill_value=False)
    alive_R = goes_on_R & was_alive_R
    text_RT = state.tokens_BT.at[rows_R].get(mode="clip")
    lengths_R = jnp.maximum(state.lengths_B.at[rows_R].get(mode="fill", fill_value=1), 1)
    start = state.pages, state.draft_pages, text_RT, lengths_R, alive_R, new
    pages, draft_pages, text_RT, lengths_R, alive_R, new = lax.while_loop(
        lambda carry: (carry[5].n < n_steps * L) & carry[4].any(), step, start
    )
    still_R = jnp.where(goes_on_R, alive_R, was_alive_R)
    after = EngineState(
        pages,
        state.tokens_BT.at[rows_R].set(text_RT, mode="drop"),
        state.lengths_B.at[rows_R].set(lengths_R, mode="drop"),
        state.alive_B.at[rows_R].set(still_R, mode="drop"),
        draft_pages,
    )
    return placed(after, sharding), new


def look_up(text_RT: jax.Array, lengths_R: jax.Array, n: int) -> jax.Array:
    """Return what followed where the last tokens of each text were written before, [R, n].

    The place whose last three tokens are the same wins, or two, or one; the last of equal places
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
    tables_RM: jax.Array,
    most_R: jax.Array,
    allowed_RV: jax.Array,
    n: int,
    pages: Pages,
    text_RT: jax.Array,
    lengths_R: jax.Array,
    alive_R: jax.Array,
) -> tuple[jax.Array, Pages]:
    """Return the tokens that a draft model chooses, [R, n], and its pages with all of them."""
    R = len(text_RT)

    def choose(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        pages, text_RT, proposed_RP = carry
        now_R = lengths_R + i
        last_R1 = jnp.take_along_axis(text_RT, now_R[:, None] - 1, axis=1, mode="clip")
        is_kept_R = alive_R & (now_R <= most_R)
        paged = PagedRows(tables_RM, now_R - 1, jnp.where(is_kept_R, now_R, 0))
        inputs = (
            last_R1,
            now_R[:, None] - 1,
            jnp.ones_like(last_R1),
            PagedCache.of(draft.model, pages, paged),
        )
        logits_R1V, cache = decode_last(draft.model, draft.params, *inputs)
        own_of_draft = replace(own, n_listed_B=jnp.full(R, -1))
        chosen = choose_tokens(logits_R1V[:, 0], text_RT, now_R, own_of_draft, allowed_RV)
        text_RT = text_RT.at[jnp.arange(R), now_R].set(chosen.tokens_B, mode="drop")
        proposed_RP = proposed_RP.at[:, i].set(chosen.tokens_B, mode="drop")
        return cache.pages, text_RT, proposed_RP

    # The keys of the last proposal are needed if all are accepted: one pass more.
    start = pages, text_RT, jnp.zeros((R, n), jnp.int32)
    pages, _, proposed_RP = lax.fori_loop(0, n + 1, choose, start)
    return proposed_RP, pages
