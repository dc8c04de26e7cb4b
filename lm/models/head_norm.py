"""Normalization of the heads of queries or keys (QK-norm).

Shape letters: B batch, L length, H heads, K head dim.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from lm.models.layers import Norm, make_norm
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role


class JointNorm(Norm):
    """Joint norm over all heads of a token, with a scale [H K] (OLMo 2, 2024, §3.2)."""

    @nn.compact
    def __call__(self, x_BLHK: jax.Array) -> jax.Array:
        """Return [B, L, H, K], normalized."""
        return super().__call__(x_BLHK.reshape(*x_BLHK.shape[:2], -1)).reshape(x_BLHK.shape)


# A norm per head, with separate scales [H, K].
EachHeadNorm = nn.vmap(
    Norm,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=2,
    out_axes=2,
    metadata_params={nn.PARTITION_NAME: "norm"},
)


def make_head_norm(config: TransformerConfig) -> Norm:
    """Build the norm of queries or keys: per head (Henry et al. 2020), or over all heads.

    Norms with a separate scale per head have no biases.
    """
    if config.qk_norm_over == "head":
        return make_norm(config)
    c, role = config, Role(Kind.NORM, config.stream)
    if c.qk_norm_over == "each_head":
        return EachHeadNorm(c.norm, role, c.norm_eps, False, c.norm_unit_offset, c.dtype)
    return JointNorm(c.norm, role, c.norm_eps, c.norm_bias, c.norm_unit_offset, c.dtype)
