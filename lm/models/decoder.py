"""Decoder-only language model: embeddings, a causal stack, logits.

Shape letters: B batch, L length, D model, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask
from lm.models.base import Model
from lm.models.cache import Cache
from lm.models.transformer import Stack, init_cache


class Decoder(Model):
    """Decoder-only Transformer."""

    def setup(self) -> None:
        super().setup()
        self.stack = Stack(self.config, self.config.n_layers, self.deterministic, causal=True)

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        prefix_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Return the logits [B, L, V] of the next tokens, float32; arguments as for `hidden`."""
        return self.logits(
            self.hidden(tokens_BL, positions_BL, segment_ids_BL, prefix_BL=prefix_BL)
        )

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
        prefix_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Return the hidden states that the logits are computed from, [B, L, D].

        Args:
            tokens_BL: token ids.
            positions_BL: positions; default 0 … L-1.
            segment_ids_BL: segments, which do not see each other; default one a row.
            types_BL: token types.
            prefix_BL: true for tokens that earlier ones of their segment see too.
        """
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL, types_BL)
        mask = AttentionMask(True, segment_ids_BL, prefix_BS=prefix_BL)
        return self.stack(x_BLD, positions_BL, mask)[0]

    def decode(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: Cache,
        prefix_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Return the logits [B, L, V] of tokens after those in the cache, and the cache with them.

        Args:
            tokens_BL: token ids.
            positions_BL: their positions.
            segment_ids_BL: their segments; 0 is padding.
            cache: cache of the tokens before them.
            prefix_BL: true for tokens that earlier ones see too; in the first call only.
        """
        cache = cache.with_segments(segment_ids_BL)
        if prefix_BL is not None:
            room = cache.segment_ids_BS.shape[1] - prefix_BL.shape[1]
            prefix_BL = jnp.pad(prefix_BL, ((0, 0), (0, room)))
        mask = AttentionMask(
            True, segment_ids_BL, cache.segment_ids_BS, cache.index, prefix_BS=prefix_BL
        )
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL)
        x_BLD, after = self.stack(x_BLD, positions_BL, mask, cache)
        assert after is not None
        return self.logits(x_BLD), after

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Return a cache for `batch` rows of up to `length` tokens."""
        return init_cache(self.config, self.config.n_layers, batch, length)
