"""Pooling of classifiers, and the bias of tied output layers.

Shape letters: B batch, L length, D model, V vocabulary.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.elementwise import add_bias
from lm.models.variables import Initializer, Role, param
from lm.models.vocabulary_blocks import of_block


class Bias(nn.Module):
    """Vocabulary bias for tied embeddings."""

    size: int
    role: Role
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, logits_BLV: jax.Array) -> jax.Array:
        bias_V = param(self, "bias", self.bias_init, (self.size,), ("vocab",), self.role.bias())
        return add_bias(logits_BLV, of_block(bias_V, 0))


def mean_of_row(x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """Return the mean vector [B, D] of the tokens without padding, float32."""
    is_token_BL = (segment_ids_BL != 0).astype(jnp.float32)
    sum_BD = jnp.einsum("bld,bl->bd", x_BLD.astype(jnp.float32), is_token_BL)
    return sum_BD / jnp.maximum(is_token_BL.sum(-1, keepdims=True), 1)


def last_of_row(x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """Return the vector [B, D] of the last token before padding."""
    last_B = jnp.maximum((segment_ids_BL != 0).sum(-1) - 1, 0)
    return jnp.take_along_axis(x_BLD, last_B[:, None, None], axis=1)[:, 0]
