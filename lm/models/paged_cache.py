"""Paged decoding cache of a decoder: keys and values of all rows in small pages.

A row has a table of its pages, which other rows may share; rows differ in length.

Shape letters: B rows, L queries, G key/value heads, K head dim, S slots of a row.
"""

from __future__ import annotations

from typing import Any, Self

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.paged_attention import PagedRows
from lm.models.attention import MixerInputs
from lm.models.layer_pages import LayerPages, Pages
from lm.models.transformer_config import TransformerConfig

# Token mixers that cache keys and values, or one array for both, and attend by `attend_and_cache`.
PAGED_MIXERS = ("attention", "mla")


@flax.struct.dataclass
class PagedLayer:
    """Pages of one layer, and the current step's rows."""

    pages: LayerPages
    rows: PagedRows

    def attend(
        self,
        config: TransformerConfig,
        q_BLHK: jax.Array,
        keys_values: tuple[jax.Array, ...],
        inputs: MixerInputs,
    ) -> tuple[jax.Array, PagedLayer]:
        """Write keys and values, then attend to the pages.

        Args:
            config: configuration of the stack.
            q_BLHK: queries.
            keys_values: keys and values of the same tokens, [B, L, G, K] each, or one shared array.
            inputs: mask of the layer, and bias of the scores by distance.

        Returns:
            The output [B, L, H, K], and the pages with these tokens.
        """
        pages = self.pages.write(config, keys_values, self.rows)
        out_BLHK = pages.attend(config, q_BLHK, self.rows, inputs)
        return out_BLHK, PagedLayer(pages, self.rows)


@flax.struct.dataclass
class PagedCache:
    """Cache of a stack for one step, used instead of `Cache`.

    Attributes:
        mixers: pages of the layers by their only token mixer, as {"attention": (PagedLayer, …)}.
        index: position of the first token of each row, [B].
        segment_ids_BS: one row of zeros, whose length is the number of slots per row.
    """

    mixers: dict[str, Any]
    index: jax.Array
    segment_ids_BS: jax.Array
    source: None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def of(cls, model: nn.Module, pages: Pages, rows: PagedRows) -> Self:
        """Return a decoder's cache for one step, from the pages of all layers and the rows."""
        config: TransformerConfig = model.config  # type: ignore[attr-defined]
        slots = rows.tables_BM.shape[1] * pages[0].page_size
        layers = tuple(PagedLayer(of_layer, rows) for of_layer in pages)
        return cls({config.mixer: layers}, rows.offsets_B, jnp.zeros((1, slots), jnp.int32))

    def with_segments(self, segment_ids_BL: jax.Array) -> Self:
        """Return the cache unchanged: lengths determine which slots are written."""
        return self

    def advance(self, config: Any, mixers: dict[str, Any], *_: Any) -> Self:
        """Return the cache after more tokens; for arguments see `Cache.advance`."""
        return self.replace(mixers=mixers)  # type: ignore[attr-defined,no-any-return]

    @property
    def pages(self) -> Pages:
        """Pages of all layers."""
        ((_, layers),) = self.mixers.items()
        return tuple(layer.pages for layer in layers)
