"""Disentangled attention: contents attend to contents and relative positions, and vice versa.

DeBERTa (He et al. 2021, §3.1) with the buckets and shared projections of versions 2 and 3.

Shape letters: B batch, L length, R rows of the table of relative positions, D model, W width of the
input, H heads, K head dim.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.models.attention import Attention, MixerInputs
from lm.models.cache import Layer
from lm.models.layers import make_norm
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role, param


def log_buckets(distances: np.ndarray, n_rows: int, max_distance: int) -> np.ndarray:
    """Return the row of each distance, query position − key position, in the table.

    Half of the rows represent single distances, from 1 − R/4 to R/4 − 1; beyond these, buckets grow
    logarithmically up to `max_distance`, keeping the sign (DeBERTa's released code).

    Args:
        distances: integers of any shape.
        n_rows: R; distance 0 has row R/2.
        max_distance: distance from which all use the first or the last row.
    """
    middle = n_rows // 4
    sizes = np.maximum(np.abs(distances), 1).astype(np.float32)
    growth = np.log(sizes / np.float32(middle)) / np.log(np.float32((max_distance - 1) / middle))
    far = np.sign(distances) * (np.ceil(growth * (middle - 1)) + middle)
    buckets = np.where(np.abs(distances) <= middle, distances, far).astype(int)
    return np.clip(buckets + n_rows // 2, 0, n_rows - 1)


class RelativeTable(nn.Module):
    """Normalized table of a stack's relative positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        """Return the table [R, D]."""
        c = self.config
        role, shape = Role(Kind.POSITION_BIAS, c.stream, inputs=1), (c.relative_buckets, c.d_model)
        table_RD = param(self, "embedding", c.table_init, shape, ("positions", "embed"), role)
        return make_norm(c, "norm")(table_RD)


class DisentangledAttention(Attention):
    """Self-attention whose scores are the sum of three products, divided by sqrt(3 K).

    They are query · key, query · position and key · position, where the layer's own queries and
    keys project the stack's table.
    """

    def setup(self) -> None:
        super().setup()
        self.dropout = nn.Dropout(self.config.dropout, deterministic=self.deterministic)

    @classmethod
    def init_cache(cls, config: TransformerConfig, n_layers: int, batch: int, length: int) -> Any:
        raise NotImplementedError("disentangled attention is for encoders only")

    def __call__(
        self, x_BLW: jax.Array, inputs: MixerInputs, cache: Any, layer: Layer | None
    ) -> tuple[jax.Array, Any]:
        """Attend to the tokens themselves; `inputs.bias_HLS` is the table [R, D]."""
        c, table_RD = self.config, inputs.bias_HLS
        assert table_RD is not None
        table_1RD = self.dropout(table_RD)[None]
        q_BLHK, (k_BLHK, v_BLHK) = self.queries(x_BLW) / math.sqrt(3), self.keys_values(x_BLW)
        q_RHK, k_RHK = self.queries(table_1RD)[0] / math.sqrt(3), self.key(table_1RD)[0]
        distances = np.arange(x_BLW.shape[1])[:, None] - np.arange(x_BLW.shape[1])
        rows_LL = log_buckets(distances, c.relative_buckets, c.relative_max_distance)
        bias_BHLL = _pick(q_BLHK, k_RHK, rows_LL) + _pick(k_BLHK, q_RHK, rows_LL.T).swapaxes(2, 3)
        bias_BHLL *= c.score_scale
        return self._attend(q_BLHK, (k_BLHK, v_BLHK), inputs.mask, bias_BHLL), None


def _pick(x_BLHK: jax.Array, table_RHK: jax.Array, rows_LL: np.ndarray) -> jax.Array:
    """Return the products [B, H, L, L] of each token with the table rows for all others."""
    products_BHLR = jnp.einsum(
        "BLHK,RHK->BHLR", x_BLHK, table_RHK, preferred_element_type=jnp.float32
    )
    return jnp.take_along_axis(products_BHLR, jnp.asarray(rows_LL)[None, None], axis=-1)
