"""Attention of a decoder to the encoder's output.

Shape letters: B batch, L query length, S source length, D model, W width of the input.
"""

from __future__ import annotations

from typing import Any

import jax

from lm.kernels.dot_product_attention import AttentionMask
from lm.models.attention import DotProductAttention
from lm.models.cached_attention import attend_to_cache


class CrossAttention(DotProductAttention):
    """Attention to an encoder's output, whose keys and values are computed once."""

    def __call__(
        self, x_BLW: jax.Array, keys_values: Any, mask: AttentionMask, is_cached: bool
    ) -> jax.Array:
        """Return attention to the source, [B, L, D].

        Args:
            x_BLW: normalized tokens.
            keys_values: keys and values; if cached, in the layout of `heads_first`.
            mask: mask of the source.
            is_cached: whether they come from a cache.
        """
        if is_cached:
            return self.out(attend_to_cache(self.config, self.queries(x_BLW), keys_values, mask))
        return self.out(self._attend(self.queries(x_BLW), keys_values, mask))
