"""The decoder-only language model: embeddings, a causal stack, logits.

Shape letters: B batch, L length, D model, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask
from lm.models.base import Model
from lm.models.cache import Cache, empty_cache, write_segments
from lm.models.transformer import Stack


class Decoder(Model):
    """Next-token logits of a batch of token sequences."""

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
        """Logits [B, L, V] in float32.

        Positions default to 0 … L-1, segments to one a row; tokens see their own segment only,
        and of what comes after them only a prefix.
        """
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
        """What the logits are made of, [B, L, D]."""
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL, types_BL)
        visibility = AttentionMask(True, segment_ids_BL, prefix_BS=prefix_BL)
        return self.stack(x_BLD, positions_BL, visibility)[0]

    def decode(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: Cache,
        prefix_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Logits [B, L, V] of tokens that follow those in the cache, and the cache with them.

        `prefix_BL` marks tokens that see one another whatever their order; the first call only.
        """
        cache = write_segments(cache, segment_ids_BL)
        if prefix_BL is not None:
            room = cache.segment_ids_BS.shape[1] - prefix_BL.shape[1]
            prefix_BL = jnp.pad(prefix_BL, ((0, 0), (0, room)))
        visibility = AttentionMask(
            True, segment_ids_BL, cache.segment_ids_BS, cache.index, prefix_BS=prefix_BL
        )
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL)
        x_BLD, after = self.stack(x_BLD, positions_BL, visibility, cache)
        assert after is not None
        return self.logits(x_BLD), after

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of up to `length` tokens."""
        c = self.config
        return empty_cache(c.n_layers, batch, length, c.n_kv_heads, c.head_dim, c.dtype)
