"""Attention of a decoder to what an encoder made of the source.

Shape letters: B batch, L query length, S source length, D model, W width of the input.
"""

from __future__ import annotations

import jax

from lm.kernels.dot_product_attention import AttentionMask
from lm.models.attention import DotProductAttention
from lm.models.cache import CrossKeyValue


class CrossAttention(DotProductAttention):
    """Attention to an encoder's output, whose keys and values are computed once."""

    def __call__(
        self, x_BLW: jax.Array, keys_values: CrossKeyValue, mask: AttentionMask
    ) -> jax.Array:
        """Attend to what `keys_values` computed from the source, [B, L, D]."""
        return self._attend(self.queries(x_BLW), keys_values, mask)
