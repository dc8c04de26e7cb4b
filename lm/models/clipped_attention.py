"""Attention with clipped queries, keys and values (an option of OLMoE, Muennighoff et al. 2024).

Shape letters: B batch, L query length, S key length, W width of the input, H heads,
G key/value heads, K head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.models.attention import Attention, KeyValue


class ClippedAttention(Attention):
    """Multi-head attention whose queries, keys and values lie within ± `qkv_clip`."""

    def queries(self, x_BLW: jax.Array) -> jax.Array:
        return self._clipped(super().queries(x_BLW))

    def keys_values(self, source_BSW: jax.Array, v_BSGK: jax.Array | None = None) -> KeyValue:
        k_BSGK, v_BSGK = super().keys_values(source_BSW, v_BSGK)
        return self._clipped(k_BSGK), self._clipped(v_BSGK)

    def _clipped(self, x: jax.Array) -> jax.Array:
        bound = self.config.mixer_options.qkv_clip
        return jnp.clip(x, -bound, bound)
