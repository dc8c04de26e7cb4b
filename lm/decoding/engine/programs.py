"""Compiled programs of the engine: a chunk of a prompt, and steps of many rows.

Each takes the pages and the texts of all rows, donated, and returns them. What depends on the
requests (options, tables of pages, lengths) are arrays: no request compiles anything.

Shape letters: B rows, R rows of a step, L tokens of a chunk, T tokens of a row, M pages of a row,
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
        lengths_B: tokens of each row; the keys and values of the last one are not written yet.
        alive_B: rows whose reply goes on.
        draft_pages: pages of the layers of a draft model, with the same tables.
    """

    pages: Pages
    tokens_BT: jax.Array
    lengths_B: jax.Array
    alive_B: jax.Array
    draft_pages: Pages = ()


@flax.struct.dataclass
class DraftModel:
    """Smaller model that proposes tokens, unrolled, and its parameters."""

    model: nn.Module = flax.struct.field(pytree_node=False)
    params: Params


@flax.struct.dataclass
class NewTokens:
    """Tokens of some steps, end tokens included.

    Attributes:
        chosen: the tokens with a first axis for the steps; -1 for rows that have ended.
        n: number of steps that were run.
    """

    chosen: Chosen
    n: jax.Array


@flax.struct.dataclass
class StepRows:
    """Rows that a dispatch continues.

    Attributes:
        numbers_R: their numbers; beyond the last row for none.
        tables_RM: their pages.
        goes_on_R: false for rows that get no token now.
        n_steps: most steps.
        allowed_RV: tokens that may be chosen.
    """

    numbers_R: jax.Array
    tables_RM: jax.Array
    goes_on_R: jax.Array
    n_steps: jax.Array
    allowed_RV: jax.Array


@flax.struct.dataclass
class Replies:
    """Texts of some rows while they grow.

    Attributes:
        text_RT: prompts and replies.
        lengths_R: their tokens.
        alive_R: rows whose reply goes on.
        new: tokens that were added.
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
            rows.goes_on_R & _alive(state, rows),
            NewTokens(room, jnp.zeros((), jnp.int32)),
        )

    @property
    def last_R1(self) -> jax.Array:
        """Last tokens, whose keys and values are not written yet."""
        return jnp.take_along_axis(self.text_RT, self.lengths_R[:, None] - 1, axis=1)

    def append(self, chosen: Chosen, writes_R: jax.Array, options: RowOptions) -> Replies:
        """Add a column of tokens to the rows that get one."""
        tokens_R = jnp.where(writes_R, chosen.tokens_B, -1)
        at_R = jnp.where(writes_R, self.lengths_R, self.text_RT.shape[1])
        column = replace(chosen, tokens_B=tokens_R)
        n, lengths_R = self.new.n, self.lengths_R + writes_R
        return Replies(
            self.text_RT.at[jnp.arange(len(at_R)), at_R].set(tokens_R, mode="drop"),
            lengths_R,
            self.alive_R & (~writes_R | goes_on(tokens_R, lengths_R, options)),
            NewTokens(jax.tree.map(lambda x, y: x.at[n].set(y), self.new.chosen, column), n + 1),
        )

    def stored(
        self, state: EngineState, rows: StepRows, pages: Pages, draft_pages: Pages
    ) -> EngineState:
        """Return the state with these texts and pages."""
        at_R = rows.numbers_R
        still_R = jnp.where(rows.goes_on_R, self.alive_R, _alive(state, rows))
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
    """Sharding of the pages, by key/value heads where the mesh divides these; the rest is whole."""

    mesh: Mesh

    def place(self, state: EngineState, put: Callable[..., Any]) -> EngineState:
        """Return the state with these shardings, which `put` gives to an array."""

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
    """Return the state, constrained to its shardings."""
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
    """Read a chunk of a prompt, and choose the first token of the reply after the last one.

    Args:
        model: unrolled model.
        params: its parameters.
        state: texts and pages.
        adapters: low-rank adapters; None: there are none.
        draft: model that proposes tokens, which reads the prompt too; None: there is none.
        options: options of all rows.
        row: number of the row.
        table_M: pages of the row.
        tokens_L: tokens of the chunk, then padding.
        start: position of the first one, a multiple of the page size.
        n_tokens: number of the tokens without padding.
        is_last: whether the prompt ends with the chunk.
        allowed_V: tokens that may be chosen.
        is_prefix: tokens of the prompt, which is one chunk, attend to each other in both
            directions.
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
        state.alive_B.at[row].set(is_last & goes_on(chosen.tokens_B, end + 1, own)[0]),
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
    """Choose the next tokens of some rows, step by step.

    Args:
        model: unrolled model.
        params: its parameters.
        state: texts and pages.
        adapters: low-rank adapters; None: there are none.
        options: options of all rows.
        rows: the rows.
        n_columns: number of steps that the result has room for.
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


def goes_on(tokens_R: jax.Array, lengths_R: jax.Array, options: RowOptions) -> jax.Array:
    """Return whether replies go on after these tokens, given the lengths with them."""
    is_end_R = (tokens_R[:, None] == options.end_ids_BE).any(1)
    return ~is_end_R & (lengths_R - options.n_prompt_B < options.limits_B)


def no_tokens(model: nn.Module, shape: tuple[int, ...]) -> Chosen:
    """Return room for tokens of some shape."""
    listed = *shape, min(MOST_LOGPROBS, model.config.vocab_size)  # type: ignore[attr-defined]
    return Chosen(
        jnp.full(shape, -1, jnp.int32),
        jnp.zeros(shape),
        jnp.zeros(listed, jnp.int32),
        jnp.zeros(listed),
    )
