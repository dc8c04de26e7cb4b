"""Paged decoding cache of a decoder: keys and values of all rows in pages of a few tokens.

A row has a table of its pages, which other rows may share; every row has a length of its own.

Shape letters: B rows, L queries, G key/value heads, K head dim, N pages, P slots of a page, M pages
of a row, S slots of a row.
"""

from __future__ import annotations

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.paged_attention import PagedRows, paged_attention
from lm.models.attention import KeyValue, MixerInputs
from lm.models.cached_attention import heads_first
from lm.models.transformer_config import TransformerConfig

Pages = tuple[Any, ...]  # of each layer: keys and values, [N, G, P, K] each (`heads_first`)
ATTENTION = "attention"  # the one token mixer whose cache is keys and values


@flax.struct.dataclass
class PagedLayer:
    """Pages of one layer, and the rows of the step."""

    held: Any
    rows: PagedRows

    def attend(
        self,
        config: TransformerConfig,
        q_BLHK: jax.Array,
        keys_values: KeyValue,
        inputs: MixerInputs,
    ) -> tuple[jax.Array, PagedLayer]:
        """Write keys and values, and attend to what is in the pages then.

        Args:
            config: configuration of the stack.
            q_BLHK: queries.
            keys_values: keys and values of the same tokens, [B, L, G, K] each.
            inputs: mask of the layer, and bias of the scores by distance.

        Returns:
            The output [B, L, H, K], and the pages with these tokens.
        """
        mask, rows = inputs.mask, self.rows
        held = jax.tree.map(self._write, self.held, heads_first(config, keys_values))
        out_BLHK = paged_attention(
            q_BLHK,
            held,
            rows,
            scale=config.score_scale,
            softcap=config.attention_softcap,
            window=mask.window,
            is_global=mask.is_global,
            bias_HD=inputs.bias_HLS,
        )
        return out_BLHK, PagedLayer(held, rows)

    def _write(self, pages: jax.Array, new_BGLK: jax.Array) -> jax.Array:
        """Write new entries at the offsets of their rows; those beyond its length are dropped."""
        (N, _, P), rows = pages.shape[:3], self.rows
        B, G, L, K = new_BGLK.shape
        new_BGLK = new_BGLK.astype(pages.dtype)
        is_row_B1 = rows.lengths_B[:, None] > 0
        if rows.starts_page:
            first_B1 = rows.offsets_B[:, None] // P
            index_Bm = first_B1 + jnp.arange(L // P)
            is_used_Bm = is_row_B1 & (index_Bm * P < rows.lengths_B[:, None])
            ids_Bm = self._ids(index_Bm, is_used_Bm, N)
            whole = new_BGLK.reshape(B, G, L // P, P, K).swapaxes(1, 2)
            return pages.at[ids_Bm].set(whole, mode="drop")
        slots_BL = rows.offsets_B[:, None] + jnp.arange(L)
        is_used_BL = is_row_B1 & (slots_BL < rows.lengths_B[:, None])
        ids_BL = self._ids(slots_BL // P, is_used_BL, N)
        return pages.at[ids_BL, :, slots_BL % P].set(new_BGLK.swapaxes(1, 2), mode="drop")

    def _ids(self, index: jax.Array, is_used: jax.Array, n_pages: int) -> jax.Array:
        """Return numbers of pages; `n_pages`, which is none, where nothing is written."""
        last = self.rows.tables_BM.shape[1] - 1
        ids = jnp.take_along_axis(self.rows.tables_BM, jnp.clip(index, 0, last), axis=1)
        return jnp.where(is_used, ids, n_pages)


@flax.struct.dataclass
class PagedCache:
    """Cache of a stack for one step, in the place of `Cache`.

    Attributes:
        mixers: the layers' pages, {"attention": (PagedLayer, …)}.
        index: position of the first token of each row, [B].
        segment_ids_BS: one row of zeros, which says how many slots a row has.
    """

    mixers: dict[str, Any]
    index: jax.Array
    segment_ids_BS: jax.Array
    source: None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def of(cls, pages: Pages, rows: PagedRows) -> Self:
        """Return the cache of a step from the pages of all layers and its rows."""
        slots = rows.tables_BM.shape[1] * jax.tree.leaves(pages[0])[0].shape[2]
        layers = tuple(PagedLayer(held, rows) for held in pages)
        return cls({ATTENTION: layers}, rows.offsets_B, jnp.zeros((1, slots), jnp.int32))

    def with_segments(self, segment_ids_BL: jax.Array) -> Self:
        """Return the cache itself: lengths say which slots are written."""
        return self

    def advance(self, config: Any, mixers: dict[str, Any], *_: Any) -> Self:
        """Return the cache after more tokens; arguments as of `Cache.advance`."""
        return self.replace(mixers=mixers)  # type: ignore[attr-defined,no-any-return]

    @property
    def pages(self) -> Pages:
        """Pages of all layers."""
        return tuple(layer.held for layer in self.mixers[ATTENTION])


def empty_pages(config: TransformerConfig, n_layers: int, n_pages: int, page_size: int) -> Pages:
    """Return zeros as the pages of all layers."""
    shape = (n_pages, page_size, config.n_kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.dtype)
    return tuple(heads_first(config, (zeros, zeros)) for _ in range(n_layers))
