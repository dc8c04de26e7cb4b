"""Compiled programs of the engine: prefill of a prompt chunk, and decoding steps of many rows.

They take and return the donated pages and texts of all rows. Everything that depends on requests
(options, page tables, lengths) is an array, so no request triggers compilation.

Shape letters: B rows, R rows of a step, L tokens per chunk, T tokens per row, M pages per row,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.decoding.engine.adapters import Adapters
from lm.decoding.engine.requests import MOST_LOGPROBS
from lm.decoding.engine.row_sampling import Chosen, RowOptions, choose_tokens
from lm.decoding.sampling import decode_last
from lm.kernels.paged_attention import PagedRows
from lm.models.layer_pages import LayerPages, Pages
from lm.models.paged_cache import PagedCache
from lm.models.variables import Params


@flax.struct.dataclass
class EngineState:
    """Texts of the rows and pages of their keys and values; donated to the next program.

    Attributes:
        pages: pages of all layers.
        tokens_BT: prompts and replies.
        lengths_B: length of each row; keys and values of the last token are not written yet.
        alive_B: rows whose reply continues.
        draft_pages: pages of a draft model's layers, with the same page tables.
    """

    pages: Pages
    tokens_BT: jax.Array
    lengths_B: jax.Array
    alive_B: jax.Array
    draft_pages: Pages = ()


@flax.struct.dataclass
class DraftModel:
    """Unrolled draft model that proposes tokens, with its parameters."""

    model: nn.Module = flax.struct.field(pytree_node=False)
    params: Params


@flax.struct.dataclass
class NewTokens:
    """Tokens of some steps, including end tokens.

    Attributes:
        chosen: tokens with a leading step axis; -1 for rows that have ended.
        n: number of steps run.
    """

    chosen: Chosen
    n: jax.Array


@flax.struct.dataclass
class StepRows:
    """Rows that a dispatch continues.

    Attributes:
        numbers_R: row indices; out of range for unused entries.
        tables_RM: page tables.
        active_R: false for rows that get no token in this dispatch.
        n_steps: maximum number of steps.
        allowed_RV: mask of allowed tokens.
    """

    numbers_R: jax.Array
    tables_RM: jax.Array
    active_R: jax.Array
    n_steps: jax.Array
    allowed_RV: jax.Array


@flax.struct.dataclass
class Replies:
    """Texts of some rows while they grow.

    Attributes:
        text_RT: prompts and replies.
        lengths_R: their lengths.
        alive_R: rows whose reply continues.
        new: added tokens.
    """

    text_RT: jax.Array
    lengths_R: jax.Array
    alive_R: jax.Array
    new: NewTokens

    @classmethod
    def of(cls, model: nn.Module, state: EngineState, rows: StepRows, n_columns: int) -> Replies:
        """Return the texts of rows, with room for new tokens in `n_columns` columns."""
        at_R = rows.numbers_R
        lengths_R = state.lengths_B.at[at_R].get(mode="fill", fill_value=1)
        room = no_tokens(model, (n_columns, len(at_R)))
        return cls(
            state.tokens_BT.at[at_R].get(mode="clip"),
            jnp.maximum(lengths_R, 1),
            rows.active_R & _alive(state, rows),
            NewTokens(room, jnp.zeros((), jnp.int32)),
        )

    @property
    def last_R1(self) -> jax.Array:
        """Last tokens, whose keys and values are not written yet."""
        return jnp.take_along_axis(self.text_RT, self.lengths_R[:, None] - 1, axis=1)

    def append(self, chosen: Chosen, writes_R: jax.Array, options: RowOptions) -> Replies:
        """Append a column of tokens to the rows that get one."""
        tokens_R = jnp.where(writes_R, chosen.tokens_B, -1)
        at_R = jnp.where(writes_R, self.lengths_R, self.text_RT.shape[1])
        column = replace(chosen, tokens_B=tokens_R)
        n, lengths_R = self.new.n, self.lengths_R + writes_R
        return Replies(
            self.text_RT.at[jnp.arange(len(at_R)), at_R].set(tokens_R, mode="drop"),
            lengths_R,
            self.alive_R & (~writes_R | reply_continues(tokens_R, lengths_R, options)),
            NewTokens(jax.tree.map(lambda x, y: x.at[n].set(y), self.new.chosen, column), n + 1),
        )

    def stored(
        self, state: EngineState, rows: StepRows, pages: Pages, draft_pages: Pages
    ) -> EngineState:
        """Write these texts and pages back to the state."""
        at_R = rows.numbers_R
        still_R = jnp.where(rows.active_R, self.alive_R, _alive(state, rows))
        return EngineState(
            pages,
            state.tokens_BT.at[at_R].set(self.text_RT, mode="drop"),
            state.lengths_B.at[at_R].set(self.lengths_R, mode="drop"),
            state.alive_B.at[at_R].set(still_R, mode="drop"),
            draft_pages,
        )


def _alive(state: EngineState, rows: StepRows) -> jax.Array:
    return state.alive_B.at[rows.numbers_R].get(mode="fill", fill_value=False)


class StateSharding(NamedTuple):
    """Sharding of the pages by key/value heads if the mesh divides them; the rest is replicated."""

    mesh: Mesh

    def place(self, state: EngineState, put: Callable[..., Any]) -> EngineState:
        """Apply these shardings to the state with `put`."""

        def by_heads(layer: LayerPages) -> LayerPages:
            sharding = layer.sharding(self.mesh)
            return jax.tree.map(lambda x: put(x, sharding), layer)

        whole = NamedSharding(self.mesh, PartitionSpec())
        return EngineState(
            tuple(map(by_heads, state.pages)),
            put(state.tokens_BT, whole),
            put(state.lengths_B, whole),
            put(state.alive_B, whole),
            tuple(map(by_heads, state.draft_pages)),
        )


def placed(state: EngineState, sharding: StateSharding) -> EngineState:
    """Constrain the state to its shardings."""
    return sharding.place(state, lax.with_sharding_constraint)


@partial(jax.jit, static_argnames=("model", "is_prefix", "sharding"), donate_argnames=("state",))
def read_chunk(
    model: nn.Module,
    params: Params,
    state: EngineState,
    adapters: Adapters | None,
    draft: DraftModel | None,
    options: RowOptions,
    row: jax.Array,
    table_M: jax.Array,
    tokens_L: jax.Array,
    start: jax.Array,
    n_tokens: jax.Array,
    is_last: jax.Array,
    allowed_V: jax.Array,
    is_prefix: bool,
    sharding: StateSharding,
) -> tuple[EngineState, NewTokens]:
    """Prefill a prompt chunk; at the end of the prompt, choose the first token of the reply.

    Args:
        model: unrolled model.
        params: parameters.
        state: texts and pages.
        adapters: low-rank adapters, or None.
        draft: draft model, which reads the prompt too; or None.
        options: options of all rows.
        row: row index.
        table_M: page table of the row.
        tokens_L: tokens of the chunk, then padding.
        start: position of the first one, a multiple of the page size.
        n_tokens: number of tokens without padding.
        is_last: whether the prompt ends with this chunk.
        allowed_V: mask of allowed tokens.
        is_prefix: the prompt, a single chunk, uses bidirectional attention.
        sharding: sharding of the state.
    """
    L, of_row = len(tokens_L), row[None]
    positions_1L = (start + jnp.arange(L))[None]
    end = (start + n_tokens)[None]
    prefix = end if is_prefix else None
    paged = PagedRows(table_M[None], start[None], end, prefix, starts_page=True)
    is_token_1L = (jnp.arange(L) < n_tokens)[None].astype(jnp.int32)
    cache = PagedCache.of(model, state.pages, paged)
    inputs = tokens_L[None], jnp.where(is_token_1L == 1, positions_1L, 0), is_token_1L, cache
    own = options.of(of_row)
    adapt = adapters and adapters.interceptor(own.adapters_B)
    last_11 = (n_tokens - 1)[None, None]
    logits_11V, cache = decode_last(model, params, *inputs, at_BN=last_11, adapt=adapt)
    draft_pages = state.draft_pages
    if draft is not None:
        of_draft = (*inputs[:3], PagedCache.of(draft.model, draft_pages, paged))
        draft_pages = decode_last(draft.model, draft.params, *of_draft)[1].pages
    old_T = state.tokens_BT[row]
    at_L = jnp.where(is_token_1L[0] == 1, positions_1L[0], len(old_T))
    text_T = old_T.at[at_L].set(tokens_L, mode="drop")
    chosen = lax.cond(
        is_last,
        lambda: choose_tokens(logits_11V[:, 0], text_T[None], end, own, allowed_V[None]),
        lambda: no_tokens(model, (1,)),
    )
    text_T = text_T.at[jnp.where(is_last, end[0], len(text_T))].set(chosen.tokens_B[0], mode="drop")
    after = EngineState(
        cache.pages,
        state.tokens_BT.at[row].set(text_T),
        state.lengths_B.at[row].set(end[0] + is_last),
        state.alive_B.at[row].set(is_last & reply_continues(chosen.tokens_B, end + 1, own)[0]),
        draft_pages,
    )
    new = NewTokens(jax.tree.map(lambda x: x[None], chosen), is_last.astype(jnp.int32))
    return placed(after, sharding), new


@partial(jax.jit, static_argnames=("model", "n_columns", "sharding"), donate_argnames=("state",))
def decode_rows(
    model: nn.Module,
    params: Params,
    state: EngineState,
    adapters: Adapters | None,
    options: RowOptions,
    rows: StepRows,
    n_columns: int,
    sharding: StateSharding,
) -> tuple[EngineState, NewTokens]:
    """Decode the next tokens of some rows, step by step.

    Args:
        model: unrolled model.
        params: parameters.
        state: texts and pages.
        adapters: low-rank adapters, or None.
        options: options of all rows.
        rows: the rows.
        n_columns: maximum number of steps in the result.
        sharding: sharding of the state.
    """
    own = options.of(rows.numbers_R)
    adapt = adapters and adapters.interceptor(own.adapters_B)

    def step(carry: tuple[Pages, Replies]) -> tuple[Pages, Replies]:
        pages, now = carry
        before_R = now.lengths_R - 1
        paged = PagedRows(rows.tables_RM, before_R, jnp.where(now.alive_R, now.lengths_R, 0))
        cache = PagedCache.of(model, pages, paged)
        inputs = now.last_R1, before_R[:, None], jnp.ones_like(now.last_R1), cache
        logits_R1V, cache = decode_last(model, params, *inputs, adapt=adapt)
        chosen = choose_tokens(logits_R1V[:, 0], now.text_RT, now.lengths_R, own, rows.allowed_RV)
        return cache.pages, now.append(chosen, now.alive_R, own)

    start = state.pages, Replies.of(model, state, rows, n_columns)
    pages, now = lax.while_loop(
        lambda carry: (carry[1].new.n < rows.n_steps) & carry[1].alive_R.any(), step, start
    )
    return placed(now.stored(state, rows, pages, state.draft_pages), sharding), now.new


def reply_continues(tokens_R: jax.Array, lengths_R: jax.Array, options: RowOptions) -> jax.Array:
    """Return whether replies continue after these tokens, given the lengths including them."""
    is_end_R = (tokens_R[:, None] == options.end_ids_BE).any(1)
    return ~is_end_R & (lengths_R - options.n_prompt_B < options.limits_B)


def no_tokens(model: nn.Module, shape: tuple[int, ...]) -> Chosen:
    """Return an empty buffer for tokens of some shape."""
    listed = *shape, min(MOST_LOGPROBS, model.config.vocab_size)  # type: ignore[attr-defined]
    return Chosen(
        jnp.full(shape, -1, jnp.int32),
        jnp.zeros(shape),
        jnp.zeros(listed, jnp.int32),
        jnp.zeros(listed),
    )
